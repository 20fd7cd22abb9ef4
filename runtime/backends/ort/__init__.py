"""The graphs with ONNX Runtime, on a CPU or a CUDA GPU."""
