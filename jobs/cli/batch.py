"""The commands about batches that run, or will run, somewhere else: `status` and `submit`."""

import os
import sys
from pathlib import Path

import click

from cineray.jobs.cli.options import json_option
from cineray.jobs.console.terminal import print_json, print_lines, write
from cineray.text import printable


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), metavar="DIR")
@json_option
def status(folder: Path, as_json: bool) -> int:
    """Says what of a batch is done, running, failed and quarantined.

    Reads the output folder alone: it works from any machine that sees it, while a driver runs and after.

    \b
    Examples:
      cineray status out/demo
      cineray status /nfs/batch --json
    """
    from cineray.jobs.output.status import lines, read_status

    found = read_status(folder)
    if as_json:
        print_json(found.to_dict())
    else:
        print_lines(sys.stdout, *lines(found))
    return 0


@click.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "--cluster", metavar="URL", help="The cluster's dashboard, as http://HOST:8265.  [default: RAY_API_SERVER_ADDRESS]"
)
@click.option("--from-source", is_flag=True, help="Upload this cineray; else the nodes have it installed.")
@click.option("--no-wait", is_flag=True, help="Do not follow the job's log.")
@click.option("--dry-run", is_flag=True, help="Print the command and end.")
@click.argument("render_arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS OF RENDER...")
@click.pass_context
def submit(
    context: click.Context,
    cluster: str | None,
    from_source: bool,
    no_wait: bool,
    dry_run: bool,
    render_arguments: tuple[str, ...],
) -> int:
    """Renders a batch as a job of a Ray cluster: `cineray render`, through `ray job submit`.

    Takes every argument of `cineray render`, which are checked before anything is sent. The job renders with
    --address auto. --out must be an absolute path that every node sees. Submitting the same batch again continues
    it. See docs/ray.md.

    \b
    Examples:
      cineray submit --cluster http://head:8265 --manifest m.jsonl --out /nfs/batch --sp 4 --gangs 2 --device cuda
      cineray submit --from-source --dry-run "a red circle moving left on a navy background" --out /nfs/first
    """
    from cineray.jobs.gangs.submit import Submission, as_text, command, environment
    from cineray.jobs.gangs.submit import submit as submit_batch

    root = context.find_root().command
    assert isinstance(root, click.Group)
    render = root.commands["render"]
    given = render.make_context("render", list(render_arguments), parent=context.parent).params
    submission = Submission(
        address=cluster,
        render=tuple(_without(render, render_arguments)),
        prompts=given["prompts"],
        manifest=given["manifest"],
        negative_prompt=given["negative_prompt"],
        files={
            "--image": _given(given["image"]),
            "--reference-image": given["reference_images"],
            "--control-video": _given(given["control_video"]),
            "--control-mask": _given(given["control_mask"]),
        },
        out=given["out"],
        model=given["model"],
        from_source=from_source,
        no_wait=no_wait,
    )
    if dry_run:
        text = as_text(command(submission, Path("FOLDER")), environment(os.environ))
        write(sys.stdout, printable(text, limit=len(text)) + "\n")
        print_lines(sys.stdout, f"# FOLDER holds the clips as manifest.jsonl: {submission.manifest or 'the prompts'}")
        return 0
    return submit_batch(submission)


def _given(path: Path | None) -> tuple[Path, ...]:
    return () if path is None else (path,)


_APART = ("manifest", "address", "negative_prompt")  # and the prompts, which are no options


def _without(render: click.Command, arguments: tuple[str, ...]) -> list[str]:
    """The arguments less those that travel in other ways."""
    values, _, order = render.make_parser(click.Context(render)).parse_args(list(arguments))
    kept: list[str] = []
    for parameter in dict.fromkeys(order):
        if not isinstance(parameter, click.Option) or parameter.name in _APART:
            continue
        value = values[parameter.name]
        for each in value if parameter.multiple else (value,):
            name = parameter.opts[0] if each is not False else parameter.secondary_opts[0]
            kept += [name] if parameter.is_flag else [name, str(each)]
    return kept
