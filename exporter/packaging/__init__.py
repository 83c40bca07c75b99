"""Packages a guarded folder for another runtime: Triton's model repository, onnxruntime-genai, transformers.js."""
