"""`cineray ...` and `python -m cineray ...`."""


def main() -> None:
    from cineray.jobs.allocator import grow_segments
    from cineray.jobs.threads import wait_passively

    wait_passively()  # before anything imports torch
    grow_segments()
    from cineray.jobs.cli.main import run

    run()


if __name__ == "__main__":
    main()
