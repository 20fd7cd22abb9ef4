"""Networks to ONNX files."""
