"""Faults injected into real conversions: kills, errors of the system, full disks, damaged files."""
