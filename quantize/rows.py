"""The token rows of a conversion: those to calibrate on, and those that tell what the result costs."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dbrx_quant.calibration.text.tokens import (
    TokenRows,
    load_tokens,
    reopen_tokens,
    save_tokens,
    split_unseen,
)
from dbrx_quant.quantize.declared import plain_name
from dbrx_quant.quantize.options import ConvertOptions

HELD_OUT_ROWS = 16  # of text


@dataclass(frozen=True)
class Rows:
    """Token ids of a conversion.

    Attributes:
        tokens: as they were loaded for the calibration.
        calibration: [R, L] those to calibrate on.
        unseen: [U, L] those that nothing is chosen on; None: there are too few to hold any out.
        held_out: where the unseen ones are from, as others may see it; None: from the calibration's.
    """

    tokens: TokenRows
    calibration: Tensor
    unseen: Tensor | None
    held_out: str | None

    @property
    def count(self) -> int:
        """How many tokens there are in all rows."""
        return self.calibration.numel() + (0 if self.unseen is None else self.unseen.numel())


def load_rows(options: ConvertOptions) -> Rows:
    """The rows that a conversion asks for; kept in its work folder, so that a resumed one has the same."""
    tokens = _tokens(options, "tokens", options.calibration, options.rows, options.length)
    if options.held_out is None:
        calibration, unseen = split_unseen(tokens.input_ids)
        return Rows(tokens, calibration, unseen if len(unseen) else None, None)
    ready = Path(options.held_out).suffix == ".safetensors"
    count = options.held_out_rows or (None if ready else HELD_OUT_ROWS)
    held_out = _tokens(options, "held-out", options.held_out, count, tokens.input_ids.shape[1])
    return Rows(tokens, tokens.input_ids, held_out.input_ids, plain_name(options.held_out))


def _tokens(
    options: ConvertOptions, name: str, source: str, rows: int | None, length: int | None
) -> TokenRows:
    path = options.work / f"{name}.safetensors"
    if not path.exists():
        save_tokens(path, load_tokens(source, options.model, rows, length, options.seed))
    return reopen_tokens(path)  # in the first run too, so that a resumed one describes them alike
