"""Measurement, bit allocation, the quantizer and the writer of checkpoints."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dbrx_quant.quantize.conversion import Converted, convert
    from dbrx_quant.quantize.options import ConvertOptions

__all__ = ["ConvertOptions", "Converted", "convert"]


def __getattr__(name: str) -> Any:  # late, so that importing the package stays cheap
    if name in __all__:
        from dbrx_quant.quantize import conversion

        return getattr(conversion, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
