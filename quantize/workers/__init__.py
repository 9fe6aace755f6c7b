"""Several processes, on one machine or many, that share out the experts of a conversion."""
