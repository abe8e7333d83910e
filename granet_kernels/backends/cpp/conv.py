"""Two-dimensional convolution with a masked weight: sparse by ``csrc/cpu/conv.cpp``, or dense.

The caller has checked the arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from granet_kernels.backends.cpp.cost import chooses_sparse
from granet_kernels.backends.cpp.index import (
    Access,
    ActiveWeights,
    Index,
    Shape,
    active_weights,
    readable_in_place,
)
from granet_kernels.backends.cpp.mask import mask_cast, mask_grad
from granet_kernels.layout import conv_memory_format


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    *,
    algorithm: str = "auto",
) -> Tensor:
    """conv2d(input, weight where active), in the dtype of the input."""
    shape = conv_shape(input, weight.shape, stride, padding, dilation, groups)
    memory_format = conv_memory_format(input, weight)
    active = active_weights(mask)
    if not chooses_sparse(shape, input, weight, mask, active.count, algorithm):
        bias = None if bias is None else bias.to(input.dtype)
        masked = mask_cast(weight, mask, input.dtype)
        output = F.conv2d(input, masked, bias, stride, padding, dilation, groups)
        return output.contiguous(memory_format=memory_format)
    output = torch.empty(
        (shape.batch, shape.out_channels, *shape.output_size),
        dtype=input.dtype,
        memory_format=memory_format,
    )
    input = evenly_spaced(input)
    access = access_of(shape, weight, input, output)
    index = active.index(shape, access, "forward")
    values = active.values(weight, index, input.dtype)
    sparse_output(output, input, index, values, bias, shape, access)
    return output


def masked_conv2d_backward(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    dense_grad: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    needs: Sequence[bool],
    *,
    algorithm: str = "auto",
) -> list[Tensor]:
    """Gradients of input, weight and bias, those that are needed; the weight's through the mask."""
    shape = conv_shape(input, weight.shape, stride, padding, dilation, groups)
    needs_input, needs_weight, needs_bias = needs
    active = active_weights(mask)
    sparse = chooses_sparse(shape, input, weight, mask, active.count, algorithm)
    sparse_weight = sparse and not bool(dense_grad)
    geometry = (stride, padding, dilation, False, [0, 0], groups)
    dense_needs = [needs_input and not sparse, needs_weight and not sparse_weight, False]
    if any(dense_needs):
        masked = mask_cast(weight, mask, input.dtype) if dense_needs[0] else weight.to(input.dtype)
        grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_output, input, masked, None, *geometry, dense_needs
        )
    gradients = []
    if needs_input:
        gradient = torch.empty_like(input)
        if sparse:
            sparse_input_gradient(gradient, grad_output, weight, active, shape)
        else:
            gradient.copy_(grad_input)
        gradients.append(gradient)
    if needs_weight:
        if sparse_weight:
            gradient = torch.empty_like(weight)
            sparse_weight_gradient(gradient, grad_output, input, active, shape)
            gradients.append(gradient)
        else:
            gradients.append(mask_grad(grad_weight, weight, mask, dense_grad))
    if needs_bias and bias is not None:
        gradients.append(torch.empty_like(bias).copy_(grad_output.sum((0, 2, 3))))
    return gradients


def sparse_output(
    output: Tensor,
    input: Tensor,
    index: Index,
    values: Tensor,
    bias: Tensor | None,
    shape: Shape,
    access: Access,
) -> None:
    """Write the output of a layer; the bias is rounded to the input's dtype first."""
    bias = None if bias is None else bias.to(input.dtype).float().contiguous()
    torch.ops.granet_cpp.sparse_conv_.default(
        output, input, values, index, bias, None, False, list(shape), access.in_place
    )


def sparse_input_gradient(
    gradient: Tensor, grad_output: Tensor, weight: Tensor, active: ActiveWeights, shape: Shape
) -> None:
    """Write the input's gradient, computed from the active weights alone."""
    target, source = evenly_spaced(gradient), evenly_spaced(grad_output)
    access = access_of(shape, weight, target, source)
    index = active.index(shape, access, "input_gradient")
    values = active.values(weight, index, gradient.dtype)
    torch.ops.granet_cpp.sparse_conv_input_gradient_.default(
        target, source, values, index, list(shape), access.in_place
    )
    if target is not gradient:
        gradient.copy_(target)


def sparse_weight_gradient(
    gradient: Tensor, grad_output: Tensor, input: Tensor, active: ActiveWeights, shape: Shape
) -> None:
    """Write the weight's gradient: computed where the mask is active, zero elsewhere."""
    source, factor = evenly_spaced(input), evenly_spaced(grad_output)
    access = access_of(shape, gradient, source, factor)
    index = active.index(shape, access, "forward")
    torch.ops.granet_cpp.sparse_conv_weight_gradient_.default(
        gradient,
        factor,
        source,
        index,
        active.positions(gradient.numel()),
        list(shape),
        access.in_place,
    )


def conv_shape(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Shape:
    """The shape of a convolution of (N, C, H, W) with (O, C / groups, KH, KW)."""
    out_channels, _, *kernel = weight_shape
    return Shape._make((*input.shape, out_channels, *kernel, *stride, *padding, *dilation, groups))


def access_of(shape: Shape, weight: Tensor, *images: Tensor) -> Access:
    """How the kernels reach a weight, contiguous or channels_last, and its input and output."""
    return Access(not weight.is_contiguous(), readable_in_place(shape, *images))


def evenly_spaced(tensor: Tensor) -> Tensor:
    """The tensor, or a copy whose pixels are the same distance apart, as the kernels want them."""
    if tensor.dim() == 2:
        return tensor
    one_row_or_column = tensor.size(2) <= 1 or tensor.size(3) <= 1
    even = one_row_or_column or tensor.stride(2) == tensor.size(3) * tensor.stride(3)
    return tensor if even else tensor.contiguous()
