"""Weights that look like those of a trained DBRX, drawn part by part from a seed and a tensor's name.

Like trained ones, and unlike independent normal numbers, they have

* spectra that fall by a power law: factors of low rank, and noise whose rows and columns have their own
  scales;
* outlier channels: the embedding and what blocks add are several times larger in a few channels of the
  stream, where norms have small gains; in a few others, gains are large;
* a skewed router: tokens share an offset in the outlier channels, and each expert likes or dislikes it;
* blocks that add about a fifth of the embedding to the stream, so that it stays in range through 40 of
  them, also where two distinct ones repeat (it grows fivefold then); and logits with an entropy of about
  two nats.

Axes: D hidden, F width of an expert, V vocabulary, E experts.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 96  # of the factors
FACTORS_SHARE = 0.35  # of a matrix's squares that comes from the factors, the rest being noise
SPREAD = 0.3  # standard deviation of the logarithm of a row's or column's scale
CHANNELS_PER_OUTLIER = 1024
OUTLIER, OFFSET = (
    8.0,
    12.0,
)  # standard deviation and mean of the stream in an outlier channel, in units of others
COMMON = 0.3  # mean of the stream elsewhere, likewise
GAIN, QUIET_GAIN, LOUD_GAIN = 0.6, 0.4, 4.0  # of a block's norms; times these in outlier and in loud channels
BRANCH = 0.07  # scale of what attention and experts add; outliers and the factors make it larger
LOGITS = 2.2  # their standard deviation, about
SKEW = 0.9  # standard deviation over experts of their mean logit; a token's own has about 1
PART_ROWS = 8192  # rows drawn at a time, but for experts

Draw = Callable[[int], Tensor]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a DBRX, by default those of dbrx-instruct."""

    hidden: int = 6144
    ffn: int = 10752
    experts: int = 16
    active: int = 4
    heads: int = 48
    kv_heads: int = 8
    vocabulary: int = 100352

    @property
    def qkv(self) -> int:
        """Outputs of the fused query, key and value."""
        return self.hidden + 2 * self.kv_heads * (self.hidden // self.heads)


@dataclass(frozen=True)
class Planned:
    """A tensor that can be drawn.

    Attributes:
        name: as stored.
        shape: its shape.
        parts: in how many runs of rows it is drawn.
        draw: the float32 part of a number; the same one however often and in whatever order it is asked for.
    """

    name: str
    shape: tuple[int, ...]
    parts: int
    draw: Draw


class Weights:
    """The tensors of a synthetic model, in the order of its modules.

    Args:
        sizes: of the model.
        seed: another one gives another model.
    """

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self._sizes, self._seed = sizes, seed
        count = max(1, sizes.hidden // CHANNELS_PER_OUTLIER)
        order = torch.randperm(sizes.hidden, generator=self._generator("channels"))
        self._outliers, self._loud = order[:count], order[count : 2 * count]
        signs = torch.where(self._normal("signs", count) < 0, -1.0, 1.0)
        self._offset = COMMON * self._normal("offset", sizes.hidden)
        self._offset[self._outliers] = OFFSET * signs

    def tensors(self, blocks: int) -> Iterator[Planned]:
        """All tensors of a model with so many blocks; a block's are the same whatever the number."""
        hidden, vocabulary = self._sizes.hidden, self._sizes.vocabulary
        yield self._matrix("transformer.wte.weight", (vocabulary, hidden), 1.0, columns=True, offset=True)
        for index in range(blocks):
            yield from self._block(f"transformer.blocks.{index}")
        yield self._gains("transformer.norm_f.weight", 1.0)
        yield self._matrix("lm_head.weight", (vocabulary, hidden), LOGITS / math.sqrt(hidden))

    def _block(self, name: str) -> Iterator[Planned]:
        sizes = self._sizes
        hidden, wide = sizes.hidden, (sizes.experts * sizes.ffn, sizes.hidden)
        reading = 1.2 / (GAIN * math.sqrt(hidden))  # outputs of about 1.2
        attention, mlp = f"{name}.norm_attn_norm", f"{name}.ffn.experts.mlp"
        yield self._gains(f"{attention}.norm_1.weight", GAIN)
        yield self._matrix(f"{attention}.attn.Wqkv.weight", (sizes.qkv, hidden), reading)
        writing = BRANCH / (0.5 * math.sqrt(hidden))  # the average over a text is smaller than one value
        yield self._matrix(f"{attention}.attn.out_proj.weight", (hidden, hidden), writing, rows=True)
        yield self._gains(f"{attention}.norm_2.weight", GAIN)
        yield self._router(f"{name}.ffn.router.layer.weight")
        yield self._matrix(f"{mlp}.w1", wide, reading, experts=True)
        yield self._matrix(f"{mlp}.v1", wide, reading, experts=True)
        writing = BRANCH / (0.25 * math.sqrt(sizes.ffn))  # several experts add, each a part of the whole
        yield self._matrix(f"{mlp}.w2", wide, writing, experts=True, columns=True)

    def _matrix(
        self,
        name: str,
        shape: tuple[int, int],
        std: float,
        *,
        rows: bool = False,
        columns: bool = False,
        offset: bool = False,
        experts: bool = False,
    ) -> Planned:
        """A matrix of that standard deviation.

        Args:
            name: as stored.
            shape: its shape.
            std: of its elements, about.
            rows: its rows are channels of the stream, so that some are outliers.
            columns: its columns are.
            offset: every row has what all tokens have in common.
            experts: it holds one matrix for each expert, which has factors of its own.
        """
        step = self._sizes.ffn if experts else PART_ROWS

        def draw(part: int) -> Tensor:
            begin, end = part * step, min((part + 1) * step, shape[0])
            group = f"{name} {part if experts else ''}"
            matrix = self._normal(f"{name} noise {part}", end - begin, shape[1])
            left = self._normal(f"{name} left {part}", end - begin, RANK)
            left *= torch.arange(1, RANK + 1) ** -0.5
            right = self._normal(f"{group} right", RANK, shape[1])
            share = FACTORS_SHARE / float((1 / torch.arange(1, RANK + 1)).sum())
            matrix.addmm_(left, right, beta=std * math.sqrt(1 - FACTORS_SHARE), alpha=std * math.sqrt(share))
            matrix *= self._scales(f"{name} rows {part}", rows, begin, end)[:, None]
            matrix *= self._scales(f"{name} columns", columns, 0, shape[1])
            return matrix.add_(self._offset, alpha=std) if offset else matrix

        return Planned(name, shape, math.ceil(shape[0] / step), draw)

    def _scales(self, key: str, stream: bool, begin: int, end: int) -> Tensor:
        """Scales of rows or columns `begin` to `end`, which may be channels of the stream."""
        scales = (SPREAD * self._normal(key, end - begin) - SPREAD**2 / 2).exp()
        if stream:
            factors = torch.ones(self._sizes.hidden)
            factors[self._outliers] = OUTLIER
            scales *= factors[begin:end]
        return scales

    def _gains(self, name: str, mean: float) -> Planned:
        def draw(part: int) -> Tensor:
            gains = mean * (0.2 * self._normal(f"{name} gains", self._sizes.hidden)).exp()
            gains[self._outliers] *= QUIET_GAIN
            gains[self._loud] *= LOUD_GAIN
            return gains

        return Planned(name, (self._sizes.hidden,), 1, draw)

    def _router(self, name: str) -> Planned:
        hidden, count = self._sizes.hidden, len(self._outliers)

        def draw(part: int) -> Tensor:
            experts = self._sizes.experts
            logits = self._normal(f"{name} own", experts, hidden) / (GAIN * math.sqrt(hidden))
            order = torch.randperm(experts, generator=self._generator(f"{name} order"))
            liking = SKEW * torch.special.ndtri((order + 0.5) / experts)
            size = math.sqrt(1 + COMMON**2 + count * (OUTLIER**2 + OFFSET**2) / hidden)  # of the stream
            mean = GAIN * QUIET_GAIN * self._offset[self._outliers] / size  # behind the norm
            logits[:, self._outliers] = liking[:, None] / (count * mean)
            return logits

        return Planned(name, (self._sizes.experts, hidden), 1, draw)

    def _normal(self, key: str, *shape: int) -> Tensor:
        return torch.empty(shape).normal_(generator=self._generator(key))

    def _generator(self, key: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self._seed} {key}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
