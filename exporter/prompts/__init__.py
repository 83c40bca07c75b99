"""Labelled prompts: where they come from, which formats, which share prompts."""
