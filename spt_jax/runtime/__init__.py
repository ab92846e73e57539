"""Devices, processes, signals, files and measurements; independent of any model."""
