"""Whether a run comes out the same again: its environment, its data, its numbers."""
