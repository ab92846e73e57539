"""Computes logits and generates text with a soft prompt."""
