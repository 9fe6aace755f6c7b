"""What a conversion will weigh and take, before it starts."""
