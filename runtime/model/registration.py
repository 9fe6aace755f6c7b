"""Registers EXL2 with transformers: at once if its quantizers are loaded already, else as soon as they are.

`import dbrx_quant.runtime` has to be enough for `from_pretrained` to load EXL2, but most of what imports it
(the command, the converter's workers) never loads a model, and importing transformers' quantizers takes
seconds. So their module is watched for in the import system.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_WATCHED = "transformers.quantizers.auto"
_REGISTERING = "dbrx_quant.runtime.model.quantizer"


def register_when_needed() -> None:
    """Register the EXL2 quantizer before transformers can load a model."""
    if _WATCHED in sys.modules:
        importlib.import_module(_REGISTERING)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds the watched module as the other finders do, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module(_REGISTERING)
