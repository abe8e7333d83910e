"""The cpp backend computes both gradients of a sparse layer in one pass where it can: as one by one."""

import pytest
import torch

from granet_kernels import MaskedConv2d, MaskedLinear

CONVOLUTIONS = {
    "packed": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "padding": 1, "stride": 2},
    "dilated, in groups": {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 4},
    "pointwise": {"kernel_size": 1},
    "pointwise, strided": {"kernel_size": 1, "stride": 2},
}
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    # Its gradient may be written in place, but it is not read so: its planes are not next to one another.
    "sliced": lambda x: x.repeat_interleave(2, dim=1)[:, ::2],
}


def gradients(layer, input, grad_output, *, of_input, of_weight):
    layer.weight.requires_grad_(of_weight)
    layer.weight.grad = None
    input = input.detach().requires_grad_(of_input)
    layer(input).backward(grad_output)
    return input.grad, layer.weight.grad


def assert_equal_one_by_one(layer, input):
    with torch.no_grad():
        grad_output = torch.randn_like(layer(input))
    both = gradients(layer, input, grad_output, of_input=True, of_weight=True)
    alone, _ = gradients(layer, input, grad_output, of_input=True, of_weight=False)
    _, weight = gradients(layer, input, grad_output, of_input=False, of_weight=True)
    torch.testing.assert_close(both[0], alone, rtol=0, atol=0)
    tolerance = {} if weight.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}  # other sums
    torch.testing.assert_close(both[1], weight, **tolerance)
    assert not (both[1] * ~layer.mask).any()


def sparse(layer, density):
    layer.mask = torch.rand(layer.weight.shape) < density
    layer.algorithm = "sparse"
    return layer


@pytest.mark.parametrize("density", [0.01, 0.3])  # planes of few active weights are read in place
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("side", [5, 8, 13, 29])
def test_convolution(convolution, layout, density, side):
    torch.manual_seed(0)
    layer = sparse(MaskedConv2d(16, 24, **CONVOLUTIONS[convolution], bias=False), density)
    assert_equal_one_by_one(layer, LAYOUTS[layout](torch.randn(3, 16, side, side)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [63, 64, 65, 129, 300])
def test_linear(rows, dtype):
    torch.manual_seed(0)
    layer = sparse(MaskedLinear(150, 70, bias=False).to(dtype), 0.1)
    assert_equal_one_by_one(layer, torch.randn(rows, 150, dtype=dtype))


@pytest.mark.parametrize("kernel", [1, 3])
def test_one_channel_whose_stride_means_nothing(kernel):
    torch.manual_seed(0)
    layer = sparse(MaskedConv2d(8, 1, kernel, padding=kernel // 2, bias=False), 0.5)
    layer = layer.to(memory_format=torch.channels_last)
    input = torch.randn(2, 8, 20, 20)
    assert_equal_one_by_one(layer, input)
    of_two_channels = torch.randn(2, 2, 20, 20)[:, ::2]
    both = gradients(layer, input, of_two_channels, of_input=True, of_weight=True)
    expected = gradients(layer, input, of_two_channels.clone(), of_input=True, of_weight=True)
    torch.testing.assert_close(both, expected)


def test_many_more_rows_than_parts():
    torch.manual_seed(0)
    layer = sparse(MaskedLinear(40, 30, bias=False), 0.2)
    assert_equal_one_by_one(layer, torch.randn(5000, 40))
