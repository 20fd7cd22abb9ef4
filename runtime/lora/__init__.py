"""What LoRA files change in the transformer's weights. No torch."""
