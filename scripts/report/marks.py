"""Numbers as the report writes them, and text made safe for HTML."""

import html
import math

MISSING, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def escape(text: object) -> str:
    """Text for HTML, in an element or in a quoted attribute."""
    return html.escape(str(text), quote=True)


def digits(value: float, count: int = 3) -> str:
    """So many digits that count, without powers of ten while that is short: 0.0312, 71.6, 2.1e-06."""
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if not -6 < magnitude < 15:
        return f"{value:.{count - 1}e}"
    return f"{value:,.{max(0, count - 1 - magnitude)}f}"


def perplexity(value: float | None) -> str:
    """A perplexity; None is beyond what a float holds."""
    return "> 1e308" if value is None else digits(value, 4)


def percent(share: float) -> str:
    """A share as `97.88 %` or `0.039 %`: two digits that count below one percent."""
    return f"{100 * share:.2f} %" if share >= 0.01 else f"{digits(100 * share, 2)} %"


def count_text(count: int) -> str:
    """`131 billion`, `10.2 million`, `4,096`."""
    for word, factor in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if count >= factor:
            return f"{digits(count / factor)} {word}"
    return f"{count:,}"
