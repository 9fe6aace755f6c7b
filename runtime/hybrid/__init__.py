"""Models of which a GPU holds a part: what it holds, and experts that two processors compute together."""
