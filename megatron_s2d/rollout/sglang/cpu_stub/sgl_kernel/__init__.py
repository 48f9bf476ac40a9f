"""Stands for SGLang's compiled CUDA kernels in a server process on a machine without a GPU.

The published kernels need the CUDA driver to be imported, and SGLang imports them everywhere, but on a CPU with the
``torch_native`` attention it calls none of them. So every name resolves, whatever the submodule, and raises when it is
called: what would need a kernel stops with its name instead of computing something else. ``server.py`` puts this
folder on the path of servers on a CPU only; nothing else imports it.
"""

import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.4.5"  # of the kernels that SGLang 0.5.17 asks for


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
    """Finds every submodule that is not a file here, and makes it empty."""

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
        """Nothing to run."""


__getattr__ = _attributes_of(__name__)
sys.meta_path.append(_Submodules())  # after the finders of files, so that scalar_type.py is found
