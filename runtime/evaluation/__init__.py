"""How far a quantized model is from its original, and the record of it."""
