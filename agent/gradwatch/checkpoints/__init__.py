"""Writing checkpoints so that they are whole, and telling whether they are."""
