"""Causal transformer decoders in Flax Linen, and their configs from Hugging Face."""
