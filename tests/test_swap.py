"""sparsify, densify and masked_layers: swapping layers in a model, and back."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torchvision.models import resnet50

from granet_kernels import (
    MaskedConv2d,
    MaskedLinear,
    MaskedSGD,
    attached_mask,
    densify,
    masked_layers,
    sparsify,
)
from tests.helpers import EXACT


class Block(nn.Module):
    """Convolutions (one depthwise), a norm, an embedding, a subclass, and a linear head."""

    class Special(nn.Linear):
        def forward(self, input):
            return super().forward(input) + 1

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.embedding = nn.Embedding(5, 4)
        self.special = self.Special(4, 4)
        self.upsample = nn.ConvTranspose2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.upsample(self.depthwise(self.stem(x))).mean((2, 3))
        return self.head(self.special(x + self.embedding.weight[0]))


NAMES = ["stem.0", "depthwise", "head"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Block()


def randomise(model, seed=1, density=0.4):
    source = torch.Generator().manual_seed(seed)
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape, generator=source) < density
    return model


# ---- which layers --------------------------------------------------------------------------------


def test_every_conv_and_linear_by_default_and_nothing_else(model):
    assert sparsify(model) is model
    assert list(masked_layers(model)) == NAMES
    types = {name: type(module) for name, module in model.named_modules()}
    assert types["stem.0"] is types["depthwise"] is MaskedConv2d
    assert types["head"] is MaskedLinear
    assert types["special"] is Block.Special
    assert types["upsample"] is nn.ConvTranspose2d
    assert types["embedding"] is nn.Embedding
    assert types["stem.1"] is nn.BatchNorm2d
    assert all(layer.sparsity == 0 for layer in masked_layers(model).values())


@pytest.mark.parametrize(
    ("globs", "expected"),
    [
        ({"include": ["stem.*"]}, ["stem.0"]),
        ({"include": ["*e*"]}, NAMES),
        ({"include": ("head", "stem.0")}, ["stem.0", "head"]),
        ({"include": ["st??.[0-9]"]}, ["stem.0"]),
        ({"exclude": ["depthwise"]}, ["stem.0", "head"]),
        ({"exclude": ["*"]}, []),
        ({"include": ["*.0", "head"], "exclude": ["h*"]}, ["stem.0"]),
        ({"include": ()}, []),
    ],
    ids=["folder", "star", "two-names", "classes", "exclude", "all-excluded", "both", "none"],
)
def test_globs(model, globs, expected):
    sparsify(model, **globs)
    assert list(masked_layers(model)) == expected


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize("glob", ["layer4.*", "Head", "special", "stem", "head.weight", ""])
def test_an_unknown_glob_is_refused_with_the_names(model, argument, glob):
    with pytest.raises(ValueError, match=argument) as error:
        sparsify(model, **{argument: ["head", glob]})
    message = f"{argument}: {glob!r} matches no layer; the layers are {', '.join(NAMES)}"
    assert str(error.value) == message
    assert masked_layers(model) == {}


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_single_string_is_refused(model, argument):
    with pytest.raises(TypeError, match=rf"{argument}: expected a sequence of globs.*\('head',\)"):
        sparsify(model, **{argument: "head"})


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential(), nn.Conv1d(1, 1, 1)], ids=repr)
def test_a_model_without_such_layers_is_refused(model):
    with pytest.raises(
        ValueError, match=f"model: expected a Conv2d or Linear.*{type(model).__name__}"
    ):
        sparsify(model)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_computed_weight_is_refused_and_nothing_swapped(model):
    nn.utils.weight_norm(model.head)
    with pytest.raises(ValueError, match="model: head: expected weight to be a parameter"):
        sparsify(model)
    assert masked_layers(model) == {}
    sparsify(model, exclude=["head"])
    assert list(masked_layers(model)) == ["stem.0", "depthwise"]


def test_a_parametrized_layer_stays_as_it_is(model):
    nn.utils.parametrizations.weight_norm(model.head)
    sparsify(model)
    assert "head" not in masked_layers(model)


@pytest.mark.parametrize(
    ("root", "masked"),
    [(nn.Linear(3, 2), MaskedLinear), (nn.Conv2d(1, 2, 1), MaskedConv2d)],
    ids=["linear", "conv"],
)
def test_the_model_may_be_a_layer(root, masked):
    assert sparsify(root) is root
    assert type(root) is masked
    assert masked_layers(root) == {"": root}
    assert type(densify(root)) is masked.dense_type


# ---- what stays ----------------------------------------------------------------------------------


def test_parameters_buffers_hooks_and_modules_stay_the_same_objects(model):
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("head"))
    model.stem[0].register_forward_pre_hook(lambda *_: calls.append("stem"))
    modules = dict(model.named_modules())
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    keys = list(model.state_dict())
    model.eval()
    sparsify(model)
    assert dict(model.named_modules()) == modules
    after = dict(model.named_parameters())
    assert list(after) == list(parameters)
    assert all(after[name] is param for name, param in parameters.items())
    assert all(dict(model.named_buffers())[name] is buffer for name, buffer in buffers.items())
    assert [k for k in model.state_dict() if not k.endswith("packed_mask")] == keys
    assert sorted(set(model.state_dict()) - set(keys)) == sorted(f"{n}.packed_mask" for n in NAMES)
    assert not any(module.training for module in model.modules())
    model(torch.randn(2, 3, 5, 5))
    assert calls == ["stem", "head"]


def test_output_and_gradients_stay_those_of_the_dense_model(model):
    x = torch.randn(2, 3, 5, 5)
    twin = copy.deepcopy(model)
    sparsify(model)
    for each in (model, twin):
        each(x).square().sum().backward()
    assert_close(model(x), twin(x))
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(param.grad, other.grad)


@pytest.mark.parametrize("optimizer", [MaskedSGD, torch.optim.SGD])
def test_an_optimizer_made_before_keeps_working(model, optimizer):
    twin = copy.deepcopy(model)
    pairs = []
    for each in (model, twin):
        pairs.append((each, optimizer(each.parameters(), lr=0.1, momentum=0.9)))
    sparsify(model)
    for _ in range(2):
        for each, opt in pairs:
            opt.zero_grad()
            each(torch.ones(2, 3, 5, 5)).square().sum().backward()
            opt.step()
    for param, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close(param, other)


def test_a_second_call_changes_nothing(model):
    randomise(sparsify(model))
    state = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    sparsify(model)
    sparsify(model, include=["head"])
    assert_close(dict(model.state_dict()), dict(state), **EXACT)
    assert all(dict(model.named_buffers())[name] is b for name, b in buffers.items())


def test_a_second_call_can_add_layers(model):
    sparsify(model, include=["head"])
    model.head.mask = torch.zeros(2, 4, dtype=torch.bool)
    sparsify(model)
    assert list(masked_layers(model)) == NAMES
    assert model.head.count_active() == 0


def test_frozen_and_channels_last_weights_stay_so(model):
    model.to(memory_format=torch.channels_last)
    model.stem[0].weight.requires_grad_(False)
    sparsify(model)
    assert not model.stem[0].weight.requires_grad
    mask = torch.rand(4, 3, 3, 3) < 0.5
    model.stem[0].mask = mask
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.stem[0].mask, mask)


# ---- shared modules, tied weights ----------------------------------------------------------------


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.again = self.first
        self.other = nn.Linear(3, 3)

    def forward(self, x):
        return self.other(self.again(self.first(x)))


def test_a_shared_module_is_swapped_once_under_all_its_names():
    model = sparsify(Shared())
    assert model.first is model.again
    assert type(model.again) is MaskedLinear
    assert list(masked_layers(model)) == ["first", "other"]


@pytest.mark.parametrize("name", ["first", "again"])
def test_a_shared_module_is_excluded_and_included_by_any_name(name):
    assert list(masked_layers(sparsify(Shared(), exclude=[name]))) == ["other"]
    assert list(masked_layers(sparsify(Shared(), include=[name]))) == ["first"]


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Embedding(4, 4))
    model[2].weight = model[0].weight
    return model


def test_tied_weights_get_one_mask_and_are_listed_once():
    model = sparsify(tied())
    assert model[0].packed_mask is model[2].packed_mask
    assert list(masked_layers(model)) == ["0"]
    randomise(model)
    assert torch.equal(model[2].mask, model[0].mask)
    assert 0 < model[0].sparsity < 1
    twin = copy.deepcopy(model)
    assert twin[0].packed_mask is twin[2].packed_mask
    twin[2].mask = ~twin[2].mask
    assert torch.equal(twin[0].mask, ~model[0].mask)


def test_tied_weights_swapped_in_two_calls():
    model = sparsify(tied(), include=["0"])
    randomise(model)
    sparsify(model)
    assert model[0].packed_mask is model[2].packed_mask


# ---- densify -------------------------------------------------------------------------------------


def test_densify_copies_into_plain_layers(model):
    randomise(sparsify(model)).eval()
    for layer in masked_layers(model).values():
        layer.weight.data.masked_fill_(~layer.mask, 3.0)  # as a foreign optimizer would
    before = copy.deepcopy(model.state_dict())
    dense = densify(model)
    assert [type(m) for m in dense.modules()] == [type(m) for m in Block().modules()]
    assert list(dense.state_dict()) == list(Block().state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert_close(dense(x), model(x))
    for name, layer in masked_layers(model).items():
        twin = dense.get_submodule(name)
        assert not twin.weight.data[~layer.mask].any()
        assert attached_mask(twin.weight) is None
    assert list(masked_layers(model)) == NAMES
    assert_close(dict(model.state_dict()), dict(before), **EXACT)


def test_a_densified_model_trains_all_its_weights():
    """Zeros of a plain layer are ordinary weights to MaskedSGD, and to sparsify."""
    model = randomise(sparsify(nn.Sequential(nn.Linear(4, 4))), density=0.0)
    dense = densify(model)
    opt = MaskedSGD(dense.parameters(), lr=0.1)
    dense(torch.ones(1, 4)).sum().backward()
    opt.step()
    assert dense[0].weight.data.ne(0).all()
    assert sparsify(densify(model))[0].sparsity == 0.0


def test_densify_keeps_ties_shared_modules_and_hooks():
    model = randomise(sparsify(tied()))
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    dense = densify(model)
    assert dense[0].weight is dense[2].weight
    assert len([*dense.parameters()]) == len([*model.parameters()])
    dense[0](torch.ones(1, 4))
    assert calls == ["hook"]
    shared = densify(sparsify(Shared()))
    assert shared.first is shared.again
    assert type(shared.first) is nn.Linear


def test_densify_a_model_without_masks_is_a_copy(model):
    dense = densify(model)
    assert dense is not model
    assert_close(dict(dense.state_dict()), dict(model.state_dict()), **EXACT)


# ---- masked layers written by hand ---------------------------------------------------------------


def test_a_model_written_with_masked_layers_is_the_same_as_a_swapped_one():
    torch.manual_seed(0)
    swapped = sparsify(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)))
    torch.manual_seed(0)
    written = nn.Sequential(MaskedConv2d(3, 4, 3), nn.Flatten(), MaskedLinear(36, 2))
    assert repr(written) == repr(swapped)
    assert_close(dict(written.state_dict()), dict(swapped.state_dict()), **EXACT)
    assert masked_layers(written).keys() == masked_layers(swapped).keys()
    assert list(masked_layers(sparsify(written))) == ["0", "2"]


# ---- a real network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return randomise(sparsify(resnet50()))


def forward(model):
    with torch.no_grad():
        return model.eval()(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_resnet50_layers(resnet):
    layers = masked_layers(resnet)
    assert len(layers) == 54  # 53 convolutions and the classifier
    assert sum(layer.weight.numel() for layer in layers.values()) == 25_502_912
    assert 0.59 < layers["layer4.2.conv3"].sparsity < 0.61


def test_resnet50_trains_a_step(resnet):
    model = copy.deepcopy(resnet).train()
    opt = MaskedSGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    before = [layer.weight.detach().clone() for layer in masked_layers(model).values()]
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    opt.step()
    for (name, layer), old in zip(masked_layers(model).items(), before, strict=True):
        inactive = ~layer.mask
        assert not layer.weight.data[inactive].any(), name
        assert not layer.weight.grad[inactive].any(), name
        assert not opt.momentum_of(layer.weight)[inactive].any(), name
        changed = layer.weight.data.ne(old)[~inactive].float().mean()
        assert changed > 0.2, name  # a 1x1 image sees one pixel of a 3x3 kernel, and ReLU is off


def test_resnet50_in_channels_last(resnet):
    model = copy.deepcopy(resnet).to(memory_format=torch.channels_last)
    for (name, layer), other in zip(
        masked_layers(model).items(), masked_layers(resnet).values(), strict=True
    ):
        assert torch.equal(layer.mask, other.mask), name
        assert attached_mask(layer.weight) is layer.packed_mask, name
    assert_close(forward(model), forward(resnet), rtol=1e-3, atol=1e-3)
    for (name, saved), other in zip(
        model.state_dict().items(), resnet.state_dict().values(), strict=True
    ):
        assert torch.equal(saved, other), name


def test_resnet50_state_dict_round_trip(resnet):
    file = io.BytesIO()
    torch.save(resnet.state_dict(), file)
    file.seek(0)
    model = sparsify(resnet50())
    model.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for layer, other in zip(
        masked_layers(model).values(), masked_layers(resnet).values(), strict=True
    ):
        assert torch.equal(layer.packed_mask, other.packed_mask)
    assert_close(forward(model), forward(resnet), **EXACT)


def test_resnet50_loads_a_dense_checkpoint_strictly(resnet):
    dense = resnet50()
    model = copy.deepcopy(resnet)
    model.load_state_dict(dense.state_dict(), strict=True)
    assert all(layer.sparsity == 0 for layer in masked_layers(model).values())
    assert_close(forward(model), forward(dense))
    exported = resnet50()
    exported.load_state_dict(densify(resnet).state_dict(), strict=True)
    assert_close(forward(exported), forward(resnet))
