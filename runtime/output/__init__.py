"""What is shown to people: progress, and text without secrets."""
