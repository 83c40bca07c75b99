"""ONNX graphs: reading a model folder, its anatomy, the guard, the rewrite and the static proof. No torch, no runtime."""
