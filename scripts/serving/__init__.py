"""Servers compared, for developers: our own, vLLM with our files, vLLM with the original."""
