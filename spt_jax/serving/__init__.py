"""Serving: many prompts on one base, any mixture of them in one batch."""
