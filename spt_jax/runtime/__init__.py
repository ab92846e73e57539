"""Devices, processes, signals, files and measurements: what knows no model."""
