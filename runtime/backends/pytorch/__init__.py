"""The networks in PyTorch, without ONNX or engines."""
