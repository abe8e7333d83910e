"""What is promised of the Triton kernels' code, on the usual calls; `make kernel-report` has them all."""

import csv
import dataclasses
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: `bench` is not installed, everything else is

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is compiled in the interpreter", allow_module_level=True)

from bench.kernels import claims, report  # noqa: E402
from bench.kernels import compile as compiled  # noqa: E402
from bench.kernels.launches import TARGETS, launches  # noqa: E402
from bench.kernels.specializations import SGD, kernels, mask, specializations, tensor  # noqa: E402
from granet_kernels.backends import triton as operators  # noqa: E402
from granet_kernels.backends.triton import table  # noqa: E402

# A call of each kernel, in what training has most: fp32 weights, cast to bf16.
USUAL = (
    "pack_mask",
    "unpack_mask",
    "count_active",
    "zero_inactive_ float32",
    "mask_cast float32 to bfloat16",
    "mask_grad bfloat16 to float32",
    "mask_grad bfloat16 to float32, other order",
    "masked_sgd_ float32, momentum",
    "prune_ float32",
    "drop_regrow_ float32",
    "a table, in a CUDA graph",
)


@pytest.fixture(scope="module")
def all_made():
    return specializations()


def test_every_kernel_is_listed(all_made):
    assert {made.name for made in all_made} == kernels()
    assert set(claims.TRAFFIC) == kernels()


def test_a_process_lists_them_alike_each_time(all_made):
    """Several share the work, each a part of its own list: else rows come twice, and others not at all."""
    keys = [(made.call, made.key) for made in all_made]
    for _ in range(2):
        assert [(made.call, made.key) for made in specializations()] == keys


@pytest.mark.slow
def test_the_usual_specializations_are_as_promised(all_made):
    """On one target in full; the others differ in what ptxas makes of nearly the same PTX."""
    usual = [made for made in all_made if made.call in USUAL]
    assert {made.name for made in usual} == kernels()
    for made in usual:
        code = compiled.compile_for(made, 90)
        assert claims.faults(made, code, 90) == [], made.call


@pytest.mark.slow
@pytest.mark.parametrize("capability", TARGETS)
def test_the_step_is_as_promised_on_every_target(all_made, capability):
    """Twelve loads and eight stores of 16 bytes: 16 elements a thread of two to three tensors."""
    (made,) = [
        made
        for made in all_made
        if (made.name, made.call) == ("_masked_sgd_kernel", "masked_sgd_ float32, momentum")
    ]
    row = report.row(made, capability)
    assert row.faults == ""
    assert (row.local, row.bytes_per_element) == (0, 20.125)
    assert row.registers <= 128  # two programs of 128 threads to each 32 K registers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"local": 16}, "16 bytes of local memory, 0 instructions for it"),
        ({"spills": 3}, "0 bytes of local memory, 3 instructions for it"),
        ({"shared": 1 << 20}, "1048576 bytes of shared memory, more than 232448"),
        ({"fp64": ("add.f64",)}, "fp64: add.f64"),
        ({"misplaced_masks": 1}, "1 histograms with a mask of another order"),
        ({"loads": Counter({4: 48})}, "0 of 12 bytes an element in loads of 16 bytes (48 of 4)"),
        ({"stores": Counter({16: 4})}, "4 of 8 bytes an element in stores of 16 bytes (4 of 16)"),
    ],
)
def test_faults_are_found(all_made, change, message):
    made = next(
        made
        for made in all_made
        if made.call == "masked_sgd_ float32, momentum" and made.name == "_masked_sgd_kernel"
    )
    code = compiled.Code(
        registers=64,
        local=0,
        spills=0,
        shared=256,
        instructions=300,
        fp64=(),
        loads=Counter({16: 12, 4: 3}),
        stores=Counter({16: 8}),
        fused=0,
        misplaced_masks=0,
        threads=128,
    )
    assert claims.faults(made, code, 90) == []
    assert claims.faults(made, dataclasses.replace(code, **change), 90) == [message]
    left = dataclasses.replace(made, options={})
    assert claims.faults(left, code, 90) == ["enable_fp_fusion is left to Triton"]


