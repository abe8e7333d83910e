"""What `make demo` promises, over three seeds: exact sparsity, and accuracy beside the dense network's."""

import statistics

import pytest
import torch

from granet.training.config import TrainConfig
from granet.training.train import train

pytestmark = pytest.mark.slow

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo")
    results = {}
    for method in ("dense", "granet"):
        for seed in SEEDS:
            config = TrainConfig(
                method=method, seed=seed, output=str(output), experiment=f"{method}-{seed}"
            )
            results[method, seed] = (train(config), output / config.experiment)
    return results


def test_sparse_accuracy_is_within_a_point_and_a_half_of_dense(runs):
    accuracy = {
        method: statistics.mean(runs[method, seed][0].test_acc for seed in SEEDS)
        for method in ("dense", "granet")
    }
    assert accuracy["dense"] > 97
    assert accuracy["granet"] >= accuracy["dense"] - 1.5


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("file", ["last.pt", "best.pt"])
def test_exactly_the_target_is_zero_in_the_checkpoint(runs, seed, file):
    """Counted here without any code of the project."""
    model = torch.load(runs["granet", seed][1] / file, weights_only=True)["model"]
    weights = [
        model[name.replace("packed_mask", "weight")] for name in model if "packed_mask" in name
    ]
    numel = sum(weight.numel() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) == round(0.9 * numel)
    assert runs["granet", seed][0].active_weights == numel - round(0.9 * numel) == 7451
