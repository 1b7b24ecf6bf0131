"""OpenMMLab integration: registries, backbones, layer-wise decay, reading configs and plugging Swin into them."""
