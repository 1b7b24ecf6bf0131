"""Swin Transformer V1 and V2 as plain PyTorch modules."""
