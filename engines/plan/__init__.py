"""The kernel plan of an engine: was quantization applied, and what it costs."""
