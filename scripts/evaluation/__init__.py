"""What `eval` finds out: how far a quantized model is from its original on a text, and how it does at tasks."""
