"""The networks, written once over a few operations, and those operations in torch."""
