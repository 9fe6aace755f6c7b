"""The EXL2 format, checkpoints, operators and models that run quantized weights.

Importing this package lets `from_pretrained` of transformers' auto classes load EXL2 folders.
"""

from typing import TYPE_CHECKING, Any

from dbrx_quant.runtime.model.registration import register_when_needed

if TYPE_CHECKING:
    from dbrx_quant.runtime.exl2.format import dequantize_linear
    from dbrx_quant.runtime.model.load import load_model

__all__ = ["dequantize_linear", "load_model"]

register_when_needed()


def __getattr__(name: str) -> Any:  # late, so that importing the package stays cheap
    if name == "load_model":
        from dbrx_quant.runtime.model.load import load_model

        return load_model
    if name == "dequantize_linear":
        from dbrx_quant.runtime.exl2.format import dequantize_linear

        return dequantize_linear
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
