"""What was measured of each linear before prices are known, and the prices.

A linear's error is measured in its own output; its price, nats per squared error, comes from the gradients
that reached it, and in experts from those of the whole block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dbrx_quant.quantize.measurement import LinearMeasurement, read_linear
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.files.json_file import JsonFile

POOLED = 0.3  # share of an expert's price that comes from all experts of its block

REMEDY = "start over with --resume never"
_FILE = JsonFile("a measured linear", version=1, remedy=REMEDY, sealed=True)


@dataclass(frozen=True)
class Entry:
    """What was measured of one linear, before prices are known.

    Attributes:
        linear: with errors of its output, not yet in nats.
        gradient: sum over all calibration tokens of its squared output gradients, mean over its channels.
    """

    linear: LinearMeasurement
    gradient: float

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        _FILE.write(path, {"gradient": self.gradient, "linear": self.linear.to_json()})

    @staticmethod
    def read(path: Path) -> "Entry":
        """The entry in a file."""
        fields = _FILE.read(path)
        return Entry(read_linear(fields.object("linear")), fields.number("gradient", 0))


def priced(
    entries: Mapping[str, Entry], architecture: Architecture, count: int
) -> dict[str, LinearMeasurement]:
    """All linears with their errors in nats, from entries that were measured on `count` tokens."""
    prices = {name: entry.gradient / (2 * count) for name, entry in entries.items()}
    for block in architecture.blocks:
        for linears in zip(*(block.experts.linears if block.experts else ()), strict=True):
            names = [spec.name for spec in linears]
            pooled = _pooled_prices([entries[name] for name in names], count)
            prices.update(zip(names, pooled, strict=True))
    return {name: entry.linear.priced(prices[name]) for name, entry in entries.items()}


def _pooled_prices(entries: Sequence[Entry], count: int) -> list[float]:
    """Prices of one role's experts: gradients of an expert with few tokens lean on those of all.

    A price is the sum of squared gradients; per unit of squared routing weight it is much the same for all
    experts of a block, which is what an expert seen rarely falls back to (as if 32 average tokens had said
    so).
    """
    gradient = sum(entry.gradient for entry in entries)
    weight = sum(entry.linear.weight for entry in entries)
    tokens = sum(entry.linear.tokens for entry in entries)
    if not weight:
        return [0.0] * len(entries)
    usual, pseudo = gradient / weight, 32 * weight / tokens
    prices = []
    for entry in entries:
        own = entry.linear.weight
        seen = max(own, weight / tokens)  # an expert never seen counts as seen once
        estimate = (entry.gradient + pseudo * usual) / (own + pseudo)
        prices.append(seen * ((1 - POOLED) * estimate + POOLED * usual) / (2 * count))
    return prices
