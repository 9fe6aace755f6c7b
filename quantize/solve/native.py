"""The solver's C functions (csrc/include/dbrxq.h, "Solver") as functions of tensors.

Axes: K input channels in packed order, N output channels, G groups. Tensors are contiguous CPU tensors of the
dtypes named; the callers in `grid` and `ldlq` see to that and to finite values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dbrx_quant.runtime.library import _native


def _call(name: str, *arguments: int | None) -> None:
    _native.check(getattr(_native.library(), name)(*arguments), name)


def _address(tensor: Tensor | None, dtype: torch.dtype = torch.float32) -> int | None:
    if tensor is None:
        return None
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise TypeError(
            f"expected a contiguous {dtype} on the CPU, got {tensor.dtype} {tuple(tensor.stride())}"
        )
    return tensor.data_ptr()


def search_group(
    x: Tensor, bits: int, row_weights: Tensor, column_weights: Tensor | None
) -> tuple[Tensor, Tensor, float]:
    """dbrxq_search_group: (scale_max fp16 scalar, scale_codes [N] uint8, error) of x [rows, N]."""
    rows, n = x.shape
    scale_max = torch.empty((), dtype=torch.float16)
    scale_codes = torch.empty(n, dtype=torch.uint8)
    error = torch.empty((), dtype=torch.float64)
    _call(
        "dbrxq_search_group",
        _address(x),
        rows,
        n,
        bits,
        _address(row_weights),
        _address(column_weights),
        _address(scale_max, torch.float16),
        _address(scale_codes, torch.uint8),
        _address(error, torch.float64),
    )
    return scale_max, scale_codes, error.item()


def error_table(
    weight: Tensor, pivots: Tensor, column_weights: Tensor | None, bits: Sequence[int], group_rows: int
) -> Tensor:
    """dbrxq_error_table: [len(bits), ceil(K / group_rows)] float64."""
    k, n = weight.shape
    widths = torch.tensor(bits, dtype=torch.int64)
    errors = torch.empty(len(bits), -(-k // group_rows), dtype=torch.float64)
    _call(
        "dbrxq_error_table",
        _address(weight),
        k,
        n,
        _address(pivots),
        _address(column_weights),
        _address(widths, torch.int64),
        len(bits),
        group_rows,
        _address(errors, torch.float64),
    )
    return errors


def solve_block(
    weight: Tensor,
    coefficients: Tensor,
    pivots: Tensor,
    column_weights: Tensor | None,
    bits: Sequence[int],
    rows: Sequence[int],
    effort: int,
    errors: Tensor,
    codes: Tensor,
    scale_codes: Tensor,
    scale_max: Tensor,
    dequantized: Tensor,
    loss: Tensor,
) -> None:
    """dbrxq_solve_block: rounds a block of groups into the output tensors; see the header for each."""
    group_bits, group_rows = torch.tensor(bits, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64)
    _call(
        "dbrxq_solve_block",
        _address(weight),
        *weight.shape,
        _address(coefficients),
        _address(pivots),
        _address(column_weights),
        _address(group_bits, torch.int64),
        _address(group_rows, torch.int64),
        len(bits),
        effort,
        _address(errors),
        _address(codes, torch.uint8),
        _address(scale_codes, torch.uint8),
        _address(scale_max, torch.float16),
        _address(dequantized, torch.float16),
        _address(loss, torch.float64),
    )
