"""A guarded folder in the layout that another runtime wants: Triton's model repository, onnxruntime-genai, transformers.js."""
