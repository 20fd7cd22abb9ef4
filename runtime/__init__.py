"""Runs klein artifacts: schedule in, images out. No torch, diffusers or transformers at import."""
