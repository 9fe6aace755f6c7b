"""A release on the Hub: what it holds, its card, and the upload."""
