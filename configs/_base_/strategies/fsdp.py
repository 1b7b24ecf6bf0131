# FSDP: shards weights, gradients and optimizer state over the GPUs, block by block; each checkpoint is one file.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='swin_mm.engine.fsdp.FSDPStrategy',
    model_wrapper=dict(auto_wrap_policy='swin_mm.engine.fsdp.by_block'),
    state_dict_cfg='full',
)
