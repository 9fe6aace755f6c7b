"""EXL2 as a quantization method of vLLM: `Exl2Config`, which says what runs each of its layers.

vLLM's own classes build the model. What is stored in 16 bits comes through vLLM's loader, under the names
that its classes know; linears and experts are built from the checked contents of the folder.
"""
# pyright: reportMissingImports=false, reportCallIssue=false

import re
from pathlib import Path
from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.folder.contents import DERIVED
from dbrx_quant.runtime.folder.find import find_folder
from dbrx_quant.runtime.model.quantizer import METHOD
from dbrx_quant.runtime.vllm.experts import Exl2Experts
from dbrx_quant.runtime.vllm.linear import Exl2Linear
from dbrx_quant.runtime.vllm.opening import Opened, open_folder

_PACKED = re.compile("|".join(re.escape(f".{s.removeprefix('.')}") + "$" for s in (*SUFFIXES, *DERIVED)))
_LEAST_CAPABILITY = 80  # of the CUDA kernels


class Exl2Config(QuantizationConfig):  # type: ignore[misc]
    """The quantization of one model; vLLM's worker processes get a copy, and open the folder themselves."""

    _ignore_unexpected_suffixes = ()  # vLLM's own has `.q_scale`, which is a tensor of the format

    def __init__(self) -> None:
        super().__init__()
        self.folder: Path | None = None

    def get_name(self) -> str:
        """As `quant_method` in config.json has it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Types of activations."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of GPUs."""
        return _LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: config.json has all there is."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "Exl2Config":
        """Whatever the keys say: what is quantized and how follows from the tensors."""
        return cls()

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the folder and check it, in the process that the user looks at.

        Raises:
            CheckpointError: as `open_folder`.
        """
        self.folder = find_folder(model_name, revision)
        open_folder(self.folder)

    def get_cache_scale_mapper(self) -> WeightsMapper:
        """The names of stored tensors for vLLM; without it, vLLM takes `q_scale` for a scale of its cache."""
        names = self._opened().names
        return WeightsMapper(orig_to_new_regex={_PACKED: None}, orig_to_new_prefix=names)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """What runs a layer; None: vLLM's own, for what is no linear, and a dense head.

        Raises:
            ValueError: the layer is nothing that the file has, or LoRA is asked for.
        """
        opened = self._opened()
        contents, places = opened.contents, opened.places
        if isinstance(layer, RoutedExperts):
            experts = places.experts(prefix)
            if experts is None:
                raise ValueError(f"{prefix}: vLLM has experts where the file has none")
            return Exl2Experts(layer.moe_config, opened, experts)
        if isinstance(layer, ParallelLMHead):
            head = contents.architecture.head
            return Exl2Linear(opened, (head,)) if contents.is_quantized(head) else None
        if isinstance(layer, LinearBase):
            if linears := places.linears(prefix, self.packed_modules_mapping):
                return Exl2Linear(opened, linears)
            if not places.stays_dense(prefix):
                raise ValueError(f"{prefix}: vLLM has a {type(layer).__name__} where the file has no linear")
            return UnquantizedLinearMethod()
        return None

    def _opened(self) -> Opened:
        """The folder; the first layer that asks has what vLLM goes by set right."""
        if self.folder is None:
            raise RuntimeError("the quantization has no folder yet: vLLM did not call maybe_update_config")
        opened = open_folder(self.folder)
        config = get_current_vllm_config()
        if config.lora_config is not None:
            raise ValueError("adapters (LoRA) do not work with EXL2: they need linears of dense weights")
        contents = opened.contents
        if contents.architecture.tied and contents.is_quantized(contents.architecture.head):
            # The head is a linear of its own, beside the 16-bit embedding that the original shared with it.
            for described in (config.model_config.hf_config, config.model_config.hf_text_config):
                described.tie_word_embeddings = False
        return opened
