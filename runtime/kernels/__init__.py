"""Implementations of the operators, one file a device."""
