"""Curves of error against bits, and the bits for every linear from one budget."""
