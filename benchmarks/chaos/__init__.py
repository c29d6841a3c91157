"""Training runs that are killed again and again, compared with one that was left alone."""
