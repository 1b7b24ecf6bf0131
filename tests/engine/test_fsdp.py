"""Checks that the private API of mmengine that engine/fsdp.py uses still exists."""

import inspect
import sys

import pytest

from swin_mm.utils.errors import DependencyError


def test_mmengine_has_the_strategy_that_ours_extends():
    from mmengine._strategy import FSDPStrategy

    for name in ('build_model', 'build_optim_wrapper', 'load_optim_state_dict', 'load_checkpoint', 'save_checkpoint'):
        assert callable(getattr(FSDPStrategy, name)), name
    assert list(inspect.signature(FSDPStrategy._wrap_model).parameters) == ['self', 'model']
    options = inspect.signature(FSDPStrategy.__init__).parameters
    assert {'model_wrapper', 'state_dict_cfg'} <= options.keys()


def test_a_version_without_it_is_named_in_the_error(monkeypatch):
    monkeypatch.delitem(sys.modules, 'swin_mm.engine.fsdp', raising=False)
    monkeypatch.setitem(sys.modules, 'mmengine._strategy', None)
    with pytest.raises(DependencyError, match='FSDP needs mmengine._strategy.*pip install.*DDP'):
        import swin_mm.engine.fsdp  # noqa: F401
