"""What is summed up of a linear's inputs and gradients, and made of the sums."""
