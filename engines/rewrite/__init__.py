"""What is changed in a graph before TensorRT reads it."""
