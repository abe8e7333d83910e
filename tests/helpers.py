"""Values, bounds and comparisons of several test files."""

import torch
from torch import Tensor

NAN, INF = float("nan"), float("inf")
CHANNELS_LAST = torch.channels_last
EXACT = {"rtol": 0, "atol": 0}
FP64 = {"rtol": 0, "atol": 1e-12}  # sums of some hundred products of numbers about 1


def bits(values) -> list[int]:
    """The bit patterns of fp32 values: plain equality takes -0.0 for +0.0 and NaN for nothing."""
    tensor = values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float32)
    return tensor.detach().contiguous().view(torch.int32).flatten().tolist()


def mask_of(*ones_and_zeros: int) -> Tensor:
    """A bool mask written as 1, 0, 1."""
    return torch.tensor(ones_and_zeros, dtype=torch.bool)


HERE = torch.empty(0).device
"""Where tests make their tensors, as errors name it."""
