"""A transformer whose blocks are read one at a time, when each is asked for.

Ranks that share its weights keep a part of every block. Read this way none of them ever has the whole in its memory,
and the disk is read once for all ranks of a machine, whose files' pages they share.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cineray.pipeline.adapters.component import Component
from cineray.pipeline.loading.errors import loading_errors
from cineray.pipeline.loading.loaded_weights import check_finite
from cineray.pipeline.loading.weight_header import tensor_files


@dataclass(frozen=True, kw_only=True, slots=True)
class UnreadBlocks:
    """
    Args:
        transformer: in memory but for its blocks, whose tensors are on the meta device.
        folder: of its files.
        files: tensor -> the file that holds it.
        dtypes: tensor -> what it is computed in, which diffusers says.
        checkpoint_name: for errors.
    """

    transformer: Any
    folder: Path
    files: Mapping[str, Path]
    dtypes: Mapping[str, torch.dtype]
    checkpoint_name: str

    def read(self, block: str) -> None:
        """Reads a block of the transformer into host memory.

        Args:
            block: its name in the transformer, as `blocks.7`.

        Raises:
            InputError: it cannot be read, or holds values that are not finite; LoadingError where that tells of this
                machine.
        """
        with loading_errors(self.checkpoint_name, self.folder):
            self.fill(name for name in self.files if name.startswith(f"{block}."))
            check_finite({f"{self.folder.name}.{block}": self.transformer.get_submodule(block)})

    def fill(self, names: Iterable[str]) -> None:
        """Reads these tensors."""
        from accelerate.utils import set_module_tensor_to_device
        from safetensors import safe_open

        in_files: dict[Path, list[str]] = defaultdict(list)
        for name in names:
            if name in self.dtypes:  # files may hold more, which diffusers passes over
                in_files[self.files[name]].append(name)
        for file, held in in_files.items():
            with safe_open(file, framework="pt", device="cpu") as weights:
                for name in held:
                    value = weights.get_tensor(name).to(self.dtypes[name])
                    set_module_tensor_to_device(self.transformer, name, "cpu", value=value, dtype=value.dtype)


def open_blocks(
    component: Component, kind: str, folder: Path, dtype: torch.dtype, lists: tuple[str, ...], checkpoint_name: str
) -> UnreadBlocks:
    """Builds a transformer of diffusers' without its blocks' weights, and reads the rest of it.

    Args:
        kind: its class.
        dtype: asked for; what a class keeps in float32 stays so.
        lists: names of the lists that its blocks are in.

    Raises:
        OSError, ValueError: of diffusers and safetensors, where files cannot be read.
    """
    from accelerate import init_empty_weights

    model_class = component.class_named(kind)
    with init_empty_weights(include_buffers=False):  # tables that no file has are made here
        transformer = model_class.from_config(model_class.load_config(folder, local_files_only=True)).eval()
    typed = model_class.from_pretrained(
        folder, device_map={"": "meta"}, dtype=dtype, use_safetensors=True, local_files_only=True
    )
    blocks = UnreadBlocks(
        transformer=transformer,
        folder=folder,
        files=tensor_files(folder, component.weights or ""),
        dtypes={name: tensor.dtype for name, tensor in typed.state_dict().items()},
        checkpoint_name=checkpoint_name,
    )
    blocks.fill(name for name in blocks.files if name.partition(".")[0] not in lists)
    return blocks
