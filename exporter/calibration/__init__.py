"""Which layers and numbers, tried on labelled prompts; the outcome is a guard.toml."""
