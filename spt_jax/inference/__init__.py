"""From a soft prompt to logits and text."""
