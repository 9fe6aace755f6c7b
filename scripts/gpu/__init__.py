"""The CUDA kernels and their speed: on a GPU where there is one, by a model where there is none."""
