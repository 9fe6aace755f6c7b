"""Tokenizers: loading, ids, checks, and the repair of what is missing."""
