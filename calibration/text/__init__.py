"""Text to rows of tokens."""
