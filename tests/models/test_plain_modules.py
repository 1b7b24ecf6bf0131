"""The model behaves like any composition of PyTorch modules, whatever users do to its weights and modules.

Each test changes weights in one of the ways that libraries do, or attaches something to a module, and compares the
model with a fresh copy, or with mmdet's Swin changed in the same way.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.registry import MODELS
from support.oracles import SMALL, mmdet_twin, randomise, relative_error, scale_parameters
from support.reference_models import import_oracle
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import swin_mm
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.utils.compat import TORCH

BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
TINY = dict(
    embed_dims=16,
    depths=(2, 2),
    num_heads=(1, 2),
    strides=(4, 2),
    window_size=4,
    out_indices=(0, 1),
    drop_path_rate=0.0,
)
IMAGE = torch.rand(2, 3, 44, 61, generator=torch.Generator().manual_seed(0))  # every map needs padding


def tiny(pyramid=SwinPyramid, **options):
    return randomise(pyramid(**TINY | options)).eval()


def evaluate(model):
    with torch.no_grad():
        return model(IMAGE)


def fresh(model):
    """A new model with the same weights, and without anything that the old one may have cached."""
    pyramid = SwinPyramidV2 if isinstance(model, SwinPyramidV2) else SwinPyramid
    copied = pyramid(**TINY).eval()
    copied.load_state_dict({name: value.detach().clone() for name, value in model.state_dict().items()})
    return copied


def assert_follows_weights(model, before):
    after = evaluate(model)
    assert relative_error(after, evaluate(fresh(model))) < 1e-6
    assert relative_error(after, before) > 1e-4, 'the change has no effect'


# Weights change in place, by every route


def step(optimizer_type, **options):
    def change(model):
        optimizer = optimizer_type(model.parameters(), lr=0.05, **options)
        sum((m**2).mean() for m in model(IMAGE)).backward()
        optimizer.step()

    return change


def average(model):
    teacher = ExponentialMovingAverage(nn.Sequential(model), momentum=0.5)  # copies the model
    student = randomise(copy.deepcopy(model), seed=1)
    teacher.update_parameters(nn.Sequential(student))
    for name, value in teacher.module[0].state_dict().items():
        model.state_dict()[name].copy_(value)


def through_data(change):
    def apply(model):
        for parameter in model.parameters():
            change(parameter)

    return apply


def write_numpy(parameter):
    parameter.data.numpy()[...] *= 1.5


CHANGES = {
    **{
        f'{kind.__name__}-{how}': step(kind, **({} if how == 'plain' else {how: True}))
        for kind in (torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad)
        for how in ('plain', 'foreach', 'fused')
    },
    'averaged weights': average,
    'data.mul_': through_data(lambda p: p.data.mul_(1.5)),
    'data.copy_': through_data(lambda p: p.data.copy_(p.data * 1.5)),
    'data = ': through_data(lambda p: setattr(p, 'data', p.data * 1.5)),
    'detach().mul_': through_data(lambda p: p.detach().mul_(1.5)),
    'numpy': through_data(write_numpy),
    'foreach on data': lambda model: torch._foreach_mul_([p.data for p in model.parameters()], 1.5),
    'load_state_dict': lambda model: model.load_state_dict({k: v * 1.5 for k, v in model.state_dict().items()}),
    'load_state_dict(assign)': lambda model: model.load_state_dict(
        {k: v * 1.5 for k, v in model.state_dict().items()}, assign=True
    ),
    'swap_tensors': through_data(lambda p: torch.utils.swap_tensors(p, nn.Parameter(p.detach() * 1.5))),
    'half().float()': lambda model: model.half().float() and model.patch_embed.proj.weight.data.mul_(1.5),
}


@BOTH
@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('training', [False, True])
def test_output_follows_changed_weights(pyramid, change, training):
    model = tiny(pyramid)
    before = evaluate(model)
    model.train(training)
    CHANGES[change](model)
    model.eval()
    assert_follows_weights(model, before)
    evaluate(model)
    CHANGES[change](model)  # once more: also a change that swaps memory back and forth is seen
    assert_follows_weights(model, before)


def test_output_follows_moving_averages_updated_in_evaluation():
    model = tiny()
    teacher = ExponentialMovingAverage(model, momentum=0.3)
    teacher.eval()
    before = evaluate(teacher.module)
    for seed in range(3):
        teacher.update_parameters(randomise(model, seed + 1))
        assert_follows_weights(teacher.module, before)


def test_output_follows_weights_that_another_process_trains():
    """Memory shared with another process: this one is not notified of writes."""
    model = tiny().share_memory()
    before = evaluate(model)
    context = torch.multiprocessing.get_context('spawn')
    process = context.Process(target=scale_parameters, args=(model,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_follows_weights(model, before)


def test_conversion_that_swaps_parameters():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model = tiny()
        expected = evaluate(model)
        assert relative_error(evaluate(model.double().float()), expected) < 1e-6
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@BOTH
def test_lora_unmerged_merged_and_unmerged_again(pyramid):
    peft = import_oracle('peft')
    model = tiny(pyramid)
    evaluate(model)
    config = peft.LoraConfig(target_modules=['qkv', 'proj', 'fc1', 'fc2'], r=4, init_lora_weights=False)
    config.exclude_modules = ['patch_embed.proj']
    adapted = peft.get_peft_model(model, config).eval()
    expected = evaluate(adapted)
    assert relative_error(expected, evaluate(tiny(pyramid))) > 1e-2
    adapted.merge_adapter()
    assert relative_error(evaluate(adapted), expected) < 1e-5
    adapted.unmerge_adapter()
    assert relative_error(evaluate(adapted), expected) < 1e-5
    merged = adapted.merge_and_unload()
    assert relative_error(evaluate(merged), expected) < 1e-5
    assert all(type(block.attn.qkv) is nn.Linear for stage in merged.layers for block in stage.blocks)


# Reparametrised weights


def parametrize_scale(layer):
    class Scale(nn.Module):
        def forward(self, weight):
            return 2 * weight

    nn.utils.parametrize.register_parametrization(layer, 'weight', Scale())


REPARAMETRISED = {
    'weight_norm by hook': nn.utils.weight_norm,
    'weight_norm': parametrizations.weight_norm,
    'spectral_norm by hook': nn.utils.spectral_norm,
    'spectral_norm': parametrizations.spectral_norm,
    'prune': lambda layer: prune.l1_unstructured(layer, 'weight', 0.3),
    'prune bias': lambda layer: prune.random_unstructured(layer, 'bias', 0.5),
    'parametrize': parametrize_scale,
}


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize('where', ['attn.qkv', 'attn.proj', 'mlp.fc1', 'mlp.fc2'])
@pytest.mark.parametrize('what', REPARAMETRISED)
def test_reparametrised_layers_evaluate_and_train_as_in_mmdet(where, what):
    """Also after an evaluation; outputs equal those of mmdet's Swin with the same reparametrisation."""
    names = {
        'attn.qkv': 'attn.w_msa.qkv',
        'attn.proj': 'attn.w_msa.proj',
        'mlp.fc1': 'ffn.layers.0.0',
        'mlp.fc2': 'ffn.layers.1',
    }
    theirs, ours = mmdet_twin(**SMALL)
    for block, name in ((theirs.stages[0].blocks[1], names[where]), (ours.layers[0].blocks[1], where)):
        torch.manual_seed(0)
        REPARAMETRISED[what](block.get_submodule(name))
        for m in (theirs, ours):
            m.eval()
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        expected, actual = theirs(image), ours(image)
    assert relative_error(actual, expected) < 2e-5
    sum((m**2).mean() for m in ours(image)).backward()
    layer = ours.layers[0].blocks[1].get_submodule(where)
    without = [name for name, p in layer.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    with torch.no_grad():
        assert relative_error(ours(image), expected) < 2e-5


# Hooks


def modules_that_are_called(model):
    """Every module, except containers, whose children are called one by one, and dropout inside of the kernel."""
    skipped = (nn.ModuleList,)
    return {n: m for n, m in model.named_modules() if n and not isinstance(m, skipped) and not n.endswith('attn_drop')}


@BOTH
@pytest.mark.parametrize('grad', [False, True])
def test_forward_hooks_see_every_module_once_with_whole_maps(pyramid, grad):
    image = torch.rand(3, 3, 256, 256)
    model = tiny(pyramid)
    calls = {}
    handles = [
        module.register_forward_hook(
            lambda module, inputs, output, name=name: calls.setdefault(name, []).append((inputs[0].shape, output.shape))
        )
        for name, module in modules_that_are_called(model).items()
    ]
    with torch.set_grad_enabled(grad):
        model(image)
    assert {name: len(seen) for name, seen in calls.items()} == dict.fromkeys(modules_that_are_called(model), 1)
    for name, ((taken, given),) in calls.items():
        if 'cpb_mlp' not in name:
            assert taken[0] == given[0] == 3, name
        if name.startswith('layers.0.blocks') and 'cpb_mlp' not in name:
            assert taken[1:3] == given[1:3] == (64, 64), name
    for handle in handles:
        handle.remove()


@BOTH
@pytest.mark.parametrize('grad', [False, True])
def test_return_values_of_hooks_are_used(pyramid, grad):
    """A hook that flips the channels of an output is equivalent to a module that flips them."""
    unchanged = evaluate(tiny(pyramid, num_heads=(2, 4)))
    leaves = [name for name, m in modules_that_are_called(tiny(pyramid)).items() if not [*m.children()]]
    assert len(leaves) > 40
    for name in leaves:
        with_hook, replaced = (tiny(pyramid, num_heads=(2, 4)) for _ in range(2))
        with_hook.get_submodule(name).register_forward_hook(lambda module, inputs, output: output.flip(-1))
        parent, _, attribute = name.rpartition('.')
        setattr(replaced.get_submodule(parent), attribute, Flipped(replaced.get_submodule(name)))
        with torch.set_grad_enabled(grad):
            hooked, expected = with_hook(IMAGE), replaced(IMAGE)
        assert relative_error(hooked, expected) < 1e-5 < relative_error(hooked, unchanged), name


class Flipped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x).flip(-1)


