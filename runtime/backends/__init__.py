"""What runs the graphs: a folder per library."""
