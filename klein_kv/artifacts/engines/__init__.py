"""What a folder of engines says of itself, and which engine serves a request."""
