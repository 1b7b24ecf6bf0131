"""Reading configs: styles, names by library, scopes, missing libraries, missing data."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS, LOOPS, METRICS, DefaultScope
from mmengine.utils import get_installed_path
from support.tool_fixtures import ROOT

import swin_mm
from swin_mm.openmmlab.config import (
    apply_options,
    build_model,
    config_errors,
    is_pure_python,
    iter_dicts,
    load_config,
    require_data,
    use_current_addresses,
    with_type_names,
)
from swin_mm.utils.errors import DependencyError, InputError

PURE_PYTHON = """
from mmdet.models import ResNet
from mmengine.optim import OptimWrapper
from torch.optim import SGD

model = dict(type=ResNet, depth=18)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.1))
"""


def python(code: str, folder: Path) -> str:
    """Run code in a new process, which has imported nothing of ours; what it printed."""
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=folder, env={'PYTHONPATH': str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# Names by library


def test_configs_are_read_by_library_name():
    cfg = load_config('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py')
    assert cfg.model.decode_head.type == 'UPerHead'
    assert cfg.filename == 'mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'


def test_working_entries_of_mmengines_table_are_not_changed(tmp_path):
    """The table of mmengine is changed where it would not find an installed library, and nowhere else."""
    code = """
import importlib.util
from importlib.metadata import distribution, PackageNotFoundError
from mmengine.config.utils import MODULE2PACKAGE
before = dict(MODULE2PACKAGE)
import swin_mm
changed = {module for module in before if MODULE2PACKAGE[module] != before[module]}
for module in changed:
    assert MODULE2PACKAGE[module] == module and importlib.util.find_spec(module), module
    try:
        distribution(before[module])
    except PackageNotFoundError:
        continue
    raise AssertionError(module + ' worked before')
assert MODULE2PACKAGE.keys() - before.keys() == {'swin_mm'}
"""
    python(code, tmp_path)
    assert Path(get_installed_path(MODULE2PACKAGE['swin_mm'])) == Path(swin_mm.__file__).parent


def test_the_change_to_mmengines_table_is_still_needed(tmp_path):
    """When this fails, mmengine finds mmseg by itself: remove the loop in register_config_libraries."""
    (tmp_path / 'child.py').write_text("_base_ = 'mmseg::_base_/default_runtime.py'")
    code = """
from importlib.metadata import distribution, PackageNotFoundError
from mmengine.config import Config
try:
    distribution('mmsegmentation')
except PackageNotFoundError:
    try:
        Config.fromfile('child.py')
    except ModuleNotFoundError:
        print('needed')
else:
    print('needed')  # by others, who have onedl-mmsegmentation
"""
    assert python(code, tmp_path) == 'needed'


def test_our_types_are_found_before_anything_imports_us(tmp_path):
    """mmengine imports the package that the prefix of a type names."""
    code = """
from mmengine.registry import MODELS
print(type(MODELS.build(dict(type='swin_mm.SwinTransformer', embed_dims=8, depths=[1], num_heads=[1],
    out_indices=[0], strides=[4]))).__module__)
"""
    assert python(code, tmp_path).splitlines()[-1] == 'swin_mm.openmmlab.backbone'


# Scopes


def scopes(cfg: Config) -> set:
    return {node['_scope_'] for node in iter_dicts(cfg.to_dict()) if '_scope_' in node}


@pytest.fixture
def child_of_ours(tmp_path) -> Path:
    """A config on a schedule of ours, whose loops and evaluator build parts of mmdet."""
    path = tmp_path / 'child.py'
    path.write_text(
        """
_base_ = 'swin_mm::_base_/schedules/cpu_epochs.py'
"""
    )
    return path


def test_children_of_our_configs_build_parts_of_their_library(child_of_ours):
    theirs = Config.fromfile(child_of_ours)
    assert 'swin_mm' in scopes(theirs), 'mmengine marks what comes from swin_mm::'
    cfg = load_config(child_of_ours)
    assert not scopes(cfg)

    def finds_parts_of_mmdet(loop: dict) -> bool:
        with LOOPS.switch_scope_and_registry(loop.get('_scope_')):  # as mmengine does while it builds the loop
            scope = DefaultScope.get_current_instance().scope_name
            with DATASETS.switch_scope_and_registry(None) as datasets, METRICS.switch_scope_and_registry(None) as found:
                return scope == 'mmdet' and None not in (datasets.get('CocoDataset'), found.get('DumpDetResults'))

    with DefaultScope.overwrite_default_scope('mmdet'):
        assert finds_parts_of_mmdet(cfg.train_cfg)
        try:
            broken = not finds_parts_of_mmdet({'_scope_': 'swin_mm'})
        except Exception:
            broken = True
        assert broken, 'mmengine handles the mark itself now: remove _remove_scopes'


def test_scopes_of_other_libraries_are_kept(tmp_path):
    (tmp_path / 'child.py').write_text(
        """
