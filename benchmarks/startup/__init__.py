"""Where the time goes from the launch of a run to the end of its first step."""
