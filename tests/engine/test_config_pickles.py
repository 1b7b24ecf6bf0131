"""Configs that would make a library open a pickle or YAML file are rejected."""

import pytest
from mmengine.config import Config

from swin_mm.engine.config_pickles import require_no_pickles
from swin_mm.utils.errors import InputError


@pytest.mark.parametrize(
    'part, section, setting, named',
    [
        ('train', 'train_dataloader', {'dataset': {'proposal_file': 'x.pkl'}}, 'dataset.proposal_file'),
        ('val', 'val_dataloader', {'dataset': {'datasets': [{'ann_file': 'x.pickle'}]}}, 'datasets.0.ann_file'),
        ('val', 'val_dataloader', {'dataset': {'ann_file': 'x.yaml'}}, 'dataset.ann_file'),
        ('train', 'train_dataloader', {'dataset': {'pipeline': [{'decode_backend': 'pickle'}]}}, 'decode_backend'),
        ('test', 'test_evaluator', [{'file_format': 'pkl'}], 'test_evaluator.0.file_format'),
        ('test', 'test_evaluator', {'type': 'mmdet.CocoOccludedSeparatedMetric'}, 'CocoOccludedSeparatedMetric'),
        ('model', 'model', {'decode_head': {'loss_decode': {'class_weight': 'w.pkl'}}}, 'loss_decode.class_weight'),
    ],
)
def test_pickles_are_named_and_refused(part, section, setting, named):
    cfg = Config({section: setting})
    with pytest.raises(InputError, match=named):
        require_no_pickles(cfg, part)
    other = {'train': 'val', 'val': 'test', 'test': 'train', 'model': 'train'}[part]
    require_no_pickles(cfg, other)


def test_pickles_that_are_written_or_read_safely_are_allowed():
    cfg = Config(
        {
            'model': {'backbone': {'init_cfg': {'type': 'Pretrained', 'checkpoint': 'maskformer.pkl'}}},
            'test_evaluator': [{'type': 'DumpDetResults', 'out_file_path': 'x.pkl'}],
            'test_dataloader': {'dataset': {'ann_file': 'x.json', 'metainfo': {'classes': ('pickle', 'pkl')}}},
        }
    )
    require_no_pickles(cfg, 'test', 'model')
