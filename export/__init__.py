"""Checkpoint to ONNX: graphs, quantization, LoRA folding, and the checkpoints that tests use."""
