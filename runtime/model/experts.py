"""The routed experts of one block over packed weights, as one operator call: `QuantExperts`.

Axes: T tokens, E experts, D hidden, A experts per token.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.kernels.activations import activation_name
from dbrx_quant.runtime.kernels.ops import experts_op
from dbrx_quant.runtime.kernels.stored import StoredList
from dbrx_quant.runtime.model.linear import QuantLinear

# Names in transformers' configurations to the operators' names.


class _Expert(nn.Module):
    """The three linears of one expert, under their names in the file."""


class QuantExperts(nn.Module):
    """Sum over a token's experts of weight * down(activation(gate(x)) * up(x)), as transformers' experts do.

    The linears are children `<expert>.<key>`, so buffers are named as in the file: `3.w1.q_weight`.

    Args:
        linears: (gate, up, down) of each expert; no biases.
        keys: their names in the file, in this order.
        activation: as a transformers configuration names it.
    """

    def __init__(
        self,
        linears: Sequence[tuple[QuantLinear, QuantLinear, QuantLinear]],
        *,
        keys: tuple[str, str, str] = ("w1", "v1", "w2"),
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if not linears:
            raise ValueError("a block of experts needs at least one")
        self.num_experts = len(linears)
        self.hidden_size = linears[0][0].in_features
        self.ffn_hidden_size = linears[0][0].out_features
        self.keys = keys
        self.activation = activation_name(activation)
        for index, (gate, up, down) in enumerate(linears):
            shapes = [(linear.in_features, linear.out_features) for linear in (gate, up, down)]
            hidden, ffn = self.hidden_size, self.ffn_hidden_size
            if shapes != [(hidden, ffn), (hidden, ffn), (ffn, hidden)]:
                raise ValueError(
                    f"expert {index}: {keys} have (in, out) {shapes}, expert 0 is {hidden} by {ffn}"
                )
            if any(linear.bias is not None for linear in (gate, up, down)):
                raise ValueError(f"expert {index}: a linear has a bias; experts have none")
            expert = _Expert()
            for key, linear in zip(keys, (gate, up, down), strict=True):
                expert.add_module(key, linear)
            self.add_module(str(index), expert)

    def linear(self, expert: int, key: str) -> QuantLinear:
        """The linear `key` of an expert."""
        found = self.get_submodule(f"{expert}.{key}")
        assert isinstance(found, QuantLinear)
        return found

    def stored(self, key: str) -> StoredList:
        """The linear `key` of every expert."""
        tensors: list[Tensor] = []
        for expert in self._modules.values():
            assert expert is not None
            linear = expert._modules[key]
            assert linear is not None
            stored = linear._buffers  # not by attribute: 240 lookups a call would cost more than the call
            for suffix in SUFFIXES:
                tensor = stored[suffix]
                assert tensor is not None
                tensors.append(tensor)
        return StoredList(tensors)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The experts' output, in the shape and dtype of hidden_states.

        Args:
            hidden_states: [..., D], T tokens in all.
            top_k_index: [T, A] int64; the value E means "no expert" and adds nothing.
            top_k_weights: [T, A].
        """
        gate, up, down = (self.stored(key).tensors for key in self.keys)
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        y: Tensor = experts_op(states, top_k_index, top_k_weights, gate, up, down, self.activation)
        return y.view(hidden_states.shape)

    def extra_repr(self) -> str:
        return (
            f"{self.num_experts} experts of {self.hidden_size} by {self.ffn_hidden_size}, {self.activation}"
        )