_base_ = 'mmdet::_base_/default_runtime.py'
model = dict(type='A', _scope_='mmdet', part=dict(type='B', _scope_='mmseg', part=dict(type='C', _scope_='mmdet')))
"""
    )
    assert load_config(tmp_path / 'child.py').model == {
        'type': 'A',
        'part': {'type': 'B', '_scope_': 'mmseg', 'part': {'type': 'C', '_scope_': 'mmdet'}},
    }


# Pure Python style


def test_pure_python_configs_are_read(tmp_path):
    (tmp_path / 'base.py').write_text(PURE_PYTHON)
    (tmp_path / 'child.py').write_text(
        'from mmengine.config import read_base\nwith read_base():\n    from .base import *\nmodel.update(depth=34)\n'
    )
    cfg = load_config(tmp_path / 'child.py')
    assert is_pure_python(cfg) and cfg.model.depth == 34
    named = with_type_names(cfg)
    assert not is_pure_python(named) and 'SGD' not in named
    assert named.optim_wrapper.optimizer.type == 'torch.optim.SGD'
    for config in (cfg, named):
        assert type(build_model(config, config.model)).__name__ == 'ResNet'


def test_classes_get_the_name_that_registries_resolve():
    from mmdet.models import ResNet

    cfg = with_type_names(Config({'model': {'type': ResNet, 'depth': 18}, 'steps': ({'type': dict},)}))
    assert cfg.model.type == 'mmdet.models.backbones.resnet.ResNet'
    assert cfg.steps[0].type == 'builtins.dict'
    assert type(build_model(cfg, cfg.model)) is ResNet


# What is missing


@pytest.mark.parametrize(
    'text, message',
    [
        ('model = dict(', 'cannot be read'),
        ("_base_ = 'absent.py'", 'absent.py'),
        ("custom_imports = dict(imports=['no_such_module'])", 'no_such_module is not installed; install it with: pip'),
    ],
)
def test_unreadable_configs(tmp_path, text, message):
    (tmp_path / 'config.py').write_text(text)
    with pytest.raises((InputError, DependencyError), match=message) as caught:
        load_config(tmp_path / 'config.py')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
    'missing, command',
    [('modelindex', 'pip install model-index'), ('torchvision_absent', 'pip install torchvision_absent')],
)
def test_missing_dependency_of_a_library_is_named(tmp_path, monkeypatch, missing, command):
    """As with mmdet's ConvNeXt: mmpretrain is there, but one of its own dependencies is not."""
    package = tmp_path / f'libraries/needs_{missing}'
    package.mkdir(parents=True)
    (package / '__init__.py').touch()
    (package / 'models.py').write_text(f'import {missing}')
    monkeypatch.syspath_prepend(tmp_path / 'libraries')
    monkeypatch.setitem(sys.modules, missing, None)  # it may be installed here
    path = tmp_path / 'config.py'
    path.write_text(f"custom_imports = dict(imports=['needs_{missing}.models'], allow_failed_imports=False)")
    with pytest.raises(DependencyError, match=f'{missing} is not installed; install it with: {command}$'):
        load_config(path)


def test_mistyped_options_are_reported():
    cfg = Config({'model': {'backbone': {'depths': [2, 2]}, 'heads': [{'a': 1}]}})
    options = {'model.backbone.dephts': [1, 1], 'modle.x': 1, 'randomness.seed': 1, 'model.heads.0.a': 2}
    first, second = apply_options(cfg, options)  # randomness is an argument of the Runner, heads.0.a exists
    assert 'model.backbone.dephts' in first and 'did you mean depths?' in first
    assert 'modle.x' in second and 'did you mean model?' in second
    assert cfg.randomness.seed == 1 and cfg.model.heads[0].a == 2
    with pytest.raises(InputError, match='--cfg-options does not fit'):
        apply_options(cfg, {'model.heads.7.a': 2})


