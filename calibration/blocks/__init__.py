"""One block of a model at a time: its weights, the walk through it, what is collected on the way."""