def step(sizes, dtype=torch.float32, **options):
    params, grads, momenta = ([tensor(n, dtype) for n in sizes] for _ in range(3))
    masks = [mask(numel) for numel in sizes]
    return operators.masked_sgd_(params, grads, momenta, masks, **(SGD | options))


def keys_of(*calls):
    table._tables.clear()
    return {made.key for made in launches([("", call) for call in calls])}


def test_lengths_and_hyperparameters_compile_nothing_anew():
    """Which integers are 1 or multiples of 16, and what a number is, must not matter."""
    usual = keys_of(lambda: step([4096, 33]))
    for other in (
        lambda: step([1]),
        lambda: step([16, 17, 1 << 20]),
        lambda: step([8], lr=1.0, momentum=0.5, weight_decay=1.0),
        lambda: step([8] * 200),
    ):
        assert keys_of(other) <= usual
    k = [torch.tensor([n]) for n in (1, 16, 17)]

    def prune(sizes, k):
        lists = ([tensor(n, torch.float32) for n in sizes] for _ in range(2))
        weights, momenta = lists
        operators.prune_(weights, [mask(n) for n in sizes], k, momenta)

    usual = keys_of(lambda: prune([4096], k[0]))
    assert keys_of(lambda: prune([16, 8, 1 << 20], k[1]), lambda: prune([8], k[2])) <= usual
    usual = keys_of(lambda: operators.pack_mask(tensor(4096, torch.bool)))
    assert keys_of(lambda: operators.pack_mask(tensor(8, torch.bool))) == usual


def test_accesses_are_read_from_ptx():
    ptx = """
        @%p2 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
        ld.global.L1::evict_last.b8 { %rs1 }, [ %rd2 + 0 ];
        ld.param.b64 %rd3, [k_param_0];
        ld.shared.v2.b32 {%r5, %r6}, [%r7];
        @!%p1 st.global.v8.b32 [ %rd1 + 0 ], { %r1 };
        st.global.v2.b64 [ %rd1 + 0 ], { %rd1, %rd2 };
    """
    assert compiled.global_accesses(ptx, "ld") == Counter({16: 1, 1: 1})
    assert compiled.global_accesses(ptx, "st") == Counter({32: 1, 16: 1})


def test_masks_of_histograms_are_read_from_the_compilers_form():
    """Two lines of what Triton 3.6 made of a digit and a mask that were each put in a row."""
    apart = """
        %digit = tt.reshape %key allow_reorder : tensor<512x8xi32, #blocked1> -> tensor<4096xi32, #blocked>
        %on = tt.reshape %bit allow_reorder : tensor<512x8xi1, #blocked2> -> tensor<4096xi1, #blocked>
        %counts_68 = tt.histogram %digit, %on : tensor<4096xi32, #blocked> -> tensor<256xi32, #blocked>
    """
    assert compiled.misplaced_masks(apart) == 1
    together = """
        %row = tt.reshape %key allow_reorder : tensor<512x8xi32, #blocked1> -> tensor<4096xi32, #blocked>
        %counts_59 = arith.cmpi sge, %row, %cst_2 : tensor<4096xi32, #blocked>
        %counts_60 = tt.histogram %row, %counts_59 : tensor<4096xi32, #blocked> -> tensor<256xi32, #blocked>
    """
    assert compiled.misplaced_masks(together) == 0
    assert compiled.misplaced_masks("%counts = tt.histogram %digit : tensor<8xi32>") == 0


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "rows.csv"
    command = [sys.executable, "-m", "bench.kernels", "--only", "table", "--target", "80"]
    run = subprocess.run(
        [*command, "--jobs", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["kernel"] for row in rows] == ["_write_kernel", "_own_kernel"]
    assert {row["faults"] for row in rows} == {""}
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 2
    assert "nothing would be compiled" in run.stderr
