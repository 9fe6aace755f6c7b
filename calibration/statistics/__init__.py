"""Sums over a linear's inputs and gradients, and what is computed from them."""
