"""compress(): what it may fuse into a layer, and what it must leave."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from granet_kernels import CompressedConv2d, CompressedLinear, MaskedLinear, compress, sparsify
from tests.compressing import outputs, parts, randomise, sparse
from tests.helpers import FP64


def block(**modules):
    """A model of named parts, 4 channels everywhere, whose forward a test supplies."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("conv", "other"):
                self.add_module(name, nn.Conv2d(4, 4, 3, padding=1))
            self.bn, self.relu = nn.BatchNorm2d(4), nn.ReLU()
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x):
            return self.run(self, x)

    return Block


CASES = {
    # forward, what is fused into conv
    "bn-relu": (lambda m, x: m.relu(m.bn(m.conv(x))), "bn+relu"),
    "relu-alone": (lambda m, x: F.relu(m.conv(x)), "relu"),
    "torch-relu": (lambda m, x: torch.relu(m.conv(x)), "relu"),
    "method-relu": (lambda m, x: m.conv(x).relu_(), "relu"),
    "in-place-relu": (lambda m, x: F.relu(m.conv(x), inplace=True), "relu"),
    "identity-between": (lambda m, x: m.relu(m.identity(m.bn(m.identity(m.conv(x))))), "bn+relu"),
    "residual": (lambda m, x: m.relu(m.bn(m.conv(x)) + x), "bn+residual+relu"),
    "residual-first": (lambda m, x: x + m.conv(x), "residual"),
    "residual-torch-add": (lambda m, x: torch.add(m.conv(x), x), "residual"),
    "residual-method": (lambda m, x: m.conv(x).add_(x).relu(), "residual+relu"),
    "residual-computed-later": (lambda m, x: m.conv(x) + m.other(x), "residual"),
    "residual-broadcast": (lambda m, x: m.relu(m.conv(x) + x.mean((2, 3), keepdim=True)), None),
    "broadcast-to-residual": (lambda m, x: m.relu(m.conv(x.mean((2, 3), keepdim=True)) + x), None),
    "residual-scaled": (lambda m, x: torch.add(m.conv(x), x, alpha=2), ""),
    "number-added": (lambda m, x: m.relu(m.conv(x) + 1), ""),
    "twice-itself": (lambda m, x: twice(m.conv(x)), ""),
    "used-elsewhere": (lambda m, x: both(m, m.conv(x)), ""),
    "bn-used-elsewhere": (lambda m, x: both(m, m.bn(m.conv(x))), "bn"),
    "called-twice": (lambda m, x: m.relu(m.conv(m.relu(m.conv(x)))), ""),
    "two-names": (lambda m, x: m.bn(m.conv(x)), ""),
    "conv-hook": (lambda m, x: m.bn(m.conv(x)), ""),
    "bn-hook": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "relu-pre-hook": (lambda m, x: m.relu(m.bn(m.conv(x))), "bn"),
    "bn-without-statistics": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "bn-always-training": (lambda m, x: m.relu(m.bn(m.conv(x))), ""),
    "bn-subclass": (lambda m, x: m.bn(m.conv(x)), ""),
    "bn-behind-a-view": (lambda m, x: m.bn(m.conv(x).view(x.size(0), 2, 2, -1)), ""),
    "shared-weight": (lambda m, x: m.relu(m.bn(m.conv(m.other(x)))), "bn+relu"),
    "relu6": (lambda m, x: F.relu6(m.conv(x)), ""),
    "relu-out": (lambda m, x: out_of(m.conv(x), x), ""),
    "written-in-between": (lambda m, x: written(m, m.relu(x)), ""),
    "written-by-a-module": (lambda m, x: written_by_a_module(m, m.other(x)), ""),
    "written-by-the-unknown": (lambda m, x: written_by_a_function(m, m.other(x)), ""),
    "added-to-the-other": (lambda m, x: added_to_the_other(m, m.other(x)), ""),
    "added-in-place": (lambda m, x: added_in_place(m, x), "residual"),
    "relu-of-the-input": (lambda m, x: relu_of_the_input(m, x + 0), "bn+residual"),
    "bias-read": (lambda m, x: m.bn(m.conv(x)) + m.conv.bias.view(4, 1, 1), None),
}


def twice(y):
    return y + y


