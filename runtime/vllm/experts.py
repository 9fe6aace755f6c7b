"""EXL2 for vLLM's routed experts: `Exl2Experts`, one operator call for all experts of a process.

Experts are never cut: each belongs to one process, which adds what its own experts give, and vLLM sums over
the processes. With vLLM's expert parallelism its placement counts; without it, when vLLM believes that every
process has a slice of each expert, they are shared out here, which is the same sum.
"""
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase

from dbrx_quant.runtime.families.facts import ExpertsSpec, LinearSpec
from dbrx_quant.runtime.kernels.bodies import give_body
from dbrx_quant.runtime.model.experts import QuantExperts
from dbrx_quant.runtime.model.linear import QuantLinear
from dbrx_quant.runtime.vllm.opening import Opened, plain_defaults
from dbrx_quant.runtime.vllm.split import expert_table, share


class Exl2Experts(FusedMoEMethodBase):  # type: ignore[misc]
    """The routed experts of one block.

    Args:
        moe: vLLM's configuration of the layer.
        opened: the folder.
        spec: the experts.
    """

    def __init__(self, moe: Any, opened: Opened, spec: ExpertsSpec) -> None:
        super().__init__(moe)
        self.opened = opened
        self.spec = spec

    def create_weights(self, layer: Any, num_experts: int, hidden_size: int, *_: Any, **__: Any) -> None:
        """Compare the sizes; nothing is allocated.

        Raises:
            ValueError: vLLM expects other experts, or weighs them where ours do not.
        """
        hidden = self.spec.linears[0][0].shape[0]
        if (layer.global_num_experts, hidden_size) != (self.spec.count, hidden):
            raise ValueError(
                f"{layer.layer_name}: vLLM expects {layer.global_num_experts} experts of {hidden_size} "
                f"channels, the file has {self.spec.count} of {hidden}"
            )
        if layer.apply_router_weight_on_input:
            raise ValueError(
                f"{layer.layer_name}: weights of experts apply to their outputs, not to their inputs"
            )
        layer.exl2_device = torch.get_default_device()

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the experts of this process."""
        with plain_defaults():
            places = self._places(layer)
            own = [index for index, place in enumerate(places) if place >= 0]
            own.sort(key=places.__getitem__)
            linears = [self.spec.linears[index] for index in own]
            made = [
                (self._linear(layer, g), self._linear(layer, u), self._linear(layer, d))
                for g, u, d in linears
            ]
            layer.exl2 = (
                QuantExperts(made, keys=self.spec.keys, activation=self.spec.activation) if made else None
            )
            alone = len(own) == self.spec.count
            layer.exl2_table = None if alone else expert_table(places).to(layer.exl2_device)

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """What the experts of this process add, [T, D].

        Args:
            layer: the experts.
            x: [T, D].
            topk_weights: [T, A].
            topk_ids: int [T, A], counted over the whole model.
            shared_experts: vLLM's runner adds them.
            shared_experts_input: likewise.
        """
        if layer.exl2 is None:
            return torch.zeros_like(x)
        ids = topk_ids.long()
        if layer.exl2_table is not None:
            ids = layer.exl2_table[ids]
        y: Tensor = layer.exl2(x, ids, topk_weights)
        return y

    def _places(self, layer: Any) -> list[int]:
        """The place of each expert among those of this process, -1 where it is another's."""
        parallel = layer.moe_config.moe_parallel_config
        count = self.spec.count
        if parallel.use_ep:
            return [int(layer._map_global_expert_id_to_local_expert_id(index)) for index in range(count)]
        own = share(count, parallel.tp_rank, parallel.tp_size)
        return [index - own.start if index in own else -1 for index in range(count)]

    def _linear(self, layer: Any, spec: LinearSpec) -> QuantLinear:
        linear = QuantLinear.from_tensors(self.opened.contents.checkpoint.linear(spec.name), spec.shape[1])
        if layer.exl2_device.type != "cpu":
            linear.to(layer.exl2_device)
        elif spec.name in self.opened.bodies:
            give_body(linear.stored(), spec.shape[1], self.opened.bodies[spec.name])
        return linear
