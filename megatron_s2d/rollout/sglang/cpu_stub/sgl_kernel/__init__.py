"""Stub of SGLang's compiled CUDA kernels for servers on a machine without a GPU.

Importing the published kernels needs the CUDA driver, and SGLang imports them everywhere, but on a CPU with the
``torch_native`` attention it calls none of them. So every name of every submodule resolves, and raises when it is
called: code that needs a kernel stops with its name instead of computing something else. ``server.py`` adds this
folder to the path of servers on a CPU only; nothing else imports it.

It also lets SGLang record the experts of tokens (``--enable-return-routed-experts``) and compute LoRA adapters with
``--lora-backend torch_native``: both use pinned memory, which only a machine with a GPU has, so other memory is used
where pinned memory is asked for.
"""

import importlib.abc
import importlib.machinery
import sys
import types

import torch

__version__ = "0.4.5"  # that SGLang 0.5.17 requires


class _Absent:
    """A kernel; calling it is an error."""

    def __init__(self, name: str):
        self._name = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self._name} is a CUDA kernel, and this server runs on a CPU")


def _attributes_of(module: str):
    def attribute(name: str) -> _Absent:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{module}.{name}")

    return attribute


class _Submodules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Creates an empty module for every submodule that is not a file here."""

    def find_spec(self, name, path, target=None):
        if name.startswith(__name__ + "."):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _attributes_of(spec.name)
        return module

    def exec_module(self, module):
        """Do nothing: the module is empty."""


_zeros, _tensor = torch.zeros, torch.tensor


def _zeros_without_pinning(*size, pin_memory: bool = False, **options) -> torch.Tensor:
    return _zeros(*size, **options)


def _tensor_without_pinning(data, *, pin_memory: bool = False, **options) -> torch.Tensor:
    return _tensor(data, **options)


torch.zeros, torch.tensor = _zeros_without_pinning, _tensor_without_pinning
torch.Tensor.pin_memory = lambda tensor, device=None: tensor
__getattr__ = _attributes_of(__name__)
sys.meta_path.append(_Submodules())  # after the finders of files, so that scalar_type.py is found
