"""Frozen bases: their files, checkpoints, tokenizers and identity."""
