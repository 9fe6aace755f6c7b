"""EXL2 folders in vLLM: the plugin that vLLM finds by its entry point, and what it is made of."""
