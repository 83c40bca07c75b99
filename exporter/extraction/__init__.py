"""From anchor pairs to a safety steering direction per layer."""
