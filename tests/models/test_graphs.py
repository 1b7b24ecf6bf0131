"""CUDA graphs: which records are kept. What a record does needs a GPU."""

import copy
import pickle

import pytest
import torch

import swin_mm
from swin_mm.models.graphs import GraphedForward

SMALL = dict(embed_dims=16, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1))


@pytest.fixture
def graphed(monkeypatch):
    """On a CPU: a record is the forward itself, and noted."""
    recorded = []
    monkeypatch.setattr(GraphedForward, '_record', lambda self, image: recorded.append(image.shape[2:]) or self.forward)
    model = torch.nn.Linear(2, 2)
    return GraphedForward(model, lambda image: (image.sum(),), 2), recorded, model


def test_the_sizes_used_last_are_kept(graphed):
    forward, recorded, _ = graphed
    for side in (8, 9, 8, 10, 8, 9):
        assert forward(torch.ones(1, 1, side, side))[0] == side * side
    assert [size[0] for size in recorded] == [8, 9, 10, 9]  # 9 made place for 10, 10 for 9


def test_moved_weights_and_another_type_get_their_own(graphed):
    forward, recorded, model = graphed
    forward(torch.ones(1, 1, 8, 8))
    with torch.no_grad():
        model.weight.zero_()
    forward(torch.ones(1, 1, 8, 8))
    assert len(recorded) == 1
    model.weight.data = torch.ones(2, 2)
    forward(torch.ones(1, 1, 8, 8))
    forward(torch.ones(1, 1, 8, 8, dtype=torch.float64))
    assert len(recorded) == 3


def test_copies_of_a_backbone_leave_its_records_behind():
    model = swin_mm.SwinTransformer(cuda_graphs=2, **SMALL)
    model.__dict__['_graphed'] = GraphedForward(model, model.forward, 2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert '_graphed' not in twin.__dict__ and twin.cuda_graphs == 2


def test_both_ways_at_once_are_refused():
    with pytest.raises(ValueError, match='reduce-overhead'):
        swin_mm.SwinTransformer(compile=True, cuda_graphs=2, **SMALL)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_replays_equal_the_forward_over_changing_sizes_and_weights():
    plain = swin_mm.SwinTransformer(**SMALL).cuda().eval()
    model = swin_mm.SwinTransformer(cuda_graphs=2, **SMALL).cuda().eval()
    model.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for side in (64, 90, 64, 77, 90):
            image = torch.randn(1, 3, side, 80, device='cuda')
            for a, b in zip(model(image), plain(image), strict=True):
                torch.testing.assert_close(a, b)
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                p.add_(0.01), q.add_(0.01)
