"""The rule for the length of the warm-up."""

import re

import pytest
from mmengine.config import Config
from mmengine.optim import LinearLR

from swin_mm.engine.schedule import long_warmup


def linear(**options):
    return dict(type='LinearLR', **options)


@pytest.mark.parametrize(
    'iterations, scheduler, expected',
    [
        (1000, [linear(by_epoch=False, end=100)], None),
        (300, [linear(by_epoch=False, end=50)], '50 of 300 iterations.* param_scheduler.0.end=30,'),
        (300, [dict(type=LinearLR, by_epoch=False, end=50)], '0.end=30,'),
        (300, [dict(type='mmengine.LinearLR', by_epoch=False, end=50)], '0.end=30,'),
        (250, [linear(by_epoch=False, end=26)], '0.end=25,'),
        (19, [linear(by_epoch=False, end=2)], 'remove it, or'),  # over one step it would never leave its start
        (200, [linear(end=1)], 'remove it, or'),
        (250, [linear(end=1)], None),  # an epoch has 25 iterations
        (250, dict(type='ConstantLR', end=2), 'takes 50 of 250 iterations.* param_scheduler.end=1,'),
        (250, [dict(type='ConstantLR', factor=0.1, by_epoch=False, end=9000)], 'takes 250 of 250'),
        (250, [dict(type='ConstantLR', factor=0.1)], None),  # no warm-up: it never ends
        (50, [linear(start_factor=1, end_factor=0, end=2)], None),
        (50, [dict(type='PolyLR', end=2)], None),
        (50, [dict(type='PolyLR', end=1), linear(by_epoch=False, begin=25, end=50)], None),
        (50, None, None),
    ],
)
def test_a_warm_up_takes_at_most_a_tenth(iterations, scheduler, expected):
    message = long_warmup(Config(dict(param_scheduler=scheduler)), iterations, per_epoch=25)
    if expected is None:
        assert message is None
    else:
        assert message is not None and re.search(expected, message)
