"""Sweeps: which settings to try, training them side by side, and when to stop."""
