"""Speed of our Swin beside those of mmdet, transformers and timm; run by tools/benchmark.py, not part of the wheel."""
