"""What fits into memory."""
