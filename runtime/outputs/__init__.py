"""Pixels, files and metadata out."""
