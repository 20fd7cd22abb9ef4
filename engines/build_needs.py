"""What a build needs of the host: memory, and disk. No TensorRT is imported."""

__all__ = ["EMBEDDED_FACTOR", "ENGINE_BYTES", "embedded_build_memory"]

EMBEDDED_FACTOR = 3.1
"""Peak memory of a build with embedded weights, in weight bytes (measured, TensorRT-RTX 1.7.1)."""

ENGINE_BYTES = 128 << 20
"""Disk set aside for the code of one engine; the largest measured has 80 MB."""

_BASE_MEMORY = 1 << 30


def embedded_build_memory(weight_bytes: int) -> int:
    """Peak memory of building one engine that holds its weights."""
    return int(weight_bytes * EMBEDDED_FACTOR) + _BASE_MEMORY
