"""From text to batches: sources, templates, tokenization, packing."""
