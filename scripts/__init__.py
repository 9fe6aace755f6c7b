"""The `dbrx-quant` command: one thin file a verb."""
