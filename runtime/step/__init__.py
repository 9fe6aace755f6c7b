"""Decoding without Python between the layers: all layers of a model as one native call, on a CPU or a GPU."""
