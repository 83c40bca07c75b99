"""From a Hugging Face checkpoint to the ONNX graphs of its parts."""
