"""Running models: sessions, prompts and images to inputs, generation with KV cache, parity. No torch."""
