"""Verbs that write into a quantized folder: its index, its tokenizer files, its repacked linears."""