def test_missing_data_is_found_where_the_dataset_would_look(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'a.json').touch()
    here = {'data_root': str(tmp_path), 'ann_file': 'a.json', 'data_prefix': {'img': 'images/'}}

    def missing(part, dataset, **evaluator):
        cfg = Config({f'{part}_dataloader': {'dataset': dataset}, f'{part}_evaluator': evaluator})
        try:
            require_data(cfg, part)
        except InputError as error:
            return str(error)

    assert missing('train', here) is None
    assert missing('train', {'type': 'RepeatDataset', 'dataset': here}) is None
    assert missing('val', here, ann_file=str(tmp_path / 'a.json')) is None
    assert missing('train', here | {'data_root': None, 'ann_file': str(tmp_path / 'a.json'), 'data_prefix': {}}) is None
    assert missing('train', here | {'ann_file': ''}) is None, 'an empty ann_file means there is none'
    assert missing('train', here | {'data_root': 's3://bucket'}) is None, 'remote storage'
    assert missing('train', here | {'data_root': '/nowhere', 'backend_args': {'backend': 'petrel'}}) is None

    assert f'{tmp_path}/b.json (train_dataloader: ann_file)' in missing('train', here | {'ann_file': 'b.json'})
    other = {
        'data_prefix': {'img': 'other', 'seg': 'masks'},
        'pipeline': [{'type': 'LoadAnnotations', 'with_seg': True}],
    }
    both = {'type': 'ConcatDataset', 'datasets': [here, here | other]}
    error = missing('test', both)
    assert f'{tmp_path}/other (test_dataloader: img)' in error and f'{tmp_path}/masks (test_dataloader: seg)' in error
    assert '/nowhere.json (val_evaluator: ann_file)' in missing('val', here, ann_file='/nowhere.json')


def test_segmentation_maps_that_no_transform_reads_may_be_missing(tmp_path):
    (tmp_path / 'images').mkdir()
    node = {'data_root': str(tmp_path), 'data_prefix': {'img': 'images/', 'seg': 'panoptic/'}}

    def check(step: str) -> None:
        pipeline = [{'type': step, 'with_mask': True}]
        require_data(Config({'train_dataloader': {'dataset': node | {'pipeline': pipeline}}}), 'train')

    check('LoadAnnotations')
    with pytest.raises(InputError, match='panoptic/ .train_dataloader: seg'):
        check('LoadPanopticAnnotations')


# Addresses


def test_addresses_at_a_host_that_is_gone_are_replaced_everywhere_with_one_note(tmp_path, capsys):
    gone, new = 'https://download.openmmlab.com/mmdetection/v2.0/', 'https://mmassets.onedl.ai/mmdetection/v2.0/'
    (tmp_path / 'stock.py').write_text(
        f"""
load_from = '{gone}a.pth'
init = dict(type='Pretrained', checkpoint='{gone}b.pth')
model = dict(type='X', teacher_ckpt='{gone}c.pth', backbone=dict(init_cfg=init), blocks=({{'init_cfg': [init]}}, 2))
val_dataloader = dict(dataset=dict(data_root='{gone}d/'))
test_dataloader = val_dataloader
kept = 'see {gone}a.pth and open-mmlab://resnet50_v1c'
"""
    )
    (tmp_path / 'child.py').write_text("_base_ = './stock.py'\nmodel = dict(neck=None)\n")
    cfg = load_config(tmp_path / 'child.py')
    assert cfg.load_from == f'{new}a.pth'
    assert cfg.model.teacher_ckpt == f'{new}c.pth'
    assert cfg.model.backbone.init_cfg.checkpoint == cfg.model.blocks[0]['init_cfg'][0].checkpoint == f'{new}b.pth'
    assert cfg.val_dataloader.dataset.data_root == cfg.test_dataloader.dataset.data_root == f'{new}d/'
    assert cfg.kept.startswith(f'see {gone}')
    error = capsys.readouterr().err
    assert error.count('note: ') == 1 and 'mmassets.onedl.ai instead of download.openmmlab.com' in error
    assert gone not in cfg.pretty_text.replace(cfg.kept, '')

    apply_options(cfg, {'load_from': f'{gone}e.pth'})
    assert cfg.load_from == f'{new}e.pth'
    assert capsys.readouterr().err.count('note: ') == 1
    before = cfg.model
    use_current_addresses(cfg)
    assert cfg.model is before and not capsys.readouterr().err


def test_a_full_disk_is_not_a_fault_of_the_config():
    cfg = Config(dict(work_dir='runs/x'))
    with pytest.raises(InputError, match='^runs/x cannot be written: No space left on device$'), config_errors(cfg):
        raise OSError(errno.ENOSPC, 'No space left on device')
    with pytest.raises(InputError, match='cannot be built: .*No such file'), config_errors(cfg):
        raise FileNotFoundError(errno.ENOENT, 'No such file')
