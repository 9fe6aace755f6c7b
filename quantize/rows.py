"""The token rows of a conversion: those to calibrate on, and those that tell what the result costs."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.text.sources import kind_of
from dbrx_quant.calibration.text.tokens import (
    TokenRows,
    load_tokens,
    reopen_tokens,
    save_tokens,
    split_held_out,
)
from dbrx_quant.quantize.declared import plain_name
from dbrx_quant.quantize.options import ConvertOptions
from dbrx_quant.runtime.files.sealed import check_seal, seal_again

HELD_OUT_ROWS = 16  # of text
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


def load_rows(options: ConvertOptions) -> Rows:
    """The rows that a conversion asks for; kept in its work folder, so that a resumed one has the same."""
    tokens = _tokens(options, _TOKENS, options.calibration, options.rows, options.length)
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
