"""The error of a file that is not what it should be."""


class CheckpointError(ValueError):
    """A checkpoint or side file breaks its format; the message names file, tensor, value and the way out."""
