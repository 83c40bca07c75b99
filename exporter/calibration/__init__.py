"""Chooses layers and numbers of a guard by trials on labelled prompts, and writes guard.toml."""
