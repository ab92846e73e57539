"""Text to batches: sources, templates, tokenization, packing."""
