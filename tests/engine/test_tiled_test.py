"""What the loop for tiled testing says; tests/tools/test_test.py tests what it measures."""

from types import SimpleNamespace

import pytest

pytest.importorskip('mmseg')

from swin_mm.engine.tiled_test import TiledTestLoop


def test_objects_that_the_map_leaves_out_are_announced_once():
    lines = []
    loop = TiledTestLoop.__new__(TiledTestLoop)
    loop.warned, loop._runner = False, SimpleNamespace(logger=SimpleNamespace(warning=lines.append))
    loop._warn_of_many(100, 'few.png')
    assert lines == []
    for name in ('many.png', 'more.png'):
        loop._warn_of_many(101, name)
    (line,) = lines
    assert line.startswith('many.png has 101 predicted objects') and 'best 100' in line and 'mAP_50' in line
