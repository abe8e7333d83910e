"""compress() of models that cannot be traced, whole or in part."""

import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from granet_kernels import compress, sparsify
from tests.compressing import outputs, parts, randomise, sparse
from tests.helpers import FP64


def features():
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())


class Untraceable(nn.Module):
    """Decides by values; its parts do not."""

    def __init__(self):
        super().__init__()
        self.features, self.head = features(), nn.Linear(4, 2)
        self.width = 4

    def forward(self, x):
        y = self.features(x)
        if x.sum() > 0:
            y = y * 2
        return self.head(y.mean((2, 3)))


class Optional(Untraceable):
    def forward(self, x, scale=None):
        y = self.features(x)
        return y if scale is None else y * scale


class MakesTensors(Untraceable):
    def forward(self, x):
        return self.features(x) + torch.ones(4, 1, 1, dtype=torch.float64)


class ReadsTheWeight(Untraceable):
    def forward(self, x):
        return self.features(x) * self.head.weight.sum()


class Hooked(Untraceable):
    def __init__(self):
        super().__init__()
        self.register_forward_pre_hook(lambda module, args: (args[0] + 1,))

    def forward(self, x):
        return self.features(x)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Untraceable, "TraceError"),
        (Optional, "optional argument scale=None"),
        (MakesTensors, "makes tensors"),
        (ReadsTheWeight, "reads head.weight"),
        (Hooked, "has hooks"),
    ],
)
def test_untraceable_models_keep_their_class_and_say_so(kind, reason):
    model = sparse(kind())
    with pytest.warns(UserWarning, match=f"{kind.__name__} cannot be traced: .*{reason}") as caught:
        compressed = compress(model)
    assert caught[0].filename == __file__
    assert type(compressed) is kind
    assert compressed.width == 4
    assert parts(compressed)["features.0"] == "bn+relu"
    model.eval()
    for sign in (-1, 1):
        x = sign * torch.rand(2, 4, 5, 5, dtype=torch.float64)
        assert_close(outputs(compressed, x), outputs(model, x), **FP64)
        if kind is Optional:
            assert_close(outputs(compressed, x, 3.0), outputs(model, x, 3.0), **FP64)
    unfused = compress(model, fuse=False)
    assert_close(outputs(unfused, x), outputs(model, x), **FP64)


def test_a_fused_sequential_cannot_be_taken_apart():
    with pytest.warns(UserWarning, match="cannot be traced"):
        compressed = compress(sparse(Untraceable()))
    with pytest.raises(TypeError, match="FusedSequential"):
        list(compressed.features)


class Watched(nn.Module):
    """Traceable, but for one part, which is hidden in the middle."""

    def __init__(self, inner):
        super().__init__()
        self.stem, self.inner = features(), inner

    def forward(self, x):
        return self.inner(self.stem(x))


@pytest.mark.parametrize("how", ["control-flow", "hook"])
def test_one_part_that_cannot_be_traced_is_called_as_it_is(how):
    calls = []
    if how == "hook":
        inner = nn.Sequential(features(), nn.AdaptiveAvgPool2d(1))
        inner.register_forward_hook(lambda module, args, output: calls.append(1) or output + 1)
    else:
        inner = Untraceable()
    model = sparse(Watched(inner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compressed = compress(model)
    name = "inner.0.0" if how == "hook" else "inner.features.0"
    assert parts(compressed)["stem.0"] == parts(compressed)[name] == "bn+relu"
    assert calls == []  # not while tracing
    x = torch.rand(2, 4, 5, 5, dtype=torch.float64)
    result = outputs(compressed, x)
    assert len(calls) == (how == "hook")
    assert_close(result, outputs(model.eval(), x), **FP64)


class DecidesByType(Untraceable):
    """What tracing cannot see: a proxy is no tensor."""

    def forward(self, x):
        return self.features(x * 2 if isinstance(x, torch.Tensor) else x)


def test_example_input_finds_what_tracing_did_not_see():
    model = sparse(DecidesByType())
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="example_input: the compressed model's output differs"):
        compress(model, example_input=x)
    assert_close(
        outputs(compress(model, fuse=False, example_input=(x,)), x), outputs(model.eval(), x)
    )
    compress(sparse(Watched(nn.Identity())), example_input=x)


def test_transformers_keep_working():
    """Their fast path reads the weights of their linear layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = sparsify(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    randomise(model)
    with pytest.warns(UserWarning, match="cannot be traced"):
        compressed = compress(model)
    x = torch.randn(2, 5, 8)
    assert_close(outputs(compressed, x), model(x).detach(), rtol=0, atol=1e-5)
