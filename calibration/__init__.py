"""From text to token rows, hidden states and Hessians."""
