"""The command that makes a folder that renders of files as they were published."""

from pathlib import Path

import click

from cineray.jobs.cli.exit_codes import EXIT_DONE
from cineray.jobs.console.terminal import tell

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("model", type=click.Choice(["open-sora"]))
@click.option("--transformer", type=_FOLDER, metavar="DIR", required=True, help="hpcai-tech/OpenSora-STDiT-v3.")
@click.option("--vae", type=_FOLDER, metavar="DIR", required=True, help="hpcai-tech/OpenSora-VAE-v1.2.")
@click.option(
    "--text-encoder", type=_FOLDER, metavar="DIR", required=True, help="T5 v1.1 XXL's encoder, as safetensors."
)
@click.option("--tokenizer", type=_FOLDER, metavar="DIR", help="T5's.  [default: the text encoder's folder]")
@click.option("--out", type=_FOLDER, metavar="DIR", required=True, help="The folder to make; must not be there.")
def convert(
    model: str,  # noqa: ARG001  # there is one
    transformer: Path,
    vae: Path,
    text_encoder: Path,
    tokenizer: Path | None,
    out: Path,
) -> int:
    """Makes a diffusers folder of downloaded files, for `--model DIR`.

    Weights are read from safetensors alone; .pt and .bin files are refused. Text encoder and tokenizer are copied.

    \b
    Example:
      cineray models convert open-sora --transformer OpenSora-STDiT-v3 --vae OpenSora-VAE-v1.2 \\
          --text-encoder t5/text_encoder --tokenizer t5/tokenizer --out open-sora
    """
    from cineray.pipeline.loading.convert_open_sora import convert_open_sora

    convert_open_sora(transformer, vae, text_encoder, tokenizer or text_encoder, out)
    tell(f"made {out}; render with --model {out}")
    return EXIT_DONE
