"""The EXL2 format of one quantized linear: its tensors, their rules, packing and exact dequantization.

Axes: K input channels, N output channels (stored: a multiple of 32), G groups, R word rows.

    q_weight     I32 [R, N]     codes, a little-endian bit stream running down each column, group by group
    q_scale      I32 [G, N/8]   4-bit scale codes, eight columns a word, column 0 lowest
    q_scale_max  F16 [G]        the scale of code 15 in each group
    q_groups     I16 [2 G]      (bits, first word row) of each group
    q_invperm    I32 [K]        packed row in which each input channel sits
    bias         F16 [N]        only where the linear has one

A group is a run of packed rows with one bit width; widths never increase along the rows. A weight is

    m = half(q_scale_max / 256);  s = half((scale_code + 1)^2 * m);  w = half((code - 2^(bits-1)) * s)

with each of the three products rounded to the nearest half, subnormals kept: folding them gives other bits.
Everything here is plain torch and numpy and is the reference that the native kernels are held against.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dbrx_quant.runtime.files.errors import CheckpointError

WIDTHS = (8, 6, 5, 4, 3, 2)
COLUMN_MULTIPLE = 32
ROW_MULTIPLE = 32
TAIL_ROWS = 16  # a last group of 2 bits may end on half a unit: 16 codes fill a word

TENSORS = {  # dtype and dimensions of each
    "q_weight": (torch.int32, 2),
    "q_scale": (torch.int32, 2),
    "q_scale_max": (torch.float16, 1),
    "q_groups": (torch.int16, 1),
    "q_invperm": (torch.int32, 1),
    "bias": (torch.float16, 1),
}
SUFFIXES = tuple(name for name in TENSORS if name != "bias")


@dataclass(frozen=True)
class Group:
    """A run of packed rows that share a bit width, a maximum and one scale code per column."""

    bits: int
    rows: int

    @property
    def word_rows(self) -> int:
        """Rows of `q_weight` that the group fills."""
        return self.rows * self.bits // 32


GroupMap = tuple[Group, ...]


@dataclass(frozen=True)
class UnpackedLinear:
    """A quantized linear with one array element per code.

    Attributes:
        codes: [K, N] uint8, in packed row order; the signed value is `code - 2^(bits-1)`.
        scale_codes: [G, N] uint8, 0 to 15.
        scale_max: [G] float16.
        groups: the G groups in row order.
        permutation: [K] int64; packed row i holds input channel `permutation[i]`.
        bias: [N] float16 or None.
    """

    codes: Tensor
    scale_codes: Tensor
    scale_max: Tensor
    groups: GroupMap
    permutation: Tensor
    bias: Tensor | None = None


def uniform_groups(k: int, bits: int, rows: int) -> GroupMap:
    """K rows at one bit width in groups of `rows`, the last one shorter if K is not a multiple."""
    return tuple(Group(bits, min(rows, k - start)) for start in range(0, k, rows))


def check_groups(groups: Sequence[Group], k: int) -> None:
    """Raise ValueError unless the groups are legal for K packed rows."""
    if not groups:
        raise ValueError("a group map needs at least one group")
    previous = WIDTHS[0]
    for index, group in enumerate(groups):
        if group.bits not in WIDTHS:
            raise ValueError(
                f"group {index}: {group.bits} bits; the format allows {', '.join(map(str, WIDTHS))}"
            )
        if group.bits > previous:
            raise ValueError(f"group {index}: {group.bits} bits follow {previous}; widths must not increase")
        last = index == len(groups) - 1
        multiple = TAIL_ROWS if last and group.bits == 2 else ROW_MULTIPLE
        if group.rows <= 0 or group.rows % multiple:
            raise ValueError(f"group {index}: {group.rows} rows is not a positive multiple of {multiple}")
        previous = group.bits
    total = sum(group.rows for group in groups)
    if total != k:
        raise ValueError(f"the groups cover {total} rows, the matrix has {k}")


def group_overhead(n: int) -> int:
    """Bits that a group takes on disk besides its codes, with N stored columns."""
    return 4 * n + 16 + 2 * 16  # scale codes, maximum, group table entry


def group_bits(group: Group, n: int) -> int:
    """Bits that a group takes on disk with N stored columns."""
    return group.rows * group.bits * n + group_overhead(n)


def storage_bits(groups: Sequence[Group], shape: tuple[int, int], bias: bool = False) -> int:
    """Bits that a linear takes on disk, every tensor counted.

    Args:
        groups: its group map.
        shape: (K, N), N as stored (a multiple of 32).
        bias: whether a bias is stored.
    """
    k, n = shape
    return sum(group_bits(group, n) for group in groups) + 32 * k + (16 * n if bias else 0)


def padded_columns(n: int) -> int:
    """N as stored: rounded up to a multiple of 32."""
    return -(-n // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def _sections(groups: Sequence[Group]) -> Iterator[tuple[int, int, int, int, int]]:
    """Runs of equal width, unbroken streams of codes: (bits, first row, rows, first word row, word rows)."""
    row = word = 0
    for bits in WIDTHS:
        rows = sum(group.rows for group in groups if group.bits == bits)
        if rows:
            words = rows * bits // 32
            yield bits, row, rows, word, words
            row, word = row + rows, word + words


def pack_codes(codes: Tensor, groups: Sequence[Group]) -> Tensor:
    """Pack codes [K, N] uint8 into words [R, N] int32; 32 rows of b-bit codes fill b words of each column."""
    source = codes.numpy()
    n = source.shape[1]
    words = np.zeros((sum(group.word_rows for group in groups), n), np.uint32)
    for bits, row, rows, word, count in _sections(groups):
        units = -(-rows // 32)
        unit_codes = np.zeros((units, 32, n), np.uint32)
        unit_codes.reshape(units * 32, n)[:rows] = source[row : row + rows]
        unit_words = np.zeros((units, bits, n), np.uint32)
        for r in range(32):
            index, shift = divmod(r * bits, 32)
            unit_words[:, index] |= unit_codes[:, r] << np.uint32(shift)
            if shift + bits > 32:  # the high bits of a straddling code open the next word
                unit_words[:, index + 1] |= unit_codes[:, r] >> np.uint32(32 - shift)
        words[word : word + count] = unit_words.reshape(units * bits, n)[:count]
    return torch.from_numpy(words.view(np.int32))


def unpack_codes(q_weight: Tensor, groups: Sequence[Group]) -> Tensor:
    """Codes [K, N] uint8 in packed row order from words [R, N] int32."""
    words = q_weight.contiguous().numpy().view(np.uint32)
    n = words.shape[1]
    codes = np.empty((sum(group.rows for group in groups), n), np.uint8)
    for bits, row, rows, word, count in _sections(groups):
        units = -(-rows // 32)
        unit_words = np.zeros((units, bits, n), np.uint32)
        unit_words.reshape(units * bits, n)[:count] = words[word : word + count]
        unit_codes = np.empty((units, 32, n), np.uint8)
        for r in range(32):
            index, shift = divmod(r * bits, 32)
            value = unit_words[:, index] >> np.uint32(shift)
            if shift + bits > 32:
                value |= unit_words[:, index + 1] << np.uint32(32 - shift)
            unit_codes[:, r] = (value & np.uint32(2**bits - 1)).astype(np.uint8)
        codes[row : row + rows] = unit_codes.reshape(units * 32, n)[:rows]
    return torch.from_numpy(codes)


def pack_scale_codes(scale_codes: Tensor) -> Tensor:
    """Pack scale codes [G, N] uint8 (0 to 15) into words [G, N/8] int32."""
    g, n = scale_codes.shape
    nibbles = scale_codes.numpy().astype(np.uint32).reshape(g, n // 8, 8)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    return torch.from_numpy(np.bitwise_or.reduce(nibbles << shifts, axis=2).view(np.int32))


def unpack_scale_codes(q_scale: Tensor) -> Tensor:
    """Scale codes [G, N] uint8 from words [G, N/8] int32."""
    words = q_scale.contiguous().numpy().view(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words[:, :, None] >> shifts) & np.uint32(15)
    return torch.from_numpy(nibbles.astype(np.uint8).reshape(words.shape[0], -1))


def write_groups(groups: Sequence[Group]) -> Tensor:
    """The `q_groups` tensor, int16 [2 G]."""
    table: list[int] = []
    word = 0
    for group in groups:
        if word > 32767:
            raise ValueError(f"group table offset {word} does not fit in int16; the matrix has too many rows")
        table += [group.bits, word]
        word += group.word_rows
    return torch.tensor(table, dtype=torch.int16)


def read_groups(q_groups: Tensor, word_rows: int, k: int) -> GroupMap:
    """The group map from `q_groups` int16 [2 G], the R word rows of `q_weight` and K.

    Raises:
        ValueError: the table is not a legal group map of K rows in R words.
    """
    table = q_groups.tolist()
    if not table or len(table) % 2:
        raise ValueError(f"{len(table)} entries; expected (bits, word row) pairs")
    bits, starts = table[0::2], table[1::2]
    if starts[0] != 0:
        raise ValueError(f"the first group starts at word row {starts[0]}, expected 0")
    groups = []
    for index, (width, start, end) in enumerate(zip(bits, starts, [*starts[1:], word_rows], strict=True)):
        if width not in WIDTHS:
            raise ValueError(f"group {index}: {width} bits; the format allows {', '.join(map(str, WIDTHS))}")
        if end <= start:
            raise ValueError(f"group {index}: starts at word row {start} and ends at {end}")
        rows, odd = divmod((end - start) * 32, width)
        if odd:
            raise ValueError(
                f"group {index}: {end - start} words do not hold whole rows of {width}-bit codes"
            )
        groups.append(Group(width, rows))
    check_groups(groups, k)
    return tuple(groups)


def pack_linear(
    unpacked: UnpackedLinear, pack: Callable[[Tensor, Sequence[Group]], Tensor] = pack_codes
) -> dict[str, Tensor]:
    """The tensors of a linear as stored, keyed by suffix; inverse of `unpack_linear`.

    Args:
        unpacked: the linear.
        pack: packs the codes; a faster one than this module's may be given.

    Raises:
        ValueError: groups, codes or permutation are not legal.
    """
    k, n = unpacked.codes.shape
    check_groups(unpacked.groups, k)
    if n % COLUMN_MULTIPLE:
        raise ValueError(f"N={n} is not a multiple of {COLUMN_MULTIPLE}; pad with zero columns first")
    if not torch.equal(unpacked.permutation.sort().values, torch.arange(k)):
        raise ValueError("the permutation does not contain every input channel once")
    tensors = {
        "q_weight": pack(unpacked.codes, unpacked.groups),
        "q_scale": pack_scale_codes(unpacked.scale_codes),
        "q_scale_max": unpacked.scale_max.to(torch.float16),
        "q_groups": write_groups(unpacked.groups),
        "q_invperm": torch.argsort(unpacked.permutation).to(torch.int32),
    }
    if unpacked.bias is not None:
        tensors["bias"] = unpacked.bias.to(torch.float16)
    return tensors


def unpack_linear(tensors: Mapping[str, Tensor]) -> UnpackedLinear:
    """One array element per code, from the tensors of a linear keyed by suffix; inverse of `pack_linear`."""
    groups = read_groups(tensors["q_groups"], tensors["q_weight"].shape[0], tensors["q_invperm"].shape[0])
    return UnpackedLinear(
        codes=unpack_codes(tensors["q_weight"], groups),
        scale_codes=unpack_scale_codes(tensors["q_scale"]),
        scale_max=tensors["q_scale_max"],
        groups=groups,
        permutation=torch.argsort(tensors["q_invperm"].long()),
        bias=tensors.get("bias"),
    )


def group_scales(scale_codes: Tensor, scale_max: Tensor) -> Tensor:
    """Real scales [G, N] float16 from scale codes [G, N] and group maxima [G], rounded as the format says."""
    unit = (scale_max.float() / 256).half()
    steps = (scale_codes.float() + 1) ** 2
    return (steps * unit.float()[:, None]).half()


def dequantize_rows(unpacked: UnpackedLinear) -> Tensor:
    """Weights [K, N] float16 in packed row order, bit-exact."""
    rows = torch.tensor([group.rows for group in unpacked.groups])
    zero = torch.tensor([2 ** (group.bits - 1) for group in unpacked.groups]).repeat_interleave(rows)
    scales = group_scales(unpacked.scale_codes, unpacked.scale_max)
    weight = torch.empty(unpacked.codes.shape, dtype=torch.float16)
    start = 0
    for index, count in enumerate(rows.tolist()):  # group by group: no fp32 copy of the whole matrix
        end = start + count
        signed = unpacked.codes[start:end].float() - zero[start:end, None]
        weight[start:end] = (signed * scales[index].float()).half()
        start = end
    return weight


def dequantize_linear(tensors: Mapping[str, Tensor]) -> Tensor:
    """The exact fp16 weight [N, K] (out, in) of a linear, from its tensors keyed by suffix.

    N is as stored; a padded linear is trimmed by the caller, who knows its true width.

    Raises:
        CheckpointError: the tensors break a rule of the format.
        ValueError: a tensor is not on the CPU.
    """
    for suffix, tensor in tensors.items():
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(f"dequantize_linear.{suffix}: on {tensor.device}, expected a tensor on the CPU")
    validate_linear(tensors, "dequantize_linear")
    unpacked = unpack_linear(tensors)
    weight = torch.empty_like(dequantized := dequantize_rows(unpacked))
    weight[unpacked.permutation] = dequantized
    return weight.T.contiguous()


def validate_linear(tensors: Mapping[str, Tensor], name: str, file: str = "") -> GroupMap:
    """Check every tensor of a linear against the format, and return its group map.

    Args:
        tensors: its tensors keyed by suffix; q_weight and q_scale may be on "meta", where only their shapes
            are checked.
        name: the linear's name, for messages.
        file: where it came from, for messages.

    Raises:
        CheckpointError: names the file, the tensor, what was expected and what came.
    """
    where = f"{file}: {name}" if file else name

    def fail(suffix: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{where}.{suffix}: {problem}")

    for suffix in SUFFIXES:
        if suffix not in tensors:
            raise fail(suffix, "missing; a quantized linear has " + ", ".join(SUFFIXES))
    for suffix, tensor in tensors.items():
        if suffix not in TENSORS:
            raise fail(suffix, "is not a tensor of the format")
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise fail(suffix, f"{type(tensor).__name__}, expected a dense tensor")
        dtype, dimensions = TENSORS[suffix]
        if tensor.dtype != dtype:
            raise fail(suffix, f"dtype {tensor.dtype}, expected {dtype}")
        if tensor.dim() != dimensions:
            raise fail(suffix, f"shape {tuple(tensor.shape)}, expected {dimensions} dimensions")

    word_rows, n = tensors["q_weight"].shape
    g = tensors["q_scale_max"].shape[0]
    k = tensors["q_invperm"].shape[0]
    if n == 0 or n % COLUMN_MULTIPLE:
        raise fail("q_weight", f"{n} columns, expected a multiple of {COLUMN_MULTIPLE}")
    if tuple(tensors["q_scale"].shape) != (g, n // 8):
        raise fail("q_scale", f"shape {tuple(tensors['q_scale'].shape)}, expected {(g, n // 8)}")
    if tensors["q_groups"].shape[0] != 2 * g:
        raise fail("q_groups", f"{tensors['q_groups'].shape[0]} entries, expected {2 * g} for {g} groups")
    if "bias" in tensors:
        if tensors["bias"].shape[0] != n:
            raise fail("bias", f"{tensors['bias'].shape[0]} entries, expected {n}")
        if not bool(torch.isfinite(tensors["bias"]).all()):
            at = int((~torch.isfinite(tensors["bias"])).nonzero()[0])
            raise fail("bias", f"entry {at} is {tensors['bias'][at].item()}, expected a finite value")
    try:
        groups = read_groups(tensors["q_groups"], word_rows, k)
    except ValueError as error:
        raise fail("q_groups", str(error)) from None
    scale_max = tensors["q_scale_max"].float()
    bad = ~torch.isfinite(scale_max) | (scale_max < 0)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise fail(
            "q_scale_max", f"group {at} is {scale_max[at].item()}, expected a finite value of at least 0"
        )
    invperm = tensors["q_invperm"].long()
    outside = (invperm < 0) | (invperm >= k)
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise fail("q_invperm", f"entry {at} is {int(invperm[at])}, expected 0 to {k - 1}")
    counts = torch.bincount(invperm, minlength=k)
    if bool((counts != 1).any()):
        at = int((counts > 1).nonzero()[0])
        raise fail("q_invperm", f"row {at} occurs {int(counts[at])} times; expected a permutation")
    most = torch.tensor([2 ** (group.bits - 1) for group in groups], device=scale_max.device)
    large = bool((most * scale_max > torch.finfo(torch.float16).max).any())  # never, in a model that is one
    if large and not tensors["q_weight"].is_meta:
        finite = torch.isfinite(dequantize_rows(unpack_linear(tensors))).all(dim=1)
        if not bool(finite.all()):
            at = int((~finite).nonzero()[0])
            raise fail("q_scale_max", f"packed row {at} has weights that do not fit into half precision")
    return groups
