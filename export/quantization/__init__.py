"""Quantized weights: recipes, calibration, scales, files."""
