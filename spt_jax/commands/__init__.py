"""The commands of `spt-jax`."""
