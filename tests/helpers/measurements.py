"""Made-up measurements."""

from dbrx_quant.quantize.measurement import LinearMeasurement, Measurement, Option


def linear(shape, options, role="q", energy=1.0, tokens=64):
    """What was measured of a linear, from options of (bits, error, groups)."""
    feedback = (1.0,) * 6
    return LinearMeasurement(
        role, tuple(shape), tuple(Option(*o) for o in options), energy, tokens, feedback=feedback
    )


def measurement(linears, **more):
    """A measurement of linears by name."""
    return Measurement(dict(linears), **more)
