"""Fused operations, each beside the plain `reference` that defines it."""
