"""A quantized folder: its contents, size and checks, and the writer of its shards."""
