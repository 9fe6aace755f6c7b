"""Measurement, bit allocation, the quantizer and the writer of checkpoints."""
