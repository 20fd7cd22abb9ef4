"""Routes of OpenAI's image API, of references, and of health."""
