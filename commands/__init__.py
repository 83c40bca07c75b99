"""The commands of `vlmguard`, by what they do. `cli.py` collects and runs them."""
