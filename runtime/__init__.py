"""The EXL2 format, checkpoints, operators and models that run quantized weights."""
