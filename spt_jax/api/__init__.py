"""The short API: train a prompt on records in memory, and use it."""
