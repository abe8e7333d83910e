"""Models to compress, and what became of them."""

import torch
from torch import nn

from granet_kernels import CompressedConv2d, CompressedLinear, masked_layers, sparsify


def randomise(model, active=0.4):
    """Masks, and batch norms that do something."""
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape) < active
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor in (module.weight, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
                for tensor in (module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.normal_()
    return model


def sparse(model):
    return randomise(sparsify(model).double())


def outputs(model, *args):
    with torch.no_grad():
        return model(*[arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args])


def parts(model):
    """Names of the compressed layers, and what is fused into them."""
    layers = (CompressedConv2d, CompressedLinear)
    return {
        name: "+".join(module.fused)
        for name, module in model.named_modules()
        if isinstance(module, layers)
    }
