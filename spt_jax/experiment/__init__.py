"""Runs: configs, the command line, and work directories."""
