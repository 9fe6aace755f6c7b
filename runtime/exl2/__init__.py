"""The EXL2 format: its tensors, their packing and exact values, and checkpoints of them."""
