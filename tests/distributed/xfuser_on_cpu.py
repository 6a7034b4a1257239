"""Lets xfuser 0.7 run on a CPU with gloo, in a test process: it refuses to import without a GPU.

A finder lets xfuser.envs execute and changes it straight after. Without a GPU build of torch there is no triton
either; a stand-in satisfies the imports, none of its kernels is called.
"""

import importlib.abc
import importlib.util
import sys
import types
from unittest import mock

import torch


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):  # noqa: ARG002  # as the base has it
        if name != "xfuser.envs":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            module.get_device_version = lambda: None
            module.get_torch_distributed_backend = lambda: "gloo"
            module.PACKAGES_CHECKER.packages_info["has_long_ctx_attn"] = True  # gated on a GPU

        spec.loader.exec_module = exec_module
        return spec


def _lse_kernel(query, key, value, dropout_p, is_causal, attention_kwargs=None):  # noqa: ARG001  # as the registry calls it
    """The CPU kernel that also gives the log-sum-exp, which a ring needs."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, is_causal)


def install():
    """Once for a process: a second call changes nothing."""
    if "xfuser" in sys.modules:
        return
    if importlib.util.find_spec("triton") is None:
        for name in ("triton", "triton.language"):
            module = types.ModuleType(name)
            vars(module)["__getattr__"] = lambda attribute: mock.MagicMock(name=attribute)
            module.__path__ = []
            module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            sys.modules[name] = module
    sys.meta_path.insert(0, _Finder())
    import yunchang.globals
    from xfuser.core.distributed import attention_backend, runtime_state
    from xfuser.model_executor.layers import usp

    usp.PROCESS_GROUP = yunchang.globals.PROCESS_GROUP  # None without a GPU
    kinds = attention_backend.AttentionBackendType
    for kind in (kinds.SDPA, kinds.SDPA_FLASH):
        attention_backend.ATTENTION_FUNCTION_REGISTRY[kind] = _lse_kernel
    # it knows that SDPA gives no log-sum-exp; the kernel above does
    check = "_check_if_backend_compatible_with_current_configuration"
    setattr(runtime_state.RuntimeState, check, lambda self, backend: None)
