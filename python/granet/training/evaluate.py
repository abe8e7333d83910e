"""Evaluation of a checkpoint, without a trace in its run's directory."""

from __future__ import annotations

from granet.training import build
from granet.training.checkpoint import Checkpoint, check_model_state
from granet.training.config import TrainConfig
from granet.training.passes import Passes
from granet.training.processes import Processes


def evaluate(
    config: TrainConfig,
    checkpoint: Checkpoint,
    processes: Processes = Processes(),  # noqa: B008 - it cannot change
) -> dict[str, tuple[float, float]]:
    """Loss and accuracy of the network that a checkpoint holds.

    Args:
        config: of the run, but for whatever shall be otherwise, such as the batch size.
        checkpoint: its averaged network, if it has one, or the one it trains.
        processes: those that share the images.

    Returns:
        For `val` and `test`: mean cross-entropy, and accuracy in percent.

    Raises:
        CheckpointError: it is of another architecture.
    """
    device = build.choose_device(config.device, processes)
    source = build.build_source(config, device, processes)
    model = build.build_model(config, source, device)
    check_model_state(checkpoint.path, model, checkpoint.network)
    model.load_state_dict(checkpoint.network)
    passes = Passes(config, model, device, processes=processes, trains=False)
    batches = {"val": source.val_batches(), "test": source.test_batches()}
    return {split: passes.evaluate(some) for split, some in batches.items()}
