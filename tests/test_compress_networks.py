"""compress() of whole networks, and their files."""

import copy
import io
import pickle

import pytest
import torch
import torchvision
from torch import nn
from torch.testing import assert_close

from granet_kernels import compress, masked_layers, sparsify
from tests.compressing import outputs, parts, randomise
from tests.helpers import CHANNELS_LAST, EXACT

# ---- saving and loading --------------------------------------------------------------------------


def small():
    return sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()))


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return file


def test_loads_into_a_model_of_other_masks():
    model, x = randomise(small()), torch.randn(2, 3, 5, 5)
    compressed = compress(model)
    state = torch.load(saved(compressed), weights_only=True)
    for active in (0.1, 1.0):
        other = compress(randomise(small(), active))
        layer = other.get_submodule("0")
        before, mask_before = layer.values, layer.packed_mask
        assert before.numel() != compressed.get_submodule("0").values.numel()
        assert str(other.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
        assert layer.values is not before  # caches know a tensor by its identity
        assert layer.packed_mask is not mask_before
        assert_close(outputs(other, x), outputs(compressed, x), **EXACT)
        assert not layer.values.requires_grad


def test_loads_onto_meta():
    compressed, x = compress(randomise(small())), torch.randn(2, 3, 5, 5)
    with torch.device("meta"):
        other = compress(small())
    assert other(x.to("meta")).shape == (2, 72)
    other.load_state_dict(torch.load(saved(compressed)), assign=True)
    assert_close(outputs(other, x), outputs(compressed, x), **EXACT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("0.values"), "0: expected packed_mask and values, got one"),
        (lambda state: state.pop("0.packed_mask"), "0: expected packed_mask and values, got one"),
        (lambda s: s.update({"0.values": s["0.values"][1:]}), "0: values: expected .* active bit"),
        (lambda s: s.update({"0.packed_mask": torch.zeros(16).byte()}), "expected the mask of"),
        (lambda state: state.update({"0.weight": torch.ones(1)}), "Unexpected key.*0.weight"),
    ],
)
def test_damaged_files_are_refused(change, message):
    compressed = compress(randomise(small()))
    state = compressed.state_dict()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    change(state)
    with pytest.raises(RuntimeError, match=message):
        compressed.load_state_dict(state)
    for name, tensor in compressed.state_dict().items():
        assert_close(tensor, expected[name], **EXACT)


def test_a_file_without_the_layer_leaves_it():
    compressed = compress(randomise(small()))
    before = compressed.get_submodule("0").values.clone()
    compressed.load_state_dict({}, strict=False)
    assert torch.equal(compressed.get_submodule("0").values, before)
    with pytest.raises(RuntimeError, match="Missing key"):
        compressed.load_state_dict({})


def test_exports():
    """A file that needs no class of ours to be loaded, with any batch size."""
    compressed, x = compress(randomise(small())), torch.randn(2, 3, 5, 5)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(compressed, (x,), dynamic_shapes=({0: batch},))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 7):
        x = torch.randn(size, 3, 5, 5)
        assert_close(outputs(loaded, x), outputs(compressed, x), **EXACT)


# ---- networks ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet18():
    torch.manual_seed(0)
    return randomise(sparsify(torchvision.models.resnet18(num_classes=10)).double())


def test_resnet18_is_fused_whole(resnet18):
    state = {name: tensor.clone() for name, tensor in resnet18.state_dict().items()}
    compressed = compress(resnet18)
    assert resnet18.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in resnet18.state_dict().items())
    assert all(param.requires_grad for param in resnet18.parameters())

    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    expected = outputs(copy.deepcopy(resnet18).eval(), x)
    assert not compressed.training
    assert_close(outputs(compressed, x), expected, rtol=1e-11, atol=1e-11)
    x = x.contiguous(memory_format=CHANNELS_LAST)
    assert_close(outputs(compressed, x), expected, rtol=1e-11, atol=1e-11)

    kinds = [type(module).__name__ for module in compressed.modules() if not module._modules]
    assert sorted(set(kinds)) == [
        *("AdaptiveAvgPool2d", "CompressedConv2d", "CompressedLinear", "MaxPool2d")
    ]
    fused = list(parts(compressed).values())
    assert fused.count("bn+residual+relu") == 8
    assert fused.count("bn+relu") == 9
    assert fused.count("bn") == 3  # downsampling
    assert set(parts(compressed)) == set(masked_layers(resnet18))
    numel = sum(p.numel() for p in compressed.parameters())
    active = sum(layer.count_active() for layer in masked_layers(resnet18).values())
    assert numel == active + 4800 + 10  # a bias for each channel, and the classifier's


def test_fp32_within_rounding(resnet18):
    """Per element some 20 layers of sums, rounded in another order; the weights once more."""
    model = copy.deepcopy(resnet18).float().eval()
    x = torch.randn(2, 3, 40, 40)
    expected = outputs(model, x)
    bound = 1e-5 * float(expected.abs().max())
    assert_close(outputs(compress(model), x), expected, rtol=0, atol=bound)


def test_bf16(resnet18):
    x = torch.randn(4, 3, 40, 40)
    compressed = compress(copy.deepcopy(resnet18).float()).bfloat16()
    truth = outputs(copy.deepcopy(resnet18).eval(), x.double())
    plain = outputs(copy.deepcopy(resnet18).eval().bfloat16(), x.bfloat16())
    error = (outputs(compressed, x.bfloat16()).double() - truth).norm()
    assert error < 1.5 * (plain.double() - truth).norm()  # no worse than the model in bf16


def test_compiles_without_a_graph_break(resnet18):
    compressed = compress(resnet18)
    torch.compiler.reset()
    compiled = torch.compile(compressed, fullgraph=True, backend="aot_eager")
    for size in ((2, 3, 40, 40), (3, 3, 40, 40)):
        x = torch.randn(size, dtype=torch.float64)
        assert_close(outputs(compiled, x), outputs(compressed, x), rtol=1e-11, atol=1e-11)


def test_copies_of_a_network(resnet18):
    compressed, x = compress(resnet18), torch.randn(1, 3, 40, 40, dtype=torch.float64)
    expected = outputs(compressed, x)
    for twin in (copy.deepcopy(compressed), pickle.loads(pickle.dumps(compressed))):
        assert parts(twin) == parts(compressed)
        assert_close(outputs(twin, x), expected, **EXACT)


def test_file_of_resnet50_at_90_percent(tmp_path):
    """All convolutions and the classifier masked: 2.55 million values, one bit a weight, biases."""
    model = torchvision.models.resnet50()
    torch.save(model.state_dict(), tmp_path / "dense.pt")
    sparsify(model)
    for layer in masked_layers(model).values():
        numel = layer.weight.numel()
        layer.mask = (torch.randperm(numel) < numel - round(0.9 * numel)).view(layer.weight.shape)
    torch.save(compress(model).state_dict(), tmp_path / "compressed.pt")
    dense, small = ((tmp_path / f).stat().st_size for f in ("dense.pt", "compressed.pt"))
    print(f"ResNet-50 at 90 %: dense {dense:,} bytes, compressed {small:,}, 1/{dense / small:.2f}")
    assert small <= dense / 7.5


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(), torchvision.ops.MLP(2, [2])])
def test_a_model_without_masked_layers_is_refused(model):
    with pytest.raises(ValueError, match="model: expected a MaskedConv2d or MaskedLinear in it"):
        compress(model)
