"""The proof: by running, and again from the files."""
