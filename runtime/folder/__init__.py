"""A quantized folder: what it holds, weighs and promises, and the writer of its shards."""
