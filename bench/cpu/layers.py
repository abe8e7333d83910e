"""One layer in several hands: dense, masked (ours), and SparseProp's where it is installed.

All get the same weights, inputs and output gradients, laid out beforehand the way each likes best,
and all go through autograd: `backward` gives the gradients of input and weight.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cpu import peer_sparseprop
from bench.cpu.race import Contender, Run, Seconds, whole
from bench.cpu.shapes import ConvShape, LinearShape
from bench.cpu.targets import DENSE, SPARSEPROP
from granet_kernels import MaskedConv2d, MaskedLinear
from granet_kernels.backends.cpp import conv as cpp_conv

OURS = "ours"
WITHOUT_WEIGHTS = "ours without an active weight"
PACKED_WITHOUT_WEIGHTS = f"{WITHOUT_WEIGHTS}, packed"
CONTIGUOUS = "contiguous"
FORMATS = {CONTIGUOUS: torch.contiguous_format, "channels_last": torch.channels_last}
# Of the largest element: sums of a few thousand fp32 products, in different orders.
AGREEMENT = 1e-3

Shape = ConvShape | LinearShape


@dataclass(frozen=True, eq=False)
class Data:
    """What a shape is measured on: numbers of ordinary size, none of them denormal."""

    shape: Shape
    input: Tensor
    weight: Tensor
    grad_output: Tensor
    order: Tensor
    """Uniform noise of the weight's shape: masks of rising sparsity that contain one another."""
    checked: set[tuple[str, str]] = field(default_factory=set)
    """Roles and variants whose results were compared with the dense ones."""

    def mask(self, sparsity: float) -> Tensor:
        return self.order >= sparsity

    @functools.cached_property
    def laid_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Input and output gradient in each memory format; made outside all timing."""
        formats = FORMATS if self.input.dim() == 4 else {CONTIGUOUS: torch.contiguous_format}
        return {
            name: (
                self.input.contiguous(memory_format=memory_format),
                self.grad_output.contiguous(memory_format=memory_format),
            )
            for name, memory_format in formats.items()
        }


@functools.lru_cache(maxsize=1)  # a shape is measured on one thread and on all, one after the other
def make_data(shape: Shape) -> Data:
    """Kaiming weights, normal inputs and gradients, the same for the same shape."""
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(shape.weight, generator=g)
    weight[weight == 0] = 0.5  # one in 16 million; SparseProp would take it for inactive
    weight *= (2 / weight[0].numel()) ** 0.5
    input = torch.randn(shape.input, generator=g)
    with torch.no_grad():
        output = _dense(shape, weight)(input)
    grad_output = torch.randn(output.shape, generator=g)
    order = torch.rand(shape.weight, generator=g)
    return Data(shape=shape, input=input, weight=weight, grad_output=grad_output, order=order)


def role(name: str, sparsity: float) -> str:
    """What rows call a contender that has a sparsity."""
    return f"{name} at {sparsity:g}"


def training(data: Data, sparsities: Sequence[float]) -> list[Contender]:
    """Everyone, forward and forward+backward: dense once, the others at each sparsity; ours at 100 % too."""
    contenders = [_trained(data, DENSE, v, _dense_layer, None) for v in data.laid_out]
    for variant in data.laid_out:
        idle = _trained(data, WITHOUT_WEIGHTS, variant, _masked_layer, 1.0)
        contenders += [idle, _packing(idle)] if _may_pack(data.shape) else [idle]
    for sparsity in sparsities:
        contenders += [
            _trained(data, role(OURS, sparsity), v, _masked_layer, sparsity) for v in data.laid_out
        ]
        for variant, make in peer_sparseprop.layers(data.shape).items():
            layer = _from_masked_weight(make)
            contenders.append(_trained(data, role(SPARSEPROP, sparsity), variant, layer, sparsity))
    return contenders


def inference(data: Data, sparsities: Sequence[float]) -> list[Contender]:
    """Dense and ours, forward alone, without autograd."""
    contenders = [_inferred(data, DENSE, v, _dense_layer, None) for v in data.laid_out]
    for sparsity in sparsities:
        contenders += [
            _inferred(data, role(OURS, sparsity), v, _masked_layer, sparsity) for v in data.laid_out
        ]
    return contenders


MakeLayer = Callable[[Data, str, float | None], nn.Module]


def _dense(shape: Shape, weight: Tensor) -> nn.Module:
    layer: nn.Module
    if isinstance(shape, ConvShape):
        layer = nn.Conv2d(
            shape.channels_in,
            shape.channels_out,
            shape.kernel,
            shape.stride,
            shape.padding,
            bias=False,
        )
    else:
        layer = nn.Linear(shape.features_in, shape.features_out, bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


def _formatted(layer: nn.Module, variant: str) -> nn.Module:
    return layer.to(memory_format=FORMATS[variant]) if variant in FORMATS else layer


def _dense_layer(data: Data, variant: str, sparsity: float | None) -> nn.Module:
    return _formatted(_dense(data.shape, data.weight), variant)


def _masked_layer(data: Data, variant: str, sparsity: float | None) -> nn.Module:
    dense = _dense(data.shape, data.weight)
    kind = MaskedConv2d if isinstance(data.shape, ConvShape) else MaskedLinear
    layer = _formatted(kind.from_dense(dense), variant)
    assert sparsity is not None
    layer.mask = data.mask(sparsity)  # type: ignore[assignment]
    return layer


def _from_masked_weight(make: Callable[[Tensor], nn.Module]) -> MakeLayer:
    def build(data: Data, variant: str, sparsity: float | None) -> nn.Module:
        assert sparsity is not None
        return make(data.weight * data.mask(sparsity))

    return build


def _trained(
    data: Data, name: str, variant: str, make: MakeLayer, sparsity: float | None
) -> Contender:
    def build() -> Run:
        layer = make(data, variant, sparsity)
        plain = data.laid_out[CONTIGUOUS]
        images, grad_output = data.laid_out.get(variant, plain)
        images = images.detach().requires_grad_()
        if sparsity is None:  # once, as the others in their check
            layer(images).backward(grad_output)
        elif (name, variant) not in data.checked:
            check_agreement(data, layer, images, grad_output, sparsity)
            data.checked.add((name, variant))
        parameters = list(layer.parameters())

        def run() -> Seconds:
            images.grad = None
            for parameter in parameters:
                parameter.grad = None
            start = time.perf_counter()
            output = layer(images)
            middle = time.perf_counter()
            output.backward(grad_output)
            end = time.perf_counter()
            return {"forward": middle - start, "forward+backward": end - start}

        return run

    return Contender(role=name, variant=variant, build=build)


def _may_pack(shape: Shape) -> bool:
    """Whether it depends on the sparsity if a layer packs its input: see `reads_in_place`."""
    return isinstance(shape, ConvShape) and shape.kernel > 1


def _packing(contender: Contender) -> Contender:
    """The same, but a layer that would read its input where it is packs it, as denser ones do."""

    def build() -> Run:
        with mock.patch.object(cpp_conv, "reads_in_place", return_value=False):
            run = contender.build()
            run()  # how a layer is called is remembered from its first call on
        return run

    return dataclasses.replace(contender, role=PACKED_WITHOUT_WEIGHTS, build=build)


def _inferred(
    data: Data, name: str, variant: str, make: MakeLayer, sparsity: float | None
) -> Contender:
    def build() -> Run:
        layer = make(data, variant, sparsity).eval()
        images = data.laid_out[variant][0]

        def call() -> None:
            with torch.inference_mode():
                layer(images)

        return whole("inference", call)

    return Contender(role=name, variant=variant, build=build)


def check_agreement(
    data: Data, layer: nn.Module, input: Tensor, grad_output: Tensor, sparsity: float
) -> None:
    """Raises where the layer's output or gradients are not the dense ones: a wrong answer is not timed."""
    output = layer(input)
    output.backward(grad_output)
    assert input.grad is not None
    got = {"output": output.detach(), "input gradient": input.grad}
    expected = _expected(data, sparsity)
    got["weight gradient"] = peer_sparseprop.weight_gradient(layer)
    for name, want in expected.items():
        largest = want.abs().max().item() or 1.0  # zero without an active weight
        error = (got[name] - want).abs().max() / largest
        if not error < AGREEMENT:  # NaN too
            raise ArithmeticError(f"{name}: relative error {error:.2g} against the dense layer")


@functools.lru_cache(maxsize=1)  # the contenders come sparsity by sparsity
def _expected(data: Data, sparsity: float) -> dict[str, Tensor]:
    """Output and gradients of the dense layer on the masked weight."""
    mask = data.mask(sparsity)
    weight = (data.weight * mask).requires_grad_()
    input = data.input.detach().requires_grad_()
    if isinstance(data.shape, ConvShape):
        output = F.conv2d(input, weight, None, data.shape.stride, data.shape.padding)
    else:
        output = F.linear(input, weight)
    output.backward(data.grad_output)
    assert input.grad is not None
    assert weight.grad is not None
    return {
        "output": output.detach(),
        "input gradient": input.grad,
        "weight gradient": weight.grad * mask,
    }
