"""The commands of `python -m spt_jax`."""
