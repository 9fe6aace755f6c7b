"""The files beside the shards: config, side files, the record of the conversion."""
