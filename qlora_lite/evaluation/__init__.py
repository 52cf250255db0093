"""Evaluate a model.

perplexity.py  loss, perplexity and accuracy on rows
generation.py  answers to prompts: one, a batch, or one streamed
"""
