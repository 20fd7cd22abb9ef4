"""Nodes for ComfyUI. Imported inside it alone, but for `install`, which puts the pack there."""
