"""Engines of TensorRT and TensorRT-RTX, behind the runner protocol."""