@BOTH
def test_identity_hooks_change_nothing(pyramid):
    model = tiny(pyramid)
    expected = evaluate(model)
    for module in modules_that_are_called(model).values():
        module.register_forward_pre_hook(lambda module, inputs: None)
        module.register_forward_hook(lambda module, inputs, output: output)
    assert relative_error(evaluate(model), expected) < 1e-6


def test_hooks_on_the_projection_see_padding_as_in_mmdet():
    """An offset that a hook adds to q, k and v reaches padded tokens too."""
    theirs, ours = mmdet_twin(**SMALL)
    for layer in (theirs.stages[0].blocks[1].attn.w_msa.qkv, ours.layers[0].blocks[1].attn.qkv):
        layer.register_forward_hook(lambda module, inputs, output: output + 1)
    image = torch.rand(1, 3, 50, 70)
    with torch.no_grad():
        assert relative_error(ours(image), theirs(image)) < 2e-5


# Dropout, activations, derivatives


def test_monte_carlo_dropout_is_random():
    model = tiny(drop_rate=0.2, attn_drop_rate=0.2)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(model), evaluate(model), strict=True))
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            module.train()
            first, second = evaluate(model), evaluate(model)
            assert not torch.equal(first[1], second[1]), f'{name} does not act'
            module.eval()


