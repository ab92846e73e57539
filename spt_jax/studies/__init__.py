"""Studies with many runs or prompts: sweeps, comparisons, and linear probes."""
