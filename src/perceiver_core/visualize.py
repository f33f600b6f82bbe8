"""What a model looked at, and where it thinks things are, as pictures."""
