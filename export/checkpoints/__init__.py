"""Where weights come from: repositories, single files, quantized files, fixtures."""
