"""Fused operations, each with the plain `reference` that defines it."""
