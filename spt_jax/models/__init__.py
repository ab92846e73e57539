"""Frozen transformers in Flax Linen, and the reading of Hugging Face checkpoints into them."""
