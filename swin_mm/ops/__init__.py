"""Window layout and attention kernels, in plain PyTorch."""
