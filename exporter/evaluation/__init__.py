"""Compares the unguarded and the guarded model on the same prompts."""
