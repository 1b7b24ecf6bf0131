"""The reference models: their features belong to their state dicts."""

import sys

import pytest
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from support.oracles import relative_error
from support.reference_models import BUILDERS, FOLDER, reference

# Where each library keeps the last norm.
LAST_NORM = {
    'mmdet': 'norm3',
    'mmseg': 'norm3',
    'official': 'norm',
    'mmpretrain': 'backbone.norm3',
    'timm': 'norm',
    'torchvision': 'norm',
    'transformers': '{name}.layernorm',
    'transformers-memory': '{name}.layernorm',
    'transformers-backbone': 'hidden_states_norms.stage4',
}
V1_ONLY = ('mmdet', 'mmseg')
ALL = [(library, version) for library in BUILDERS for version in (1, 2) if version == 1 or library not in V1_ONLY]


@pytest.mark.parametrize('library, version', ALL)
@torch.no_grad()
def test_features_are_the_stages_before_merging_and_norm(library, version):
    theirs = reference(library, version, window=4, image_size=128)
    image = torch.rand(2, 3, 128, 128)
    maps = theirs.features(image)
    assert [m.shape for m in maps] == [(2, 96 * 2**i, 32 // 2**i, 32 // 2**i) for i in range(4)]
    if (library, version) == ('transformers-backbone', 2):
        assert theirs.classify is None
        return
    norm = LAST_NORM[library].format(name=('swin', 'swinv2')[version - 1])
    weight, bias = theirs.state[f'{norm}.weight'], theirs.state[f'{norm}.bias']
    expected = F.layer_norm(maps[3].movedim(1, 3), (768,), weight, bias).movedim(3, 1)
    assert relative_error([theirs.classify(image)], [expected]) < 1e-5


@pytest.mark.parametrize('library', ['timm', 'torchvision', 'mmpretrain'])
def test_imports_leave_the_environment_as_it_was(library):
    reference(library, 1, window=4, image_size=128)
    assert str(FOLDER) not in sys.path
    assert not any(name.partition('.')[0] == 'mmpretrain' for name in sys.modules)
    assert 'mmpretrain' not in MODELS.children
