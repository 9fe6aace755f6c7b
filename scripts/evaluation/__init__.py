"""What `eval` finds out: how far a model is from its original on a text, and its scores at tasks."""
