"""The same service in front of many GPUs: one replica of the pipeline on each, by Ray."""
