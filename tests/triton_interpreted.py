"""What concerns the Triton backend alone; run in an interpreter by ``test_triton.py``."""

import pytest
import torch

from granet_kernels.backends.triton import launch, masked_sgd_, sgd, table, zero_inactive_
from granet_kernels.layout import full_mask

SIZES = (33, 0, 40, 1, 16)


@pytest.fixture(autouse=True, params=["triton"])
def backend(monkeypatch, request):
    """Named as in the operators' tests, so that these are chosen with them; no table has been kept."""
    monkeypatch.setattr(table, "_tables", type(table._tables)())
    return request.param


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that run, in order."""
    names = []

    def noted(kernel, programs, *args, **meta):
        names.extend([kernel.fn.__name__] if programs else [])
        launch.launch(kernel, programs, *args, **meta)

    for module in (table, sgd):
        monkeypatch.setattr(module, "launch", noted)
    return names


def lists():
    weights = [torch.randn(numel) for numel in SIZES]
    return [weights, [full_mask(numel) for numel in SIZES]]


def test_rows_and_owners():
    tensors = lists()
    made = table.Table.of(tensors, 16, columns=[[5, 6, 7, 8, 9]])
    assert made.owners.tolist() == [0, 0, 0, 2, 2, 2, 3, 4]
    assert made.chunks == 8
    firsts = [0, 3, 3, 6, 7]
    assert made.rows.tolist() == [
        [first, weight.numel(), weight.data_ptr(), mask.data_ptr(), further]
        for first, weight, mask, further in zip(firsts, *tensors, [5, 6, 7, 8, 9], strict=True)
    ]


def test_many_chunks():
    weights = [torch.empty(3000), torch.empty(2)]
    made = table.Table.of([weights], 1)
    assert made.owners.tolist() == [0] * 3000 + [1] * 2


def test_a_table_is_kept_while_nothing_moves():
    weights, masks = lists()
    made = table.Table.of([weights, masks], 16)
    assert table.Table.of([weights, masks], 16) is made
    assert table.Table.of([weights, masks], 32) is not made
    moved = [weights[0].clone(), *weights[1:]]
    assert table.Table.of([moved, masks], 16).rows[0, 2] == moved[0].data_ptr()


def test_no_more_tables_are_kept_than_said():
    weights = torch.empty(table.KEPT + 9)
    for i in range(table.KEPT + 9):
        table.Table.of([[weights[i:]]], 16)
    assert len(table._tables) == table.KEPT


def test_a_table_written_by_launches_is_that_of_a_copy():
    """As while a CUDA graph is captured."""
    weights = [torch.empty(numel % 7) for numel in range(100)]
    sizes, addresses = [w.numel() for w in weights], [[w.data_ptr() for w in weights]]
    columns = [[-1, 1, 16, 1 << 40] * 25]
    copied, written = (
        table._written(torch.device("cpu"), sizes, addresses, 2, columns, captured=captured)
        for captured in (False, True)
    )
    assert torch.equal(copied.rows, written.rows)
    assert torch.equal(copied.owners, written.owners)


def test_alignment():
    memory = torch.empty(100)
    assert table.Table.of([[memory, memory[4:]]], 16).aligned
    assert not table.Table.of([[memory, memory[1:]]], 16).aligned


def test_one_launch_for_all_tensors(launched):
    weights, masks = lists()
    grads = [torch.randn_like(weight) for weight in weights]
    options = {"lr": 0.1, "dampening": 0.0, "weight_decay": 0.0, "momentum": 0.0, "first": False}
    for _ in range(2):
        masked_sgd_(weights, grads, [], masks, **options, nesterov=False, maximize=False)
    assert launched == ["_own_kernel", "_masked_sgd_kernel", "_masked_sgd_kernel"]


def test_nothing_to_launch_for_empty_tensors(launched):
    zero_inactive_([torch.empty(0)], [full_mask(0)])
    assert launched == []
