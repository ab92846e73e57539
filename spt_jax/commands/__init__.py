"""The commands of `python -m spt_jax`, a file for each kind."""
