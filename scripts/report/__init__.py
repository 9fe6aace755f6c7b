"""The report on quantized folders: its data, its page, its pictures."""
