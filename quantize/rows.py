"""The token rows of a conversion: those to calibrate on, and those that tell what the result costs."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.text.sources import kind_of
from dbrx_quant.calibration.text.tokens import (
    LENGTH,
    ROWS,
    TokenRows,
    load_tokens,
    reopen_tokens,
    save_tokens,
    split_held_out,
)
from dbrx_quant.quantize.declared import plain_name
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.families.facts import Architecture
from dbrx_quant.runtime.files.sealed import check_seal, seal_again
from dbrx_quant.runtime.tokenizer.load import model_limits

HELD_OUT_ROWS = 16  # of text
# below so many weights, so many tokens a row
LENGTHS = ((8e9, LENGTH), (32e9, LENGTH // 2), (math.inf, LENGTH // 4))
_TOKENS, _HELD_OUT = "tokens.safetensors", "held-out.safetensors"
ROW_FILES = (_TOKENS, _HELD_OUT)  # in the work folder, made within minutes


@dataclass(frozen=True)
class Rows:
    """Token ids of a conversion.

    Attributes:
        tokens: as they were loaded for the calibration.
        calibration: [R, L] those to calibrate on.
        held_out: [H, L] those that nothing is chosen on; None: too few rows to hold any out.
        held_out_source: where the held-out ones are from, as others may see it; None: the calibration rows.
    """

    tokens: TokenRows
    calibration: Tensor
    held_out: Tensor | None
    held_out_source: str | None

    @property
    def count(self) -> int:
        """How many tokens there are in all rows."""
        return self.calibration.numel() + (0 if self.held_out is None else self.held_out.numel())


def default_shape(architecture: Architecture) -> tuple[int, int]:
    """Rows and tokens a row of a calibration on text where nobody says how many, by the model's size alone.

    262,144 tokens for a model that is done in an hour; for a large one, whose time and states on disk grow
    with tokens times weights, 65,536, with which measuring stays below quantizing.
    """
    weights = sum(math.prod(spec.shape) for spec in architecture.linears())
    return ROWS, next(length for most, length in LENGTHS if weights < most)


def load_rows(options: ConvertOptions, architecture: Architecture) -> Rows:
    """The rows that a conversion asks for; kept in its work folder, so that a resumed one has the same."""
    rows, length = options.rows, options.length
    if kind_of(Path(options.calibration)) != ".safetensors":
        default = default_shape(architecture)
        longest = model_limits(options.model)[1] or default[1]
        rows, length = rows or default[0], length or min(default[1], longest)
        if length < min(LENGTH, longest) and options.length is None and not options.quiet:
            print(
                f"calibrating on {rows} rows of {length} tokens, as suits a large model; --rows and --length "
                "choose others",
                file=sys.stderr,
            )
    tokens = _tokens(options, _TOKENS, options.calibration, rows, length)
    if options.held_out is None:
        calibration, held_out = split_held_out(tokens.input_ids)
        return Rows(tokens, calibration, held_out if len(held_out) else None, None)
    ready = kind_of(Path(options.held_out)) == ".safetensors"
    count = options.held_out_rows or (None if ready else HELD_OUT_ROWS)
    apart = _tokens(options, _HELD_OUT, options.held_out, count, tokens.input_ids.shape[1])
    return Rows(tokens, tokens.input_ids, apart.input_ids, plain_name(options.held_out))


def _tokens(
    options: ConvertOptions, name: str, source: str, rows: int | None, length: int | None
) -> TokenRows:
    path = options.work / name
    if not path.exists():
        save_tokens(path, load_tokens(source, options.model, rows, length, options.seed))
        seal_again(path)
    check_seal(path)
    return reopen_tokens(path)  # in the first run too, so that a resumed one describes them alike
