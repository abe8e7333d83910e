"""What our rows are compared with: the published procedure, on vectors worked by hand, and the network."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

from bench import resnet50  # noqa: E402
from bench.published import PublishedMasking, prune_bytes, step_bytes, update_bytes  # noqa: E402
from bench.yardsticks import step  # noqa: E402

# --- the published procedure ----------------------------------------------------------------------


def published(weights, masks, *, grads=None, edition="cifar"):
    """Momentum is 1 everywhere, whatever the mask."""
    params = [nn.Parameter(torch.tensor(weight)) for weight in weights]
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for i, param in enumerate(params):
        optimizer.state[param]["momentum_buffer"] = torch.ones_like(param)
        param.grad = None if grads is None else torch.tensor(grads[i])
    masks = [torch.tensor(mask, dtype=torch.bool) for mask in masks]
    return PublishedMasking(params, optimizer, masks, edition=edition)


def momenta(masking):
    return [masking.optimizer.state[param]["momentum_buffer"].tolist() for param in masking.params]


def masks_of(masking):
    assert all(mask.dtype == torch.float32 for mask in masking.masks)
    return [mask.tolist() for mask in masking.masks]


def test_published_masking_reallocates_weight_and_momentum():
    masking = published([[1.0, -2.0, 3.0]], [[1, 0, 1]])
    state = masking.optimizer.state[masking.params[0]]
    weight, momentum = masking.params[0].data, state["momentum_buffer"]
    masking.apply_masks()
    assert masking.params[0].tolist() == [1, 0, 3]
    assert momenta(masking) == [[1, 0, 1]]
    assert masking.params[0].data_ptr() != weight.data_ptr()
    assert state["momentum_buffer"].data_ptr() != momentum.data_ptr()


@pytest.mark.parametrize(
    ("edition", "masks"),
    [
        ("cifar", [[1, 0, 0, 0], [1, 1, 0, 0]]),  # strictly above the 4th largest, 3: three stay
        ("imagenet", [[1, 1, 0, 0], [1, 1, 0, 0]]),
    ],
)
def test_published_prune_is_global(edition, masks):
    weights = [[4.0, -3.0, 2.0, 1.0], [-8.0, 7.0, 0.5, 0.0]]
    masking = published(weights, [[1] * 4] * 2, edition=edition)
    masking.prune(0.5)
    assert masks_of(masking) == masks
    assert masking.params[0].tolist() == [4, -3 * masks[0][1], 0, 0]
    assert momenta(masking) == masks


@pytest.mark.parametrize(("edition", "mask"), [("cifar", [1, 0, 0, 0]), ("imagenet", [1, 1, 1, 1])])
def test_published_prune_when_the_threshold_is_zero(edition, mask):
    masking = published([[5.0, 0.0, 0.0, 0.0]], [[1, 0, 0, 0]], edition=edition)
    masking.prune(0.5)
    assert masks_of(masking) == [mask]


@pytest.mark.parametrize("edition", ["cifar", "imagenet"])
def test_published_drop_and_regrow(edition):
    # 5 active, a third of them: ceil(5 / 3) = 2 dropped, |1| and |-2|. The largest |gradient| where
    # the mask is then zero: 9 (long inactive, regrows at 0) and 7 (just dropped, keeps its -2 and
    # its momentum).
    weights = [[5.0, 1.0, -2.0, 4.0, 3.0, 0.0, 0.0, 0.0]]
    grads = [[99.0, 2.0, -7.0, 0.0, 50.0, 3.0, -9.0, 1.0]]
    masking = published(weights, [[1, 1, 1, 1, 1, 0, 0, 0]], grads=grads, edition=edition)
    masking.apply_masks()
    masking.drop_and_regrow(1 / 3)
    masking.apply_masks()
    assert masks_of(masking) == [[1, 0, 1, 1, 1, 0, 1, 0]]
    assert masking.params[0].tolist() == [5, 0, -2, 4, 3, 0, 0, 0]
    assert momenta(masking) == [[1, 0, 1, 1, 1, 0, 0, 0]]


def test_published_regrowth_loses_density_without_gradients():
    # Sorting equal scores, the choice falls on active weights as soon as they come first.
    masking = published([[4.0, 3.0, 2.0, 1.0]], [[1] * 4], grads=[[0.0] * 4])
    masking.drop_and_regrow(0.5)
    assert masking.active_counts()[0] < 4


def test_published_update_prunes_first():
    weights = [[4.0, 3.0, 2.0, 1.0], [8.0, 7.0, 6.0, 5.0]]
    grads = [[0.0, 0.0, 9.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    masking = published(weights, [[1] * 4] * 2, grads=grads, edition="imagenet")
    masking.update(0.5, 0.25)
    # Pruning leaves the second layer alone; one of it is dropped, 5, and regrown, with its value.
    # The first layer is empty and never regrows, whatever its gradients.
    assert masks_of(masking) == [[0, 0, 0, 0], [1, 1, 1, 1]]
    assert [param.tolist() for param in masking.params] == [[0, 0, 0, 0], [8, 7, 6, 5]]


def test_published_refuses():
    with pytest.raises(ValueError, match="masks: expected 1, one a parameter, got 0"):
        published([[1.0]], [])
    with pytest.raises(ValueError, match="edition: expected 'cifar' or 'imagenet', got 'mnist'"):
        published([[1.0]], [[1]], edition="mnist")
    with pytest.raises(ValueError, match="sparsity: expected to leave at least one weight"):
        published([[1.0]], [[1]]).prune(0.5)


def test_byte_accounts():
    assert (step.FUSED, step.MASKING) == (20, 24)
    assert step.ACCESSES == {"fused": 5, "foreach": 11, "single": 11}
    assert step_bytes(10) == 240
    assert prune_bytes(10) == 10 * (8 + 8 + 20 + 8 + 5 + 5 + 24 + 4)
    drop_regrow = 4 + 5 + 8 + 16 + 5 + 1 + 8 + 17 + 8 + 16 + 5
    assert update_bytes(10) == prune_bytes(10) + 10 * drop_regrow + 240


# --- the network ----------------------------------------------------------------------------------


def shapes_of(model):
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def test_resnet50_shapes():
    for shapes, tensors, numbers in (
        (resnet50.weight_shapes(), 54, 25_502_912),
        (resnet50.parameter_shapes(), 161, 25_557_032),
    ):
        assert len(shapes) == tensors
        assert sum(math.prod(shape) for shape in shapes) == numbers


def test_resnet50_is_torchvisions():
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"):
        assert shapes_of(resnet50.ResNet()) == shapes_of(models.resnet50())
    small = models.resnet.ResNet(models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=7).eval()
    same = resnet50.ResNet(resnet50.Size(blocks=(1, 1, 1, 1), classes=7)).eval()
    same.load_state_dict(small.state_dict())
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same(images), small(images))
