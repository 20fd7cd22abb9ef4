"""The same service in front of many GPUs, by Ray Serve."""
