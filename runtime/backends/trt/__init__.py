"""TensorRT engines on one CUDA GPU, without torch."""
