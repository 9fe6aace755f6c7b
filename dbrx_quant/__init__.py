"""EXL2 quantization of mixture-of-experts language models, DBRX first, and a runtime for the results."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbrx_quant.quantize.conversion import Converted, convert
    from dbrx_quant.quantize.options import ConvertOptions
    from dbrx_quant.runtime.model.load import load_model

__all__ = ["ConvertOptions", "Converted", "convert", "load_model"]

_HOMES = {
    "ConvertOptions": "dbrx_quant.quantize.options",
    "Converted": "dbrx_quant.quantize.conversion",
    "convert": "dbrx_quant.quantize.conversion",
    "load_model": "dbrx_quant.runtime",
}


def __getattr__(name: str) -> Any:  # late, so that importing the package stays cheap
    if name == "__version__":
        from importlib.metadata import version

        return version("dbrx-quant")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
