"""Training and testing on mmengine's Runner: set-up, preemption, FSDP, test-time augmentation."""