@pytest.mark.parametrize('act', [dict(type='ReLU', inplace=True), dict(type='SiLU', inplace=True), dict(type='ReLU')])
def test_activations_train_as_in_mmdet(act):
    theirs, ours = mmdet_twin(**SMALL, act_cfg=act)
    image = torch.rand(1, 3, 50, 70)
    grads = []
    for model in (theirs, ours):
        maps = model.train() or model  # mmdet's train() returns None
        maps = model(image)
        sum((m**2).mean() for m in maps).backward()
        first = model.patch_embed.projection if model is theirs else model.patch_embed.proj
        grads.append(first.weight.grad)
    assert relative_error([grads[1]], [grads[0]]) < 1e-4


@BOTH
@pytest.mark.parametrize('attention', ['reference', 'auto'])
def test_second_derivatives_and_forward_mode_in_float64(pyramid, attention):
    options = dict(embed_dims=4, depths=(2,), num_heads=(1,), strides=(4,), window_size=2, out_indices=(0,))
    model = randomise(pyramid(**options, drop_path_rate=0.0, attention=attention)).double().eval()
    image = torch.rand(1, 3, 9, 14, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: model(x)[0], image, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: model(x)[0], image, fast_mode=True)


@BOTH
def test_forward_mode_in_float32(pyramid):
    model = tiny(pyramid)
    direction = torch.randn(IMAGE.shape)
    _, tangents = torch.func.jvp(model, (IMAGE,), (direction,))
    exact = copy.deepcopy(model).double()
    _, expected = torch.func.jvp(exact, (IMAGE.double(),), (direction.double(),))
    assert relative_error(tangents, expected) < 1e-4


def test_second_derivatives_of_fused_kernels_raise():
    model = tiny()
    (gradient,) = torch.autograd.grad((model(IMAGE)[1] ** 2).sum(), model.patch_embed.proj.weight, create_graph=True)
    with pytest.raises(RuntimeError, match="attention='reference'|_scaled_dot_product"):
        gradient.sum().backward()


