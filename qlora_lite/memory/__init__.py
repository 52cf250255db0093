"""Predict bytes before they are allocated, and measure what really happened."""
