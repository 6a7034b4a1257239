"""Leaves modules out of a forward whose blocks do not run: those whose output nothing but the blocks reads."""

from typing import Any

import torch
from torch import nn


class UnreadModules:
    """Stand-ins for modules of one transformer, which stand in their place between `leave_out` and `put_back`.

    Args:
        paths: of the modules; one that this transformer has not is left alone.
    """

    def __init__(self, transformer: nn.Module, paths: tuple[str, ...]) -> None:
        self._transformer = transformer
        self._paths = paths
        self._zeros: dict[tuple[Any, ...], Any] = {}  # (branch, path, shapes of its inputs) -> what it would give
        self._replaced: list[tuple[dict[str, Any], str, nn.Module]] = []  # (where the module belongs, its name, it)

    def leave_out(self, branch: str) -> None:
        for path in self._paths:
            parent, _, name = path.rpartition(".")
            modules = self._transformer.get_submodule(parent)._modules
            module = modules.get(name)
            if module is not None:
                self._replaced.append((modules, name, module))
                modules[name] = _Zeros(module, (branch, path), self._zeros)

    def put_back(self) -> None:
        for modules, name, module in self._replaced:
            if isinstance(modules.get(name), _Zeros):  # else someone has put another one there
                modules[name] = module
        self._replaced.clear()

    def forget(self) -> None:
        self._zeros.clear()


class _Zeros(nn.Module):
    """Gives zeros, which take no memory, in the shape of what a module gives; the first time it asks the module."""

    def __init__(self, module: nn.Module, place: tuple[str, str], known: dict[tuple[Any, ...], Any]) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple: not one of its modules
        self._place = place
        self._known = known

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        shapes = (value.shape for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        key = (*self._place, *shapes)
        if key not in self._known:
            self._known[key] = _zeros_like(self._module[0](*args, **kwargs))
        return self._known[key]


def _zeros_like(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.new_zeros(()).expand(output.shape)
    return tuple(map(_zeros_like, output))