@pytest.mark.parametrize('attention', ['cpu', 'sdpa'])
def test_forward_mode_of_a_kernel_chosen_by_name_raises(attention):
    from swin_mm.ops.attention import cpu

    if attention == 'cpu' and cpu.unsupported_reason(torch.device('cpu'), torch.float32, 16, False):
        pytest.skip('the kernel is not compiled')
    model = tiny(attention=attention)
    with pytest.raises(RuntimeError, match=f"attention='{attention}' .* forward-mode .* 'reference'"):
        torch.func.jvp(model, (IMAGE,), (IMAGE,))


def test_flops_are_counted_as_in_mmdet():
    theirs, ours = mmdet_twin(drop_path_rate=0.0)
    counts = []
    for model in (theirs, ours):
        with FlopCounterMode(display=False) as counter:
            maps = model(torch.rand(1, 3, 224, 224))  # no padding, whose projection ours leaves out
            sum(m.sum() for m in maps).backward()
        counts.append(counter.get_total_flops())
    assert counts[1] == pytest.approx(counts[0], rel=0.01)


# Replaced modules


@BOTH
def test_dynamic_quantization_replaces_every_linear_layer(pyramid):
    model = tiny(pyramid, embed_dims=32)
    expected = evaluate(model)
    layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    replaced = [m for m in quantized.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(replaced) == len(layers)
    error = relative_error(evaluate(quantized), expected)
    assert 1e-4 < error < 0.15


@BOTH
def test_torchao_int8(pyramid):
    if TORCH < (2, 6):
        pytest.skip('torchao.quantization needs torch 2.6')
    quantization = import_oracle('torchao.quantization')
    model = tiny(pyramid, embed_dims=32)
    expected = evaluate(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert layers and all('Parameter' not in type(m.weight).__name__ for m in layers)
    error = relative_error(evaluate(model), expected)
    assert 1e-5 < error < 0.1


def test_a_replaced_linear_layer_is_used():
    model = tiny()
    block = model.layers[0].blocks[1]
    before = evaluate(model)
    for owner, name in ((block.attn, 'qkv'), (block.attn, 'proj'), (block.mlp, 'fc1'), (block.mlp, 'fc2')):
        old = getattr(owner, name)
        setattr(owner, name, nn.Linear(old.in_features, old.out_features))
        after = evaluate(model)
        assert relative_error(after, before) > 1e-3
        assert relative_error(after, evaluate(fresh(model))) < 1e-6
        before = after


def test_a_subclass_with_a_forward_of_its_own_is_called():
    class Louder(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    model = tiny()
    old = model.layers[0].blocks[0].attn.qkv
    louder = Louder(old.in_features, old.out_features)
    louder.load_state_dict(old.state_dict())
    model.layers[0].blocks[0].attn.qkv = louder
    tripled = tiny()
    with torch.no_grad():
        for parameter in tripled.layers[0].blocks[0].attn.qkv.parameters():
            parameter.mul_(3)
    assert relative_error(evaluate(model), evaluate(tripled)) < 1e-5


@BOTH
def test_copies_and_pickles_are_equal_and_independent(pyramid):
    model = tiny(pyramid)
    expected = evaluate(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(evaluate(twin), expected, strict=True))
        randomise(twin, seed=5)
        assert relative_error(evaluate(twin), expected) > 1e-2
    assert all(torch.equal(a, b) for a, b in zip(evaluate(model), expected, strict=True))


def test_registered_backbone_behaves_the_same():
    """The properties tested here on the plain pyramid hold for the registered backbone."""
    model = MODELS.build(dict(type='swin_mm.SwinTransformer', **TINY)).eval()
    before = evaluate(model)
    step(torch.optim.AdamW, fused=True)(model)
    twin = swin_mm.SwinTransformer(**TINY).eval()
    twin.load_state_dict(model.state_dict())
    assert relative_error(evaluate(model), evaluate(twin)) < 1e-6 < relative_error(evaluate(model), before)


def test_private_hook_attributes_exist():
    """The model looks for hooks under private names of PyTorch."""
    from swin_mm.models.window_attention import has_hooks

    for register in ('forward_hook', 'forward_pre_hook', 'full_backward_hook', 'full_backward_pre_hook'):
        layer = nn.Linear(2, 2)
        assert not has_hooks(layer)
        getattr(layer, f'register_{register}')(lambda *_: None)
        assert has_hooks(layer), register
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: F.relu(x)
    assert has_hooks(layer)
