"""The frozen, quantised base model."""
