"""A GGUF file as a base: its metadata as config and tokenizer, its tensors under other names."""
