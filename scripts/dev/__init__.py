"""Benches, studies and drawings for developers; not part of the wheel."""
