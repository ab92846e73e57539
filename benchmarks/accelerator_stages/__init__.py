"""The stages of accelerator.py, one module each, and their shared code.

`python -m benchmarks.accelerator_stages` runs one of them in its process.
"""
