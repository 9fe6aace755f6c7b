"""The shards of a result: planned before anything is quantized, written as their linears are finished."""
