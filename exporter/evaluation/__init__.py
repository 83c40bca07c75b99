"""What the unguarded and the guarded model do with the same prompts."""
