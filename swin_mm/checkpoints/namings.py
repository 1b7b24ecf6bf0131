"""How each family of checkpoints names Swin's parameters: one row per naming."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Naming:
    """A key naming.

    Args:
        name: what the family is called.
        anchor: its name of the patch embedding's weight; finding it tells the naming and the prefix.
        rules: (theirs, ours), replaced in this order wherever they occur in a key.
        unfold: patch merging takes its channels in the order of ``nn.Unfold`` (channel, row, column) instead of the
            official (column, row, channel).
    """

    name: str
    anchor: str
    rules: tuple[tuple[str, str], ...] = ()
    unfold: bool = False

    def to_ours(self, key: str, value: Tensor) -> tuple[str, Tensor]:
        """Our key and value for one of this naming's."""
        for theirs, ours in self.rules:
            key = key.replace(theirs, ours)
        if self.unfold and '.downsample.' in key:
            # (..., C * row * column) -> (..., column * row * C)
            value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
        return key, value


NAMINGS = (
    Naming('official', 'patch_embed.proj.weight'),
    Naming(
        'mmdet / mmseg',
        'patch_embed.projection.weight',
        rules=(
            ('patch_embed.projection.', 'patch_embed.proj.'),
            ('stages.', 'layers.'),
            ('.attn.w_msa.', '.attn.'),
            ('.ffn.layers.0.0.', '.mlp.fc1.'),
            ('.ffn.layers.1.', '.mlp.fc2.'),
        ),
        unfold=True,
    ),
)

# Keys that files hold and a backbone has no use for: (pattern of our key, why).
LEFTOVERS = (
    (r'.*\b(relative_position_index|relative_coords_table|attn_mask)', 'rebuilt, never loaded'),
    (r'head\..*', 'classification head'),
    (r'norm\..*', "classifier's last norm"),
)
