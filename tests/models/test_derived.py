"""What is derived from weights is computed once, and never stale."""

import copy
import pickle

import pytest
import torch

from swin_mm.models.derived import derived, forget
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2


def small(pyramid=SwinPyramid):
    return pyramid(embed_dims=16, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), window_size=4, out_indices=(0, 1))


def test_computed_once_until_a_weight_changes():
    weight, calls = torch.nn.Parameter(torch.ones(3)), []

    def get():
        return derived('double', (weight,), lambda: calls.append(1) or weight.detach() * 2)

    with torch.no_grad():
        assert get() is get() and len(calls) == 1
        weight.add_(1)
        assert get().tolist() == [4, 4, 4] and len(calls) == 2
        weight.data = torch.zeros(3)
        assert get().tolist() == [0, 0, 0]
        weight.data.add_(5)  # leaves no trace
        forget([weight])
        assert get().tolist() == [10, 10, 10]


CHANGES = {
    'step': lambda model: torch.optim.SGD(model.parameters(), 0.1).step(),
    'load': lambda model: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}),
    'average': lambda model: [p.data.copy_(p.data + 1) for p in model.parameters()],  # as mmengine's EMAHook does
    'type': lambda model: model.double().float(),
}


@pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
@pytest.mark.parametrize('change', CHANGES)
def test_evaluation_follows_every_change_of_the_weights(pyramid, change):
    torch.manual_seed(0)
    model, image = small(pyramid).eval(), torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        before = model(image)[-1]
    model.train()
    (model(image)[-1] ** 3).sum().backward()
    with torch.no_grad():
        CHANGES[change](model)
    model.eval()
    with torch.no_grad():
        after = model(image)[-1]
    torch.testing.assert_close(after, model(image)[-1], rtol=1e-4, atol=1e-5)  # with gradients: nothing derived
    assert change == 'type' or not torch.allclose(after, before)


def test_copies_and_pickles_do_not_carry_it():
    model, image = small().eval(), torch.randn(1, 3, 40, 50)
    with torch.no_grad():
        expected = model(image)[-1]
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(twin(image)[-1], expected)
