"""Layers of a masked or compressed weight: PyTorch's, on the masked weight."""

from granet_kernels.backends.dense import DenseLayers
from granet_kernels.backends.triton.cast import mask_cast, mask_grad
from granet_kernels.backends.triton.mask import unpack_mask

_layers = DenseLayers(mask_cast=mask_cast, mask_grad=mask_grad, unpack_mask=unpack_mask)

masked_conv2d = _layers.masked_conv2d
masked_conv2d_backward = _layers.masked_conv2d_backward
masked_linear = _layers.masked_linear
masked_linear_backward = _layers.masked_linear_backward
compressed_conv2d = _layers.compressed_conv2d
compressed_linear = _layers.compressed_linear
