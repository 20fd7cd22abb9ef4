"""ONNX graphs to TensorRT engines, ahead of time and without a GPU, and what the builder made."""
