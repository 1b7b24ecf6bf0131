"""Everything that knows OpenMMLab's registries and configs: backbones, layer decay, reading and plugging configs."""
