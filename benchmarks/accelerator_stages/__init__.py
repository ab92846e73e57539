"""The stages of accelerator.py, one module each, and what they share. `python -m benchmarks.accelerator_stages` runs
one of them in a process of its own."""
