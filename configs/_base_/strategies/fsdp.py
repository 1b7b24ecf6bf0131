# Weights, gradients and optimizer state are shared out over the GPUs, block by block; one file per checkpoint.
runner_type = 'FlexibleRunner'
strategy = dict(
    type='swin_mm.engine.fsdp.FSDPStrategy',
    model_wrapper=dict(auto_wrap_policy='swin_mm.engine.fsdp.by_block'),
    state_dict_cfg='full',
)
