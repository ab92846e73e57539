"""A run from the command line to its work directory."""
