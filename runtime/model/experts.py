"""The routed experts of one block over packed weights, as one operator call: `QuantExperts`.

Axes: T tokens, E experts, D hidden, A experts per token.
"""

from collections.abc import Collection, Sequence

from torch import Tensor, nn

from dbrx_quant.runtime.exl2.format import SUFFIXES
from dbrx_quant.runtime.hybrid.crossing import experts_sum, numbering
from dbrx_quant.runtime.kernels.activations import activation_name
from dbrx_quant.runtime.kernels.ops import experts_op
from dbrx_quant.runtime.kernels.stored import StoredList
from dbrx_quant.runtime.model.linear import QuantLinear

host_experts_op = experts_op  # by the device of its tensors; a name of its own, for tests


class _Expert(nn.Module):
    """The three linears of one expert, under their names in the file."""


class QuantExperts(nn.Module):
    """Sum over a token's experts of weight * down(activation(gate(x)) * up(x)), as transformers' experts do.

    The linears are children `<expert>.<key>`, so buffers are named as in the file: `3.w1.q_weight`. Some of
    the experts may stay on the host (`leave_on_host`), which computes them while the device computes others.

    Args:
        linears: (gate, up, down) of each expert; no biases.
        keys: their names in the file, in this order.
        activation: as a transformers configuration names it.
    """

    device_numbers: Tensor

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
        self.host_experts: tuple[int, ...] = ()
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

    def leave_on_host(self, experts: Collection[int]) -> None:
        """Have these experts stay on the host, and be computed there, wherever the module is moved."""
        self.host_experts = tuple(sorted(experts))
        self.device_experts = tuple(sorted({*range(self.num_experts)} - {*experts}))
        for expert in self.host_experts:
            for key in self.keys:
                self.linear(expert, key).stay_on_host()
        self.host_numbers = numbering(self.num_experts, self.host_experts)  # an attribute stays as well
        numbers = numbering(self.num_experts, self.device_experts)
        self.register_buffer("device_numbers", numbers, persistent=False)

    def stored(self, key: str, experts: Sequence[int] | None = None) -> StoredList:
        """The linear `key` of these experts; of all by default."""
        own = self._modules
        tensors: list[Tensor] = []
        for expert in own.values() if experts is None else [own[str(index)] for index in experts]:
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
        states = hidden_states.reshape(-1, hidden_states.shape[-1])
        if self.host_experts:
            device_share = self._device_share if self.device_experts else None
            numbers = self.host_numbers
            y = experts_sum(states, top_k_index, top_k_weights, device_share, self._host_share, numbers)
        else:
            gate, up, down = (self.stored(key).tensors for key in self.keys)
            y = experts_op(states, top_k_index, top_k_weights, gate, up, down, self.activation)
        return y.view(hidden_states.shape)

    def _device_share(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        own = (self.stored(key, self.device_experts).tensors for key in self.keys)
        y: Tensor = experts_op(x, self.device_numbers[index], weights, *own, self.activation)
        return y

    def _host_share(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        own = (self.stored(key, self.host_experts).tensors for key in self.keys)
        y: Tensor = host_experts_op(x, index, weights, *own, self.activation)
        return y

    def extra_repr(self) -> str:
        where = f", {len(self.host_experts)} on the host" if self.host_experts else ""
        sizes = f"{self.hidden_size} by {self.ffn_hidden_size}"
        return f"{self.num_experts} experts of {sizes}, {self.activation}{where}"
