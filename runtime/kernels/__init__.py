"""The operators on packed linears, and who computes them on which device."""
