"""`vlmguard playground`: what the page is told about a guarded folder, and both of its decoders."""
