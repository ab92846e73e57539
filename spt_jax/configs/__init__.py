"""Configs that ship with the package; `spt-jax configs` lists them."""
