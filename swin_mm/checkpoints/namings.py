"""How each family of checkpoints names and lays out Swin's parameters: one row per naming, used in both directions.

Our names are the official repository's, with `norm0`, `norm1`, ... for output norms, `norm` for a classifier's last
norm and `head` for its linear layer.
"""

import functools
import re
from dataclasses import dataclass, replace

Names = tuple[tuple[str, str], ...]  # (ours, theirs)

STAGES = 8  # more than any published model has


@dataclass(frozen=True)
class Naming:
    """A key naming. Parameters that its tables do not list have our names.

    Args:
        name: of the family.
        parts: beginnings of keys as (ours, theirs), with `{i}` for a stage, and `{i+1}`, `{2i+1}`, `{2i+2}` where
            theirs are numbered differently; a leading `/` means outside of ``wrappers``. If two rows have the
            same name of ours, the first is written and both are read.
        inside: names within a block.
        wrappers: names of the backbone in the family's classifiers; the first is written, all are read.
        unfold: patch merging orders its channels as ``nn.Unfold`` does (channel, row, column) instead of the official
            (column, row, channel).
        qkv_bias: V2 has one bias for q, k and v, with zeros for k, instead of two vectors.
        flat_position: the absolute position embedding is (1, H * W, C) instead of (1, C, H, W).
        version: 1 or 2 if only that version of Swin has this naming.
        must_match: a pattern that some key matches; distinguishes namings whose patch embedding has the same name.
        must_not_match: a pattern that no key matches.
        unsupported: a pattern of our names that the family does not have.
        index: the shape of the position index that strict loading expects, 'square' or 'flat'; '' for none.
        masks: strict loading of classifiers expects attention masks.
        whole: whole detectors and segmentors are published in it, not only classifiers.
        last_norm: its classifiers store the last norm as the last stage's output norm.
        root_key: the key of the file that holds the state dict; '' for none.
    """

    name: str
    parts: Names = ()
    inside: Names = ()
    wrappers: tuple[str, ...] = ('',)
    unfold: bool = False
    qkv_bias: bool = False
    flat_position: bool = False
    version: int | None = None
    must_match: str = ''
    must_not_match: str = r'\A\Z'
    unsupported: str = r'\A\Z'
    index: str = ''
    masks: bool = False
    whole: bool = False
    last_norm: bool = False
    root_key: str = ''

    @property
    def anchor(self) -> str:
        """Their name of the patch embedding's weight, by which naming and prefix are found."""
        return self.theirs('patch_embed.proj.weight')

    def root(self, prefix: str) -> str:
        """The prefix of keys outside of the wrapper, given that of the backbone's keys."""
        return prefix.removesuffix(next((w for w in self.wrappers if w and prefix.endswith(w)), ''))

    def ours(self, key: str) -> str:
        """Our name for one of theirs."""
        return _inside_block(_replace_start(key, _starts(self.parts, False)), _starts(self.inside, False))

    def theirs(self, key: str) -> str:
        """Their name for one of ours; a leading `/` means outside of the wrapper."""
        return _replace_start(_inside_block(key, _starts(self.inside, True)), _starts(self.parts, True))


@functools.cache
def _starts(names: Names, to_theirs: bool) -> dict[str, str]:
    """Key prefix -> replacement, for every stage, longest first."""
    found: dict[str, str] = {}
    for ours, theirs in names:
        for i in range(STAGES if '{i}' in ours else 1):
            counted = theirs
            for text, number in (('{i}', i), ('{i+1}', i + 1), ('{2i+1}', 2 * i + 1), ('{2i+2}', 2 * i + 2)):
                counted = counted.replace(text, str(number))
            pair = (ours.replace('{i}', str(i)), counted)
            found.setdefault(*(pair if to_theirs else pair[::-1]))
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def _inside_block(key: str, starts: dict[str, str]) -> str:
    """Replace the beginning of a name within a block, after `layers.i.blocks.j.`."""
    block = re.match(r'layers\.\d+\.blocks\.\d+\.', key)
    return block[0] + _replace_start(key.removeprefix(block[0]), starts) if block else key


def _replace_start(key: str, starts: dict[str, str]) -> str:
    for start, replacement in starts.items():
        if key == start or key.startswith(start + '.'):
            return replacement + key.removeprefix(start)
    return key


OUTPUT_NORMS = r'norm\d+\..*'

