"""The entry point `vllm.general_plugins`: vLLM calls it in each of its processes, before it reads a model."""
# pyright: reportMissingImports=false


def register() -> None:
    """Make EXL2 known to vLLM as a quantization method. Called again, it changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from dbrx_quant.runtime.model.quantizer import METHOD
    from dbrx_quant.runtime.vllm.config import Exl2Config

    register_quantization_config(METHOD)(Exl2Config)
