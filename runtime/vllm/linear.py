"""EXL2 for vLLM's linear layers and its head: `Exl2Linear`.

Axes: K input channels, N output channels.

The weights come from the checked contents of the folder, not through vLLM's loader: vLLM streams tensors to
where it believes that they belong, before anybody has looked at them, and knows no shapes that follow from a
file. With several processes each computes some columns. Where vLLM cuts the rows (the linear behind an
attention or an activation), a process gathers the whole input, computes its share of the columns and leaves
the others zero: the sum that vLLM makes of all results puts them together, exactly.
"""
# pyright: reportMissingImports=false

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearMethodBase, QKVParallelLinear, RowParallelLinear

from dbrx_quant.runtime.families.facts import LinearSpec, load_linear
from dbrx_quant.runtime.kernels.bodies import give_body
from dbrx_quant.runtime.model.linear import FusedLinear, QuantLinear
from dbrx_quant.runtime.vllm.opening import Opened, plain_defaults
from dbrx_quant.runtime.vllm.split import column_share, cut_columns


class _Trimmed(nn.Module):
    """A linear without its first columns, which are there because columns are cut in units of 32."""

    def __init__(self, linear: QuantLinear, leading: int) -> None:
        super().__init__()
        self.linear = linear
        self.leading = leading
        self.in_features = linear.in_features
        self.out_features = linear.out_features - leading

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)[..., self.leading :]
        return y


class Exl2Linear(LinearMethodBase):  # type: ignore[misc]
    """The linears that one layer of vLLM holds.

    Args:
        opened: the folder.
        specs: the linears, in the order of the layer's outputs.
    """

    def __init__(self, opened: Opened, specs: tuple[LinearSpec, ...]) -> None:
        super().__init__()
        self.opened = opened
        self.specs = specs

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Note the widths of the layer's parts; nothing is allocated."""
        inputs = {spec.shape[0] for spec in self.specs}
        if inputs != {input_size} or len(output_partition_sizes) != len(self.specs):
            raise ValueError(
                f"{layer.prefix}: vLLM's layer has {input_size} inputs and {len(output_partition_sizes)} "
                f"parts, the file has {' and '.join(f'{s.name} {s.shape}' for s in self.specs)}"
            )
        layer.exl2_widths = list(output_partition_sizes)
        layer.exl2_device = torch.get_default_device()
        layer.exl2_dtype = params_dtype

    def process_weights_after_loading(self, layer: Any) -> None:
        """Build the linears of this process, and fill the layer's bias."""
        with plain_defaults():
            spans = self._spans(layer)
            parts = {
                spec.name.rpartition(".")[2]: self._part(layer, spec, *span)
                for spec, span in zip(self.specs, spans, strict=True)
            }
            layer.exl2 = FusedLinear(parts) if len(parts) > 1 else next(iter(parts.values()))
            layer.exl2_zeros = self._zeros(layer, spans)
            self._fill_bias(layer, spans)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The outputs [..., N of this layer] of x [..., K of this layer]."""
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            x = tensor_model_parallel_all_gather(x)
        y: Tensor = layer.exl2(x)
        if layer.exl2_zeros is not None:
            y = functional.pad(y, layer.exl2_zeros)
        return y if bias is None else y + bias

    def _spans(self, layer: Any) -> list[tuple[int, int]]:
        """The columns [begin, end) of each linear that this process computes.

        Raises:
            ValueError: it would compute none of a linear, or vLLM expects another width.
        """
        rank, ranks = layer.tp_rank, layer.tp_size
        if isinstance(layer, RowParallelLinear):
            return [column_share(self.specs[0].shape[1], rank, ranks)]
        spans = []
        for index, (spec, width) in enumerate(zip(self.specs, layer.exl2_widths, strict=True)):
            shared = (
                isinstance(layer, QKVParallelLinear) and index > 0
            )  # heads that several processes compute
            position = rank // layer.num_kv_head_replicas if shared else rank
            begin = position * width
            end = min(begin + width, spec.shape[1])  # vLLM pads its head
            if end <= begin:
                raise ValueError(
                    f"{spec.name}: {spec.shape[1]} columns are too few for {ranks} processes; "
                    "use fewer, --tensor-parallel-size"
                )
            if end - begin != width and spec.role != "head":
                raise ValueError(
                    f"{spec.name}: {spec.shape[1]} columns; vLLM expects more, {width} of them here"
                )
            spans.append((begin, end))
        return spans

    def _zeros(self, layer: Any, spans: list[tuple[int, int]]) -> tuple[int, int] | None:
        """How many zeros come before and after the columns of this process; None: none anywhere."""
        if len(spans) > 1:
            return None
        ((begin, end),), (width,) = spans, layer.exl2_widths
        before = begin if isinstance(layer, RowParallelLinear) else 0
        after = width - before - (end - begin)
        return (before, after) if before or after else None

    def _part(self, layer: Any, spec: LinearSpec, begin: int, end: int) -> Any:
        """The module of some columns of a linear."""
        contents, device = self.opened.contents, layer.exl2_device
        if not contents.is_quantized(spec):
            weight = load_linear(contents.checkpoint, spec)[begin:end]
            dense = nn.Linear(spec.shape[0], end - begin, bias=False, device="meta")
            dense.weight = nn.Parameter(weight.to(device, layer.exl2_dtype).contiguous(), requires_grad=False)
            return dense
        tensors, leading = cut_columns(contents.checkpoint.linear(spec.name), begin, end)
        linear = QuantLinear.from_tensors(tensors, end - begin + leading)
        if device.type != "cpu":
            linear.to(device)
        elif (begin, end) == (0, spec.shape[1]) and not spec.bias and spec.name in self.opened.bodies:
            give_body(linear.stored(), end, self.opened.bodies[spec.name])
        return _Trimmed(linear, leading) if leading else linear

    def _fill_bias(self, layer: Any, spans: list[tuple[int, int]]) -> None:
        """Put what the file has into the layer's bias [N], and zero where it has none.

        Raises:
            ValueError: the file has one, and vLLM's layer none.
        """
        bias = getattr(layer, "bias", None)
        biased = [spec.name for spec in self.specs if spec.bias]
        if bias is None:
            if biased:
                raise ValueError(
                    f"{layer.prefix}: vLLM's layer has no bias, but the file has one of {biased[0]}"
                )
            return
        whole = isinstance(layer, RowParallelLinear)  # added by one process, to the sum of all columns
        bias.data.zero_()
        start = 0
        for spec, (begin, end), width in zip(self.specs, spans, layer.exl2_widths, strict=True):
            if spec.bias:
                first, last = (0, spec.shape[1]) if whole else (begin, end)
                stored = self.opened.contents.checkpoint.load(f"{spec.name}.bias")
                bias.data[start : start + last - first].copy_(stored[first:last])
            start += width
