"""The `dbrx-quant` command, a file a verb."""
