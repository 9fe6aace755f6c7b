"""How the CPU kernels round the activations that meet packed weights: one setting for the process.

`int8`   one byte where the weights have up to 4 bits, two bytes elsewhere. The default: as fast as memory.
`int16`  two bytes everywhere (15 bits and sign, a scale per at most 128 channels).
`float`  not at all: exact weights, fp32 sums, straight from the stored tensors. For comparisons to the last
         digits; several times slower.

The integer modes work on a repacked copy of a linear, made when it is first used, and leave out the format's
rounding of a weight to half. What that costs for Gaussian activations, as the rms of the output's error over
the rms of the output: 2e-4 with two bytes, which is the rounding to half alone, 5e-3 (groups of 32 channels)
to 6e-3 (of 128) with one. Rounding Gaussian weights to the grid itself costs 0.37 at 2 bits, 0.18 at 3, 0.09
at 4, 0.005 at 8: 16 times as much and more at every width. In whole models single bytes add about 0.5 % to
the divergence that the rounding of the weights causes (docs/performance.md).
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

BITS = {"int8": 8, "int16": 16}  # of an activation, in the modes that round
MODES = (*BITS, "float")
VARIABLE = "DBRXQ_ACTIVATIONS"

_NAMES = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}

_mode: str | None = None


def _check(mode: str, origin: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{origin}: {mode!r}, expected one of {', '.join(MODES)}")
    return mode


def activations() -> str:
    """The mode in use: `int8` unless DBRXQ_ACTIVATIONS or `set_activations` name another.

    Raises:
        ValueError: the environment variable names none.
    """
    global _mode
    if _mode is None:
        _mode = _check(os.environ.get(VARIABLE) or MODES[0], VARIABLE)
    return _mode


def set_activations(mode: str) -> None:
    """Use one of MODES from now on, in all threads.

    Raises:
        ValueError: there is no such mode.
    """
    global _mode
    _mode = _check(mode, "activations")


@contextmanager
def use_activations(mode: str) -> Iterator[None]:
    """Use one of MODES inside the block, in all threads."""
    before = activations()
    set_activations(mode)
    try:
        yield
    finally:
        set_activations(before)


def activation_name(name: str) -> str:
    """The operators' name of an activation that a model's configuration names.

    Raises:
        ValueError: the operators have no such activation.
    """
    if name not in _NAMES:
        raise ValueError(f"activation {name!r} is not supported; known are {', '.join(sorted(_NAMES))}")
    return _NAMES[name]
