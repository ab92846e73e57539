"""One thread for torch: its tiny models take no less time with more, and the other worker needs the second core."""

try:
    import torch
except ImportError:  # each file skips itself
    pass
else:
    torch.set_num_threads(1)
