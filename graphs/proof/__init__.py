"""Proofs about a guarded graph without a runtime, and graphs for the proof by running."""
