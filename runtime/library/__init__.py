"""The C libraries: found, checked, typed."""
