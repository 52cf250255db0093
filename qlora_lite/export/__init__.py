"""Write merged models that any tool can load, and compare them with the trained ones."""