def both(m, y):
    return m.relu(y) - y


def out_of(y, x):
    return torch.clamp(y, 0, None, out=torch.empty_like(y))


def written(m, h):
    y = m.conv(h)
    h.mul_(2)
    return m.relu(y + h)


def written_by_a_module(m, h):
    y = m.conv(h)
    return y + m.inplace(h)


@torch.fx.wrap
def doubled(tensor):
    return tensor.mul_(2)


def written_by_a_function(m, h):
    y = m.conv(h)
    return y + doubled(h)


def added_to_the_other(m, h):
    y = m.conv(h)
    z = h
    z += y
    return z - h


def added_in_place(m, x):
    y = m.conv(x)
    y += x
    return y


def relu_of_the_input(m, x):
    """A pre-activation block: the ReLU in place changes the shortcut too."""
    shortcut = x
    return m.bn(m.conv(m.inplace(x))) + shortcut


class FrozenInTraining(nn.BatchNorm2d):
    pass


def prepare(name, model):
    """What a case needs besides its forward."""
    if name == "two-names":
        model.again = model.conv
    if name == "conv-hook":
        model.conv.register_forward_hook(lambda module, args, output: output * 2)
    if name == "bn-hook":
        model.bn.register_forward_hook(lambda module, args, output: output * 2)
    if name == "relu-pre-hook":
        model.relu.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    if name == "bn-without-statistics":
        model.bn = nn.BatchNorm2d(4, track_running_stats=False).double()
    if name == "bn-always-training":
        model.bn.train = lambda mode=True: model.bn
    if name == "bn-subclass":
        model.bn = FrozenInTraining(4).double()
    if name == "bn-behind-a-view":
        model.bn = nn.BatchNorm2d(2).double()
    if name == "shared-weight":
        model.other.weight = model.conv.weight
    return model


@pytest.mark.parametrize("name", CASES)
def test_fused_or_not_the_result_is_the_same(name):
    run, expected = CASES[name]
    model = block(identity=nn.Identity(), inplace=nn.ReLU(inplace=True))()
    type(model).run = staticmethod(run)
    model = randomise(prepare(name, sparse(model)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if name in ("bias-read", "relu-out") else "error")
        compressed = compress(model)
    fused = parts(compressed)["conv"]
    if expected is not None:
        assert fused == expected
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    assert_close(outputs(compressed, x), outputs(copy.deepcopy(model).eval(), x), **FP64)
    unfused = compress(model, fuse=False)
    assert_close(outputs(unfused, x), outputs(copy.deepcopy(model).eval(), x), **FP64)
    assert set(parts(unfused).values()) == {""}
    assert type(unfused) is type(model)


def test_dense_convolutions_take_the_batch_norm_too():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double())
    model.append(nn.Conv2d(4, 2, 1).double())
    sparsify(model, include=("3",))
    compressed = compress(model)
    assert [type(module).__name__ for module in compressed.children()] == [
        *("Conv2d", "ReLU", "CompressedConv2d")
    ]
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    assert_close(outputs(compressed, x), outputs(model.eval(), x), **FP64)


class ReadsADenseWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.bn(self.conv(x))) * self.conv.weight.sum()


def test_a_weight_that_forward_reads_is_not_folded():
    model = randomise(sparsify(ReadsADenseWeight(), include=("head",)).double())
    compressed, x = compress(model), torch.randn(2, 4, 3, 3, dtype=torch.float64)
    assert isinstance(compressed.get_submodule("bn"), nn.BatchNorm2d)
    result = compressed(x)  # not under no_grad: nothing in it requires a gradient
    assert_close(result, outputs(model.eval(), x), **FP64)


def test_hooks_stay_on_the_layer():
    model = sparse(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))
    calls = []
    model[0].register_forward_hook(lambda module, args, output: calls.append(type(module)))
    outputs(compress(model), torch.randn(1, 3, 2, 2, dtype=torch.float64))
    assert calls == [CompressedConv2d]


def test_subclasses_stay():
    class Special(MaskedLinear):
        def forward(self, input):
            return super().forward(input) + 1

    model = nn.Sequential(Special(3, 3), MaskedLinear(3, 3))
    compressed = compress(model)
    assert [type(m) for m in compressed.children()] == [Special, CompressedLinear]
