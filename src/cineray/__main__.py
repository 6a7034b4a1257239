"""`cineray ...` and `python -m cineray ...`."""


def main() -> None:
    from cineray.jobs.allocator import grow_segments
    from cineray.jobs.exact_products import multiply_exactly
    from cineray.jobs.threads import wait_passively

    wait_passively()  # before anything imports torch
    multiply_exactly()
    grow_segments()
    from cineray.jobs.cli.main import run

    run()


if __name__ == "__main__":
    main()
