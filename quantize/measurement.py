"""The measurement of a model: what each choice of bits costs in each linear, and the file that holds it.

Everything that chooses bits reads it and nothing else, so a model is measured once for all sizes.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from dbrx_quant.calibration.blocks.routing import ExpertCoverage
from dbrx_quant.calibration.statistics.shrinkage import Shrinkage
from dbrx_quant.runtime.exl2.format import WIDTHS, GroupMap
from dbrx_quant.runtime.exl2.group_text import parse_groups
from dbrx_quant.runtime.exl2.weight_files import weight_files
from dbrx_quant.runtime.files.atomic import fingerprint
from dbrx_quant.runtime.files.errors import CheckpointError
from dbrx_quant.runtime.files.json_file import VERSION_KEY, Fields, JsonFile, is_number, read_object

MEASUREMENT_NAME = "measurement.json"
FILE = JsonFile("a measurement", version=2, remedy="measure again")
HEAD = "lm_head"

_RUN = re.compile(r"([2-8]):(\d{1,6})(?:x(\d{1,6}))?")


@dataclass(frozen=True)
class Option:
    """One way to quantize a linear.

    Attributes:
        bits: what it takes on disk, all overhead included.
        error: what it costs, in nats per token.
        groups: its group map as text, see `recipe.render_groups`; a big model has millions of groups.
    """

    bits: int
    error: float
    groups: str

    @property
    def group_map(self) -> GroupMap:
        """The groups themselves."""
        return parse_groups(self.groups)


@dataclass(frozen=True)
class LinearMeasurement:
    """What was measured of one linear.

    Attributes:
        role: q, k, v, o, gate, up, down or head.
        shape: (K, N), input and output channels.
        options: by rising bits and falling error.
        energy: the cost of dropping it altogether, in nats to second order.
        tokens: calibration tokens that reached it.
        effective_tokens: how many of equal weight would carry the same information.
        weight: sum of the tokens' weights, the squared routing weights in experts.
        price: nats per squared output error, summed over channels.
        held_out_ratio: squared output error on held-out rows, relative to what its Hessian predicts.
        shrinkage: how its Hessian is regularised.
        feedback: per width, error of a real solution over the table's prediction; included in the options.
    """

    role: str
    shape: tuple[int, int]
    options: tuple[Option, ...]
    energy: float
    tokens: int = 0
    effective_tokens: float = 0.0
    weight: float = 0.0
    price: float = 0.0
    held_out_ratio: float = 1.0
    shrinkage: Shrinkage = field(default_factory=lambda: Shrinkage(0.0))
    feedback: tuple[float, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights, K N."""
        return math.prod(self.shape)

    def priced(self, price: float) -> "LinearMeasurement":
        """The same with errors in nats, from errors of the output."""
        options = tuple(replace(option, error=option.error * price) for option in self.options)
        return replace(self, price=price, energy=self.energy * price, options=options)

    def to_json(self) -> dict[str, Any]:
        """As the file has it."""
        return {
            "role": self.role,
            "shape": list(self.shape),
            "tokens": self.tokens,
            "effective_tokens": self.effective_tokens,
            "weight": self.weight,
            "damping": self.shrinkage.damping,
            "prior": self.shrinkage.prior,
            "feedback": list(self.feedback),
            "unseen": self.held_out_ratio,
            "energy": self.energy,
            "price": self.price,
            "options": [[option.bits, option.error, option.groups] for option in self.options],
        }


@dataclass(frozen=True)
class Measurement:
    """What was measured of a model.

    Attributes:
        linears: all of them by name, the head last.
        tokens: calibration tokens.
        coverage: block → its experts; blocks without experts are not in it.
        model: what identifies the model, file → fingerprint.
        calibration: what the tokens were made of.
        held_out: the text that `held_out_ratio` is of; None: calibration rows.
    """

    linears: Mapping[str, LinearMeasurement]
    tokens: int = 0
    coverage: Mapping[int, tuple[ExpertCoverage, ...]] = field(default_factory=dict)
    model: Mapping[str, str] = field(default_factory=dict)
    calibration: Mapping[str, Any] = field(default_factory=dict)
    held_out: str | None = None

    @cached_property
    def decoder(self) -> dict[str, LinearMeasurement]:
        """All linears but the head, which is outside of the budget."""
        return {name: linear for name, linear in self.linears.items() if name != HEAD}

    @property
    def head(self) -> LinearMeasurement | None:
        """The head, if it was measured."""
        return self.linears.get(HEAD)

    @cached_property
    def decoder_weights(self) -> int:
        """Number of weights of the decoder's linears."""
        return sum(linear.weights for linear in self.decoder.values())

    @property
    def reachable_bpw(self) -> tuple[float, float]:
        """Least and most bits per weight that the options allow."""
        options = [linear.options for linear in self.decoder.values()]
        fewest, most = (sum(o[end].bits for o in options) for end in (0, -1))
        return fewest / self.decoder_weights, most / self.decoder_weights

    def of(
        self, model: Mapping[str, str], calibration: Mapping[str, Any], held_out: str | None
    ) -> "Measurement":
        """The same, with the model and texts that it was measured on."""
        return replace(self, model=model, calibration=calibration, held_out=held_out)


