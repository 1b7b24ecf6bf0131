# Parameters without weight decay, by parts of their names; swin_mm.openmmlab.layer_decay.NO_DECAY has the same list.
no_decay = dict(
    absolute_pos_embed=dict(decay_mult=0.0),
    relative_position_bias_table=dict(decay_mult=0.0),
    norm=dict(decay_mult=0.0),
)
