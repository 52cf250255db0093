"""Tensor files: read a tensor or a slice at a time, written in bounded shards."""
