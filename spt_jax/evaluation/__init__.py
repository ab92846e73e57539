"""Evaluates and inspects soft prompts: scores, generated answers, metrics and attribution."""