OFFICIAL = Naming(
    'official',
    flat_position=True,
    must_match=r'layers\.\d+\.blocks\.',
    index='square',
    masks=True,
    whole=True,
    root_key='model',
)
MMDET = Naming(
    'mmdet / mmseg',
    parts=(('patch_embed.proj', 'patch_embed.projection'), ('layers.{i}', 'stages.{i}')),
    inside=(
        ('attn', 'attn.w_msa'),
        ('mlp.fc1', 'ffn.layers.0.0'),
        ('mlp.act', 'ffn.layers.0.1'),
        ('mlp.fc2', 'ffn.layers.1'),
    ),
    unfold=True,
    flat_position=True,
    version=1,
    must_match=r'stages\.\d+\.blocks\.',
    index='square',
    whole=True,
    root_key='state_dict',
)
MMPRETRAIN = replace(
    MMDET,
    name='mmpretrain',
    parts=(*MMDET.parts, ('head', '/head.fc')),
    wrappers=('backbone.',),
    whole=False,
    last_norm=True,
    must_match=r'(\A|\.)head\.fc\.',
)
TIMM = Naming(
    'timm',
    parts=(('layers.{i}.downsample', 'layers.{i+1}.downsample'), ('head', 'head.fc')),
    must_match=r'layers\.[1-9]\.downsample\.',
    must_not_match=r'layers\.0\.downsample\.',
    unsupported=f'{OUTPUT_NORMS}|absolute_pos_embed',
)
TRANSFORMERS = Naming(
    'transformers',
    parts=(
        ('patch_embed.proj', 'embeddings.patch_embeddings.projection'),
        ('patch_embed', 'embeddings'),
        ('absolute_pos_embed', 'embeddings.position_embeddings'),
        ('layers', 'encoder.layers'),
        ('norm', 'layernorm'),
        ('norm', 'swin.layernorm'),  # in files of its SwinBackbone
        ('norm{i}', '/hidden_states_norms.stage{i+1}'),
        ('norm{i}', '/hidden_states_norms.{i}'),  # its MaskFormerSwinBackbone
        ('head', '/classifier'),
    ),
    inside=(
        ('norm1', 'layernorm_before'),
        ('norm2', 'layernorm_after'),
        ('attn.q', 'attention.self.query'),
        ('attn.k', 'attention.self.key'),
        ('attn.v', 'attention.self.value'),
        ('attn.cpb_mlp', 'attention.self.continuous_position_bias_mlp'),
        ('attn.proj', 'attention.output.dense'),
        ('attn', 'attention.self'),
        ('mlp.fc1', 'intermediate.dense'),
        ('mlp.fc2', 'output.dense'),
    ),
    wrappers=('swin.', 'model.'),
    flat_position=True,
    version=1,
    must_match=r'encoder\.layers\.0\.blocks\.',
)
TORCHVISION = Naming(
    'torchvision',
    parts=(
        ('patch_embed.proj', 'features.0.0'),
        ('patch_embed.norm', 'features.0.2'),
        ('layers.{i}.blocks', 'features.{2i+1}'),
        ('layers.{i}.downsample', 'features.{2i+2}'),
    ),
    inside=(('mlp.fc1', 'mlp.0'), ('mlp.fc2', 'mlp.3')),
    qkv_bias=True,
    must_match=r'features\.1\.0\.attn\.',
    unsupported=f'{OUTPUT_NORMS}|absolute_pos_embed',
    index='flat',
)

# Most specific first; the first match wins.
NAMINGS = (
    TIMM,
    OFFICIAL,
    MMPRETRAIN,
    replace(
        MMPRETRAIN,
        parts=(*MMPRETRAIN.parts, ('layers.{i}.downsample', 'stages.{i+1}.downsample')),
        version=2,
        must_match=MMDET.must_match,
    ),
    MMDET,
    replace(
        TRANSFORMERS,
        name='transformers 5 (in memory)',
        inside=(
            ('norm1', 'layernorm_before'),
            ('norm2', 'layernorm_after'),
            *((f'attn.{ours}', f'attention.{ours}_proj') for ours in 'qkv'),
            ('attn.proj', 'attention.o_proj'),
            ('attn', 'attention.relative_position_bias'),
        ),
        must_match=r'\.attention\.q_proj\.',
    ),
    TRANSFORMERS,
    replace(TRANSFORMERS, wrappers=('swinv2.',), version=2, unsupported=OUTPUT_NORMS),
    TORCHVISION,
)

# The namings that conversions write, by target.
TARGETS: dict[str, tuple[Naming, ...]] = {
    'official': (OFFICIAL,),
    'mmdet': (MMDET,),
    'mmseg': (MMDET,),
    'mmpretrain': tuple(n for n in NAMINGS if n.name == MMPRETRAIN.name),
    'timm': (TIMM,),
    'transformers': tuple(n for n in NAMINGS if n.name == TRANSFORMERS.name),
    'torchvision': (TORCHVISION,),
    'swin_mm': (Naming('swin_mm', whole=True, root_key='state_dict'),),
}

# Buffers that files hold and models compute from their sizes, by our names.
REBUILT = r'.*\b(relative_position_index|relative_coords_table|attn_mask|k_bias)'

# Parts of a classifier that a backbone does not have: (pattern of our name, what it is).
CLASSIFIER = ((r'head\..*', 'classification head'), (r'norm\..*', "classifier's last norm"))

# Keys that no model needs.
LEFTOVERS = (
    (r'(.*\.)?mask_token', 'mask token of pre-training'),
    (r'(.*\.)?ema_.*', 'moving average beside the weights'),
)

# Other architectures with similar keys: (pattern of a key in the file, what it is).
RELATIVES = (
    (r'\._moe_layer\.', 'a Swin-MoE, a mixture of experts'),
    (r'\.spatial_mlp\.', 'a Swin-Mixer (Swin MLP), which has no attention'),
    (r'\.attn\.meta_mlp\.', "timm's swinv2_cr, whose parts differ from Swin V2's"),
)
