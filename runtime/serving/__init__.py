"""The pipeline as a service: HTTP for OpenAI's and Runware's clients, a page, many GPUs."""
