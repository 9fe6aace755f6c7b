"""From moments and a dense weight to codes, scales and a finished linear."""
