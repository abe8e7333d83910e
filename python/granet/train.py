"""The training loop, and the run around it: resume, train, choose the best epoch, test."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from granet import build
from granet.checkpoint import (
    Checkpoint,
    CheckpointError,
    get_rng_state,
    load_checkpoint,
    restore,
    save_checkpoint,
    set_rng_state,
)
from granet.config import TrainConfig, resume_conflicts, write_config_file
from granet.flops import TrainingFlops, inference_flops, measure
from granet.monitor import LayerChange, Scalars, TopologyMonitor
from granet.passes import Passes
from granet.progress import Progress, RunningMetrics
from granet.stopping import Stopped, StopSignals
from granet.telemetry import (
    ARGS,
    BEST,
    LAST,
    METRICS,
    SUMMARY,
    TOPOLOGY,
    EpochMetrics,
    Events,
    Summary,
    Table,
    create_run_directory,
    make_display,
    write_summary,
)
from granet_kernels import count_active, masked_layers, use_backend


def train(
    config: TrainConfig, *, resume: Checkpoint | None = None, stop_after: int | None = None
) -> Summary:
    """Train, or continue, a run and test its best epoch.

    Args:
        config: the run.
        resume: continue from this checkpoint, in the directory it lies in, bit for bit as if the
            run had never stopped.
        stop_after: stop, with a checkpoint, after this many steps of this call.

    Raises:
        Stopped: on SIGINT, SIGTERM or `stop_after`, after last.pt has been written.
        ValueError: a setting is impossible, or the run directory already holds a run.
        CheckpointError: `resume` does not belong to this run.
        FileNotFoundError: the data directory is missing or incomplete.
    """
    with backend_of(config):
        return Trainer(config, resume=resume, stop_after=stop_after).run()


def backend_of(config: TrainConfig) -> AbstractContextManager[Any]:
    """Forces the backend the configuration names, inside `with`."""
    return nullcontext() if config.backend is None else use_backend(config.backend)


class Trainer:
    """A run: everything is built, and restored, when it is constructed."""

    def __init__(
        self,
        config: TrainConfig,
        *,
        resume: Checkpoint | None = None,
        stop_after: int | None = None,
    ) -> None:
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"stop_after: expected at least 1 step, got {stop_after}")
        self.config, self.stop_after = config, stop_after
        self.signals = StopSignals()
        self.device = build.choose_device(config.device)
        build.seed_everything(config)
        self.source = build.build_source(config, self.device)
        self.batches_per_epoch = build.usable_batches(config, self.source.steps_per_epoch)
        self.total_steps = config.epochs * self.batches_per_epoch // config.grad_accum_steps

        self.model = build.build_model(config, self.source, self.device)
        self.masked = masked_layers(self.model)
        self.optimizer = build.build_optimizer(config, self.model)
        self.sparsifier = build.build_sparsifier(
            config, self.model, self.optimizer, self.total_steps
        )
        self.scheduler = build.build_scheduler(
            config, self.optimizer, self.total_steps, self.sparsifier
        )
        self.scaler = build.build_scaler(config, self.device)
        self.passes = Passes(config, self.model, self.optimizer, self.scaler, self.device)
        self.monitor = None if self.sparsifier is None else TopologyMonitor(self.sparsifier)
        self.dense_flops = measure(self.model, self.source.sample_shape)
        self.flops = TrainingFlops(self.dense_flops)
        self.progress = Progress()
        self.running = RunningMetrics(self.device)
        self.began = time.perf_counter()

        self.directory = config.run_directory if resume is None else resume.path.parent
        if resume is None:
            build.start_sparsifier(config, self.sparsifier, self.source, self.device)
            create_run_directory(self.directory)
            self.save(LAST)  # whatever happens from here on, the run can be resumed
        else:
            self.restore(resume)
        self.metrics = Table(
            self.directory / METRICS, EpochMetrics, key="epoch", until=self.progress.epoch
        )
        self.topology = Table(
            self.directory / TOPOLOGY, LayerChange, key="step", until=self.progress.step
        )
        write_config_file(self.directory / ARGS, config)
        self.active_fraction = self.active_fractions()
        self.first_step = self.progress.step

    # The loop

    def train_epoch(self) -> None:
        """Train to the end of the epoch, from wherever in it the run stands."""
        config, accumulate = self.config, self.config.grad_accum_steps
        batches = self.source.train_batches(self.progress.epoch, start=self.progress.batch)
        self.model.train()
        for _ in range(self.progress.batch, self.batches_per_epoch, accumulate):
            stepped = self.passes.step(itertools.islice(batches, accumulate), self.see)
            self.flops.add(self.active_fraction, accumulate * config.batch_size)
            if self.sparsifier is not None and self.sparsifier.step():
                self.active_fraction = self.active_fractions()
            self.optimizer.zero_grad()
            if stepped:
                self.scheduler.step()
                self.progress.step += 1
            self.progress.batch += accumulate
            self.after_step()

    def run(self) -> Summary:
        """Train the epochs that are left, then test. See `train` for what it raises."""
        with self.signals.listen():
            return self._run()

    def _run(self) -> Summary:
        config, progress = self.config, self.progress
        self.events = Events(self.directory, step=progress.step)
        if self.monitor is not None:
            self.monitor.sinks = [lambda rows: self.topology.append(*rows)]
            if self.events.writer is not None:
                self.monitor.sinks.append(Scalars(self.events.writer))
        self.display = make_display(
            epochs=config.epochs, total_steps=self.total_steps, step=progress.step
        )
        try:
            self.display.message(self.describe())
            try:
                while progress.epoch < config.epochs:
                    self.train_epoch()
                    self.finish_epoch()
            except Stopped:
                self.save(LAST)
                raise
            return self.test()
        finally:
            self.events.close()
            self.display.close()

    def see(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """A batch's loss and accuracy into the epoch's means."""
        self.running.add(loss, outputs, labels)
        self.last_loss = loss

    def after_step(self) -> None:
        """Show the step, and stop where that was asked for."""
        progress, interval = self.progress, self.config.log_interval
        self.display.step(progress.step)
        step_of_epoch = progress.batch // self.config.grad_accum_steps
        if interval and step_of_epoch % interval == 0:
            value, lr = self.last_loss.item(), self.last_lr()
            self.display.running(progress.epoch + 1, progress.step, value, lr)
            self.events.running(progress.step, value, lr)
        self.stop_if_asked()

    def finish_epoch(self) -> None:
        """Validate, record the epoch's row, keep the checkpoint, and the best one."""
        progress = self.progress
        train_loss, train_acc = self.running.means()
        val_loss, val_acc = self.evaluate(self.source.val_batches())
        active, total = self.count_weights()
        progress.epoch, progress.batch = progress.epoch + 1, 0
        progress.seconds = time.perf_counter() - self.began
        self.running = RunningMetrics(self.device)
        metrics = EpochMetrics(
            epoch=progress.epoch,
            step=progress.step,
            lr=self.last_lr(),
            train_loss=train_loss,
            train_acc=train_acc,
            val_loss=val_loss,
            val_acc=val_acc,
            sparsity=1 - active / total,
            active_weights=active,
            seconds=round(progress.seconds, 3),
            train_flops_ratio=self.flops.sparse_total / max(self.flops.dense_total, 1),
        )
        # On a tie the later epoch: it has seen a smaller learning rate.
        if self.is_final_network() and val_acc >= progress.best_val_acc:
            progress.best_epoch, progress.best_val_acc = progress.epoch, val_acc
            self.save(BEST)
        self.metrics.append(metrics)
        self.events.epoch(metrics)
        self.display.epoch(metrics)
        self.save(LAST)

    def test(self) -> Summary:
        """Test the best epoch's weights (which the model holds afterwards); write summary.yaml."""
        progress = self.progress
        name = LAST if progress.best_epoch is None else BEST
        checkpoint = load_checkpoint(self.directory / name)
        self.model.load_state_dict(checkpoint.entries["model"])
        test_loss, test_acc = self.evaluate(self.source.test_batches())
        _, val_acc = self.evaluate(self.source.val_batches())
        active, total = self.count_weights()
        sparse = inference_flops(self.dense_flops, self.active_fractions())
        summary = Summary(
            checkpoint=name,
            epoch=checkpoint.entries["progress"]["epoch"],
            val_acc=val_acc,
            test_acc=test_acc,
            test_loss=test_loss,
            sparsity=1 - active / total,
            active_weights=active,
            total_weights=total,
            steps=progress.step,
            inference_flops_ratio=sparse / sum(self.dense_flops.values()),
            train_flops_ratio=self.flops.sparse_total / max(self.flops.dense_total, 1),
            seconds=round(progress.seconds, 3),
        )
        write_summary(self.directory / SUMMARY, summary)
        self.display.message(
            f"test accuracy {test_acc:.2f} % ({name}, epoch {summary.epoch}); "
            f"sparsity {summary.sparsity:.4f}, {active:,} of {total:,} weights active; "
            f"see {self.directory}"
        )
        return summary

    # What it is made of

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean cross-entropy, and accuracy in percent, in evaluation mode."""
        return self.passes.evaluate(batches, self.stop_if_asked)

    def last_lr(self) -> float:
        """Learning rate of the step before; the scheduler itself is one step ahead."""
        step = max(self.progress.step - 1, 0)
        return self.config.lr * float(self.scheduler.lr_lambdas[0](step))

    def active_fractions(self) -> dict[str, float]:
        """Masked layer -> share of its weights that is active, counted in the masks."""
        return {
            name: active / self.masked[name].weight.numel()
            for name, active in self.active_counts().items()
        }

    def active_counts(self) -> dict[str, int]:
        """Masked layer -> active weights; waits for the device once."""
        if not self.masked:
            return {}
        counts = count_active([layer.packed_mask for layer in self.masked.values()])
        return dict(zip(self.masked, counts.tolist(), strict=True))

    def is_final_network(self) -> bool:
        """Whether the network could be the result: before, it has more weights than it may."""
        return self.sparsifier is None or self.sparsifier.is_final

    def count_weights(self) -> tuple[int, int]:
        """Active weights, and all weights, of the network's convolutions and linear layers."""
        counts = self.active_counts()
        total = active = 0
        for name, layer in build.prunable_layers(self.model).items():
            total += layer.weight.numel()
            active += counts.get(name, layer.weight.numel())
        return active, total

    # Stopping and resuming

    def entries(self) -> dict[str, Any]:
        """Everything that decides how the run goes on."""
        self.progress.seconds = time.perf_counter() - self.began
        progress = dataclasses.asdict(self.progress)
        progress |= {"total_steps": self.total_steps, "running": self.running.sums}
        parts = {
            name: None if part is None else part.state_dict() for name, part in self.parts().items()
        }
        return {
            "config": dataclasses.asdict(self.config),
            "progress": progress,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": get_rng_state(),
            **parts,
        }

    def parts(self) -> dict[str, Any]:
        """What is saved and restored besides model and optimizer."""
        return {
            "scheduler": self.scheduler,
            "scaler": self.scaler,
            "sparsifier": self.sparsifier,
            "topology": self.monitor,
            "flops": self.flops,
        }

    def save(self, name: str) -> None:
        """Write a checkpoint into the run directory."""
        save_checkpoint(self.directory / name, self.entries())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stood. CheckpointError, nothing changed, if it cannot."""
        saved = dict(checkpoint.entries["progress"])
        steps, sums = saved.pop("total_steps"), saved.pop("running")
        if steps != self.total_steps and not resume_conflicts(checkpoint.config, self.config):
            raise CheckpointError(
                f"{checkpoint.path}: expected a run of {self.total_steps} steps, got one of "
                f"{steps}; has the data changed?"
            )
        restore(
            checkpoint,
            config=self.config,
            model=self.model,
            optimizer=self.optimizer,
            parts=self.parts(),
        )
        self.progress = Progress(**saved)
        self.began = time.perf_counter() - self.progress.seconds
        self.running.sums.copy_(sums)
        set_rng_state(checkpoint.entries["rng"])

    def stop_if_asked(self) -> None:
        """Raise Stopped after a signal, or at `stop_after`."""
        steps = self.progress.step - self.first_step
        reached = self.stop_after is not None and steps >= self.stop_after
        if self.signals.received is not None or reached:
            raise Stopped(self.directory / LAST, self.progress.step, self.signals.received)

    def describe(self) -> str:
        """The run in one line."""
        config = self.config
        _, total = self.count_weights()
        start = f"from step {self.progress.step} of " if self.progress.step else ""
        goal = ""
        if self.sparsifier is not None:
            goal = f", sparsity {self.sparsifier.sparsity:.4g} to {config.sparsity}"
        return (
            f"{config.method} {config.model} on {config.dataset}: {total:,} weights{goal}; "
            f"{start}{self.total_steps} steps on {self.device}; {self.directory}"
        )
