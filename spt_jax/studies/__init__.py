"""Many runs or many prompts: sweeps, comparison, and the probe of a base."""
