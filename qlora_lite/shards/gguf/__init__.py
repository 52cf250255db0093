"""GGUF files: read the header, and one tensor or slice at a time."""
