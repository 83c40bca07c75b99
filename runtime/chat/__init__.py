"""Prompts: chat templates, their bounds, tokenizers, and text as it comes."""
