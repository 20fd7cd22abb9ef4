"""Prompt and noise in."""
