"""What concerns the CUDA backend alone; run on the host by ``test_cuda_simt.py``."""

import pytest
import torch

from granet_kernels import use_backend
from granet_kernels.backends import cuda, reference
from granet_kernels.backends.cuda.accounts import masked_sgd_bytes
from granet_kernels.layout import full_mask, packed_length
from tests.helpers import bits


@pytest.fixture(autouse=True, params=["cuda"])
def backend(request):
    """Named as in the operators' tests, so that these are chosen with them."""
    with use_backend(request.param):
        yield request.param


def test_tables_are_found_again_and_forgotten():
    """More lists of tensors than tables are kept, each twice: none is taken for another."""
    lists = [[torch.randn(n), torch.randn(2 * n)] for n in range(1, 100)]
    for _ in range(2):
        for tensors in lists:
            masks = [torch.zeros(packed_length(t.numel()), dtype=torch.uint8) for t in tensors]
            for tensor in tensors:
                tensor.fill_(1)
            torch.ops.granet.zero_inactive_(tensors, masks)
            assert not any(tensor.any() for tensor in tensors)


def test_a_thousand_tensors():
    """More rows than one launch carries."""
    weights = [torch.ones(n % 50) for n in range(1000)]
    masks = [full_mask(weight.numel()) for weight in weights]
    assert torch.ops.granet.count_active(masks).tolist() == [n % 50 for n in range(1000)]
    grads = [torch.ones_like(weight) for weight in weights]
    options = {"lr": 1.0, "momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0}
    flags = {"nesterov": False, "maximize": False, "first": False}
    torch.ops.granet.masked_sgd_(weights, grads, [], masks, **options, **flags)
    assert not any(weight.any() for weight in weights)


def test_while_a_graph_is_captured(monkeypatch):
    """Tables are written anew at every call, and none is kept that would be the graph's."""
    weights = [torch.ones(2000), torch.ones(33)]
    masks = [torch.zeros(packed_length(w.numel()), dtype=torch.uint8) for w in weights]
    for captures in (True, False, True):
        if captures:
            monkeypatch.setenv("GRANET_SIMT_CAPTURES", "1")
        else:
            monkeypatch.delenv("GRANET_SIMT_CAPTURES")
        for weight in weights:
            weight.fill_(1)
        torch.ops.granet.zero_inactive_(weights, masks)
        assert not any(weight.any() for weight in weights)


def test_the_account_of_a_step_by_hand():
    """Groups 0, 1 and 50 of a hundred: two in a sector of bf16, each in one of its own in fp32."""
    mask = torch.zeros(packed_length(800), dtype=torch.uint8)
    mask[[0, 1, 50]] = torch.tensor([1, 255, 128], dtype=torch.uint8)
    param = torch.empty(800)
    half = param.bfloat16()
    assert masked_sgd_bytes([param], [param], [mask]) == 5 * 3 * 32 + 128
    assert masked_sgd_bytes([param], [], [mask], [param]) == 5 * 3 * 32 + 128
    assert masked_sgd_bytes([half], [half], [mask], [param]) == 5 * 2 * 32 + 2 * 3 * 32 + 128


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scalar", [torch.float32, torch.float64], ids=str)
def test_hyperparameters_of_another_dtype(dtype, scalar):
    """They are brought to the dtype that the kernel computes in."""
    weight, grad, mask = (
        torch.randn(100, dtype=dtype),
        torch.randn(100, dtype=dtype),
        full_mask(100),
    )
    options = {
        "lr": 0.0,
        "momentum": 0.0,
        "dampening": 0.0,
        "weight_decay": 0.0,
        "nesterov": False,
        "maximize": False,
        "first": False,
        "lr_tensor": torch.tensor(0.25, dtype=scalar),
        "grad_scale": torch.tensor(2.0, dtype=scalar),
        "found_inf": torch.tensor(0.0, dtype=scalar),
    }
    expected = weight.clone()
    reference.masked_sgd_([expected], [grad], [], [mask], **options)
    torch.ops.granet.masked_sgd_([weight], [grad], [], [mask], **options)
    torch.testing.assert_close(weight, expected)


def test_more_dimensions_than_the_kernel_takes():
    shape = (2, 3) * 5
    weight, grad = torch.randn(shape), torch.randn(shape[::-1]).permute(*reversed(range(10)))
    masked = torch.ops.granet.mask_grad(
        grad, weight, full_mask(weight.numel()), torch.tensor(False)
    )
    assert bits(masked) == bits(grad)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda op: op.unpack_mask(full_mask(9), 200),
            "packed: expected a contiguous uint8 tensor",
        ),
        (lambda op: op.zero_inactive_([torch.ones(9)], []), "masks: expected one for each"),
        (
            lambda op: op.zero_inactive_([torch.ones(9, dtype=torch.int8)], [full_mask(9)]),
            "expected elements of 2, 4 or 8 bytes, got 1",
        ),
        (
            lambda op: op.mask_cast_out(torch.ones(8), full_mask(9), None, torch.ones(9)),
            "from: expected the shape of the target",
        ),
        (
            lambda op: op.mask_cast_out(torch.ones(9).int(), full_mask(9), None, torch.ones(9)),
            "from: expected float32",
        ),
    ],
)
def test_direct_calls_do_not_leave_their_memory(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.granet_cuda)


def test_every_operator_is_there():
    from granet_kernels.ops import OPERATORS

    assert set(cuda.__all__) == set(OPERATORS)