def write_measurement(path: Path, measurement: Measurement) -> None:
    """Write a `measurement.json`, atomically."""
    FILE.write(
        path,
        {
            "model": measurement.model,
            "calibration": measurement.calibration,
            "held_out": measurement.held_out,
            "tokens": measurement.tokens,
            "coverage": {
                str(block): [vars(expert) for expert in experts]
                for block, experts in measurement.coverage.items()
            },
            "linears": {name: linear.to_json() for name, linear in measurement.linears.items()},
        },
    )


def read_measurement(path: Path) -> Measurement:
    """The measurement in a file, every field checked.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is damaged, or of another version.
    """
    return _measurement(FILE.read(path))


def _measurement(fields: Fields) -> Measurement:
    linears = {name: read_linear(linear) for name, linear in fields.objects("linears")}
    if not linears:
        raise fields.fault("linears", "empty")
    blocks = fields.object("coverage")
    numbered = [block for block in blocks.values if block.isdecimal()]
    if len(numbered) < len(blocks.values):
        raise fields.fault("coverage", "not keyed by block number")
    coverage = {int(block): read_coverage(blocks, block) for block in sorted(numbered, key=int)}
    model = fields.object("model")
    return Measurement(
        linears,
        fields.integer("tokens"),
        coverage,
        {name: model.text(name) for name in model.values},
        fields.object("calibration").values,
        fields.text_or_none("held_out"),
    )


def read_measurement_of(path: Path, model: Path) -> Measurement:
    """A measurement, checked to be one of this model.

    Raises:
        CheckpointError: there is none, it is damaged, of another version, or of another model.
    """
    try:
        measurement = read_measurement(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such measurement") from None
    if measurement.model != source_facts(model):
        raise CheckpointError(f"{path}: measured on another model than {model}; measure this one")
    return measurement


def find_measurement(folder: Path) -> Measurement | None:
    """The measurement in a quantized folder; None where there is none, or one of another converter.

    Raises:
        CheckpointError: it is damaged, or of another version.
    """
    path = folder / MEASUREMENT_NAME
    try:
        content = read_object(path, FILE.what, FILE.remedy)
    except FileNotFoundError:
        return None
    ours = VERSION_KEY in content or "linears" in content
    return _measurement(FILE.check(path, content)) if ours else None


def source_facts(folder: Path) -> dict[str, str]:
    """What identifies a source model: fingerprints of its config and of every file of its weights."""
    files = [folder / "config.json", *weight_files(folder, source=True)]
    return {file.name: fingerprint(file) for file in files}


def read_coverage(fields: Fields, key: str) -> tuple[ExpertCoverage, ...]:
    """The coverage of a block's experts, from a field that lists them."""
    return tuple(
        ExpertCoverage(expert.integer("tokens"), expert.number("share", 0), expert.number("mean_weight", 0))
        for expert in fields.listed(key)
    )


def read_linear(fields: Fields) -> LinearMeasurement:
    """What `LinearMeasurement.to_json` wrote, checked."""
    shape = fields.items("shape")
    if len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise fields.fault("shape", f"{shape!r}, expected input and output channels")
    k, n = shape
    options = [_read_option(fields, value, k) for value in fields.items("options")]
    if not options or any(a.bits >= b.bits or a.error < b.error for a, b in pairwise(options)):
        raise fields.fault("options", "not a list of rising bits and falling error")
    feedback = fields.items("feedback")
    if len(feedback) != len(WIDTHS) or not all(map(is_number, feedback)):
        raise fields.fault("feedback", f"{len(feedback)} values, expected {len(WIDTHS)} numbers")
    return LinearMeasurement(
        role=fields.text("role"),
        shape=(k, n),
        options=tuple(options),
        energy=fields.number("energy", 0),
        tokens=fields.integer("tokens"),
        effective_tokens=fields.number("effective_tokens", 0),
        weight=fields.number("weight", 0),
        price=fields.number("price", 0),
        held_out_ratio=fields.number("unseen", 0),
        shrinkage=Shrinkage(fields.number("damping", 0), fields.number("prior", 0)),
        feedback=tuple(float(factor) for factor in feedback),
    )


def _read_option(fields: Fields, value: Any, k: int) -> Option:
    """An option; its group map is read later, and checked against the input channels now."""
    if isinstance(value, list) and len(value) == 3:
        bits, error, groups = value
        if type(bits) is int and bits > 0 and type(error) in (int, float) and 0 <= error < math.inf:
            if isinstance(groups, str) and _rows(groups) == k:
                return Option(bits, float(error), groups)
            raise fields.fault("options", f"{groups!r:.80}, expected a group map of {k} rows")
    raise fields.fault("options", f"{value!r:.80}, expected bits, error and group map")


def _rows(groups: str) -> int | None:
    """The rows of a group map as text, without making the groups; None if it is not one."""
    rows = 0
    for part in groups.split():
        run = _RUN.fullmatch(part)
        if run is None:
            return None
        rows += int(run[2]) * int(run[3] or 1)
    return rows
