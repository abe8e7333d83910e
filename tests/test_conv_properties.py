"""Masked layers on whatever shapes, strides and masks there are: against float64, within a derived bound.

Hypothesis chooses, the same cases at every run. The functions are the public ones, on the backend that
a user gets. Inactive weights hold NaN: nothing may depend on them.
"""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from granet_kernels import masked_conv2d, masked_linear, pack_mask
from granet_kernels.choices import ALGORITHMS

EXAMPLES = settings(
    max_examples=150,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
MOST_PRODUCTS = 2_000_000
# Below, at and above the widths of vectors and tiles.
CHANNELS = st.sampled_from((1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40))
BATCH = st.integers(1, 17)
BF16_WEIGHT, AUTOCAST = "bf16", "autocast to bf16"
PRECISION = st.sampled_from(("fp32", "fp32", "fp32", BF16_WEIGHT, AUTOCAST))
LAYOUT = st.sampled_from(("contiguous", "channels_last", "sliced", "transposed"))
WEIGHT_LAYOUT = st.sampled_from(("contiguous", "channels_last", "transposed"))
MASK = st.sampled_from(("ones", "zeros", "half", "sparse", "very sparse", "empty rows", "one row"))


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A call of masked_conv2d but for its numbers."""

    batch: int
    groups: int
    channels_in: int
    """Of a group; so are those out."""
    channels_out: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    extra: tuple[int, int]
    """Rows and columns beyond the smallest image that fits the kernel."""

    @property
    def side(self) -> tuple[int, int]:
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        least = [max(1, r - 2 * p) for r, p in zip(reach, self.padding, strict=True)]
        return tuple(size + more for size, more in zip(least, self.extra, strict=True))

    @property
    def input(self) -> tuple[int, ...]:
        return (self.batch, self.groups * self.channels_in, *self.side)

    @property
    def weight(self) -> tuple[int, ...]:
        return (self.groups * self.channels_out, self.channels_in, *self.kernel)

    @property
    def has_idle_taps(self) -> bool:
        """Whether an element of the kernel meets nothing but padding."""
        return any(
            not any(
                0 <= start + k * dilation - padding < size
                for start in range(0, size + 2 * padding - dilation * (kernel - 1), stride)
            )
            for size, kernel, stride, padding, dilation in zip(
                self.side, self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
            for k in range(kernel)
        )

    @property
    def arguments(self) -> tuple[object, ...]:
        return (self.stride, self.padding, self.dilation, self.groups)


def pairs(low, high):
    return st.tuples(st.integers(low, high), st.integers(low, high))


@st.composite
def convolutions(draw):
    """Any, or one of the kinds that networks are made of."""
    kind = draw(st.sampled_from(("any", "1x1", "3x3", "image", "depthwise")))
    side = {"1x1": 1, "3x3": 3, "image": draw(st.sampled_from((3, 3, 5, 7)))}.get(kind)
    free = kind in ("any", "depthwise")
    problem = Convolution(
        batch=draw(BATCH),
        groups=draw(st.integers(1, 20 if kind == "depthwise" else 3)) if free else 1,
        channels_in=1 if kind == "depthwise" else draw(CHANNELS),
        channels_out=draw(st.integers(1, 2)) if kind == "depthwise" else draw(CHANNELS),
        kernel=draw(pairs(1, 7)) if free else (side, side),
        stride=draw(pairs(1, 3))
        if free
        else (1 if kind == "image" else draw(st.integers(1, 2)),) * 2,
        padding=draw(pairs(0, 3)) if free else (side // 2, side // 2),
        dilation=draw(pairs(1, 3)) if free else (1, 1),
        extra=draw(pairs(7, 40) if kind == "image" else pairs(0, 12)),  # read in place, or packed
    )
    pixels = problem.batch * problem.side[0] * problem.side[1]
    assume(pixels * torch.Size(problem.weight).numel() <= MOST_PRODUCTS)
    return problem


def make_mask(kind: str, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
    """bool, of the weight's shape."""
    noise = torch.rand(shape, generator=g)
    share = {"ones": 1.0, "zeros": 0.0, "half": 0.5, "sparse": 0.1, "very sparse": 0.02}.get(kind)
    mask = noise < (0.3 if share is None else share)
    row = torch.rand(shape[0], generator=g)
    if kind == "empty rows":
        mask[row < 0.6] = False
    if kind == "one row":
        mask[row != row.max()] = False
    return mask


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "channels_last" and values.dim() == 4:
        return values.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return values.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":  # every second element of a buffer that starts elsewhere
        memory = torch.full((*values.shape[:-1], 2 * values.size(-1) + 1), 7.0, dtype=values.dtype)
        view = memory[..., 1::2]
        view.copy_(values)
        return view
    return values.contiguous()


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a layer is called with, and what dtype it must compute in."""

    input: Tensor
    weight: Tensor
    """Without the mask; `called_weight` has NaN where it is inactive."""
    mask: Tensor
    bias: Tensor | None
    compute: torch.dtype
    autocast: bool

    @property
    def called_weight(self) -> Tensor:
        return torch.where(self.mask, self.weight, float("nan"))


def make_numbers(g, input_shape, weight_shape, *, precision, layouts, mask, bias):
    stored = torch.bfloat16 if precision == BF16_WEIGHT else torch.float32
    input_layout, weight_layout = layouts
    weight = laid_out(torch.randn(weight_shape, generator=g), weight_layout).to(stored)
    return Numbers(
        input=laid_out(torch.randn(input_shape, generator=g).to(stored), input_layout),
        weight=weight,
        mask=make_mask(mask, weight_shape, g),
        bias=torch.randn(weight_shape[0], generator=g).to(stored) if bias else None,
        compute=torch.float32 if precision == "fp32" else torch.bfloat16,
        autocast=precision == AUTOCAST,
    )


def gradients(call, numbers, grad_layout, dense_grad, g):
    """Runs the masked layer: its output, the gradient it was given, and the gradients it returned."""
    input = numbers.input.detach().requires_grad_()
    weight = torch.empty_like(numbers.weight).copy_(numbers.called_weight).requires_grad_()
    bias = None if numbers.bias is None else numbers.bias.clone().requires_grad_()
    packed = pack_mask(numbers.mask, like=weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=numbers.autocast):
        output = call(input, weight, packed, bias, dense_grad=torch.tensor(dense_grad))
    noise = torch.randn(output.shape, generator=g).to(output.dtype)
    grad_output = laid_out(noise, grad_layout)
    output.backward(grad_output)
    found = {"output": output.detach(), "input": input.grad, "weight": weight.grad}
    return found | ({} if bias is None else {"bias": bias.grad}), grad_output, weight


def in_float64(function, numbers, grad_output, dense_grad, *, magnitudes):
    """The same by torch in float64; where `magnitudes`, with all numbers replaced by theirs."""

    def rounded(tensor):
        exact = tensor.detach().to(numbers.compute).double()
        return (exact.abs() if magnitudes else exact).requires_grad_()

    input, weight = rounded(numbers.input), rounded(numbers.weight)
    bias = None if numbers.bias is None else rounded(numbers.bias)
    effective = weight * numbers.mask
    effective.retain_grad()
    output = function(input, effective, bias)
    grad = grad_output.double()
    output.backward(grad.abs() if magnitudes else grad)
    expected = {
        "output": output.detach(),
        "input": input.grad,
        "weight": effective.grad if dense_grad else weight.grad,
    }
    return expected | ({} if bias is None else {"bias": bias.grad})


def check(call, function, numbers, *, grad_layout, dense_grad, terms, g):
    """`terms`: products that are added up in an element of the output and of each gradient.

    A sum of n rounded products in fp32, in whatever order, is off by at most n eps times the sum of
    their magnitudes; the result is then rounded to the dtype that the layer computes in.
    """
    found, grad_output, weight = gradients(call, numbers, grad_layout, dense_grad, g)
    assert found["output"].dtype == numbers.compute
    assert found["weight"].stride() == weight.stride()
    if not dense_grad:
        assert not found["weight"][~numbers.mask].any()
    expected = in_float64(function, numbers, grad_output, dense_grad, magnitudes=False)
    sums = in_float64(function, numbers, grad_output, dense_grad, magnitudes=True)
    products, stored = torch.finfo(torch.float32).eps, torch.finfo(numbers.compute)
    for name, want in expected.items():
        got = found[name]
        assert got.shape == want.shape, name
        bound = (terms[name] + 4) * products * sums[name] + 2 * stored.eps * want.abs()
        if name == "output" and numbers.bias is not None:  # may be rounded before the bias as well
            bias = numbers.bias.double().abs()
            bound += stored.eps * bias.view(-1, *[1] * (numbers.weight.dim() - 2))
        wrong = ~((got.double() - want).abs() <= bound + stored.tiny)  # NaN too
        assert not wrong.any(), (
            f"{name}: {int(wrong.sum())} of {wrong.numel()} elements, first at "
            f"{wrong.nonzero()[0].tolist()}: expected {want[wrong][0]}, got {got[wrong][0]}"
        )


@EXAMPLES
@given(
    problem=convolutions(),
    seed=st.integers(0, 2**31),
    precision=PRECISION,
    layouts=st.tuples(LAYOUT, WEIGHT_LAYOUT),
    grad_layout=LAYOUT,
    mask=MASK,
    bias=st.booleans(),
    dense_grad=st.booleans(),
    algorithm=st.sampled_from(ALGORITHMS),
)
def test_convolution(
    problem, seed, precision, layouts, grad_layout, mask, bias, dense_grad, algorithm
):
    # torch 2.14.1 returns memory that nobody wrote for such a weight's dense gradient in bf16
    sparse = algorithm == "sparse" and not dense_grad
    assume(sparse or precision == "fp32" or not problem.has_idle_taps)
    g = torch.Generator().manual_seed(seed)
    numbers = make_numbers(
        g,
        problem.input,
        problem.weight,
        precision=precision,
        layouts=layouts,
        mask=mask,
        bias=bias,
    )

    def call(input, weight, packed, bias, **flags):
        arguments = problem.arguments
        return masked_conv2d(input, weight, packed, bias, *arguments, algorithm=algorithm, **flags)

    def dense(input, weight, bias):
        return F.conv2d(input, weight, bias, *problem.arguments)

    taps = problem.kernel[0] * problem.kernel[1]
    pixels = problem.batch * problem.side[0] * problem.side[1] * 4  # the padding makes it larger
    terms = {
        "output": problem.channels_in * taps,
        "input": problem.channels_out * taps,
        "weight": pixels,
        "bias": pixels,
    }
    check(call, dense, numbers, grad_layout=grad_layout, dense_grad=dense_grad, terms=terms, g=g)


@EXAMPLES
@given(
    leading=st.lists(st.integers(1, 17), max_size=2),
    sizes=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    seed=st.integers(0, 2**31),
    precision=PRECISION,
    layouts=st.tuples(
        st.sampled_from(("contiguous", "sliced")), st.sampled_from(("contiguous", "transposed"))
    ),
    grad_layout=st.sampled_from(("contiguous", "sliced")),
    mask=MASK,
    bias=st.booleans(),
    dense_grad=st.booleans(),
    algorithm=st.sampled_from(ALGORITHMS),
)
def test_linear(
    leading, sizes, seed, precision, layouts, grad_layout, mask, bias, dense_grad, algorithm
):
    features_in, features_out = sizes
    g = torch.Generator().manual_seed(seed)
    numbers = make_numbers(
        g,
        (*leading, features_in),
        (features_out, features_in),
        precision=precision,
        layouts=layouts,
        mask=mask,
        bias=bias,
    )
    rows = torch.Size(leading).numel()
    terms = {"output": features_in, "input": features_out, "weight": rows, "bias": rows}
    check(
        partial(masked_linear, algorithm=algorithm),
        F.linear,
        numbers,
        grad_layout=grad_layout,
        dense_grad=dense_grad,
        terms=terms,
        g=g,
    )


GRADCHECKS = {
    "3x3": ((2, 3, 5, 4), (4, 3, 3, 3), {"padding": 1}),
    "strided": ((1, 2, 7, 6), (3, 2, 3, 2), {"stride": (2, 3), "padding": (0, 1)}),
    "dilated": ((2, 2, 7, 7), (2, 2, 3, 2), {"dilation": (2, 3), "padding": 2}),
    "grouped": ((2, 4, 4, 4), (6, 2, 2, 2), {"groups": 2}),
    "1x1": ((3, 4, 3, 2), (5, 4, 1, 1), {}),
}


def float64_leaves(*shapes):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("kind", ["half", "empty rows", "zeros", "ones"])
@pytest.mark.parametrize("name", GRADCHECKS)
def test_convolution_gradients_by_differences(name, kind):
    input_shape, weight_shape, options = GRADCHECKS[name]
    leaves = float64_leaves(input_shape, weight_shape, weight_shape[:1])
    packed = pack_mask(make_mask(kind, weight_shape, torch.Generator().manual_seed(1)))

    def call(input, weight, bias):
        return masked_conv2d(input, weight, packed, bias, **options)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kind", ["half", "empty rows", "zeros", "ones"])
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_linear_gradients_by_differences(leading, kind):
    leaves = float64_leaves((*leading, 7), (5, 7), (5,))
    packed = pack_mask(make_mask(kind, (5, 7), torch.Generator().manual_seed(1)))
    assert torch.autograd.gradcheck(lambda x, w, b: masked_linear(x, w, packed, b), leaves)
