"""The training loop, and the run around it: resume, train, choose the best epoch, test."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from granet.data import derive_seed
from granet.flops import TrainingFlops, inference_flops, measure
from granet.monitor import TopologyMonitor
from granet.training import build
from granet.training.average import build_average
from granet.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_progress,
    get_rng_state,
    load_checkpoint,
    restore,
    save_checkpoint,
    set_rng_state,
)
from granet.training.config import MACHINE_FIELDS, TrainConfig, resume_conflicts
from granet.training.machine import this_machine
from granet.training.passes import Passes
from granet.training.processes import Processes, check_alike, joined
from granet.training.progress import Progress, RunningMetrics
from granet.training.record import Record, RunRecord
from granet.training.stopping import Stopped, StopSignals
from granet.training.telemetry import (
    BEST,
    LAST,
    SUMMARY,
    EpochMetrics,
    Summary,
    create_run_directory,
    write_summary,
)
from granet_kernels import count_active, masked_layers, use_backend


def train(
    config: TrainConfig, *, resume: Checkpoint | None = None, stop_after: int | None = None
) -> Summary:
    """Train, or continue, a run and test its best epoch.

    Started by torchrun, every process calls this; ``batch_size`` images go through each of them in
    a step.

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
    with surroundings(config) as processes:
        return Trainer(config, processes, resume=resume, stop_after=stop_after).run()


@contextmanager
def surroundings(config: TrainConfig) -> Iterator[Processes]:
    """The processes of the run, met, and the backend that it forces, inside `with`."""
    backend = nullcontext() if config.backend is None else use_backend(config.backend)
    with joined() as processes, backend:
        yield processes


class Trainer:
    """A run: everything is built, and restored, when it is constructed."""

    def __init__(
        self,
        config: TrainConfig,
        processes: Processes = Processes(),  # noqa: B008 - it cannot change
        *,
        resume: Checkpoint | None = None,
        stop_after: int | None = None,
    ) -> None:
        if stop_after is not None and stop_after < 1:
            raise ValueError(f"stop_after: expected at least 1 step, got {stop_after}")
        self.config, self.processes, self.stop_after = config, processes, stop_after
        check_alike(processes, self.common_settings(resume))
        self.signals = StopSignals()
        self.device = build.choose_device(config.device, processes)
        build.seed_everything(config)
        self.source = build.build_source(config, self.device, processes)
        self.batches_per_epoch = build.usable_batches(config, self.source.steps_per_epoch)
        self.total_steps = config.epochs * self.batches_per_epoch // config.grad_accum_steps

        self.model = build.build_model(config, self.source, self.device)
        self.optimizer = build.build_optimizer(config, self.model)
        self.sparsifier = build.build_sparsifier(
            config, self.model, self.optimizer, self.total_steps
        )
        self.average = build_average(config, self.model, self.optimizer, self.sparsifier)
        self.masked = masked_layers(self.network)
        self.scheduler = build.build_scheduler(
            config, self.optimizer, self.total_steps, self.sparsifier
        )
        self.scaler = build.build_scaler(config, self.device)
        self.passes = Passes(
            config,
            self.model,
            self.device,
            processes=processes,
            average=None if self.average is None else self.average.module,
            mix=build.build_mix(config, self.source.num_classes),
        )
        self.monitor = None if self.sparsifier is None else TopologyMonitor(self.sparsifier)
        self.dense_flops = measure(self.model, self.source.sample_shape)
        self.flops = TrainingFlops(self.dense_flops)
        self.progress = Progress()
        self.running = RunningMetrics(self.device)
        self.began = time.perf_counter()

        self.directory = config.run_directory if resume is None else resume.path.parent
        if resume is None:
            self.start()
        else:
            self.restore(resume)
        self.record = Record()
        if processes.is_first:
            machine = this_machine(
                self.device,
                step=self.progress.step,
                processes=processes.count,
                is_masked=bool(self.masked),
            )
            self.record = RunRecord(
                self.directory,
                config,
                self.progress,
                self.total_steps,
                machine=machine,
                layers=masked_layers(self.model),
            )
        self.active_fraction = self.active_fractions()
        self.first_step = self.progress.step

    def start(self) -> None:
        """Prune where that comes before training, and leave a checkpoint in a fresh directory."""
        build.start_sparsifier(self.config, self.sparsifier, self.source, self.device)
        if self.processes.is_first:
            create_run_directory(self.directory)
        if self.processes.rank:  # weights were drawn alike; what training draws should differ
            torch.manual_seed(derive_seed(self.config.seed, self.processes.rank))
        self.save(LAST)  # whatever happens from here on, the run can be resumed

    # The loop

    def train_epoch(self) -> None:
        """Train to the end of the epoch, from wherever in it the run stands."""
        config, accumulate = self.config, self.config.grad_accum_steps
        batches = self.source.train_batches(self.progress.epoch, start=self.progress.batch)
        self.model.train()
        for _ in range(self.progress.batch, self.batches_per_epoch, accumulate):
            some = itertools.islice(batches, accumulate)
            stepped = self.passes.step(some, self.see, self.optimizer, self.scaler)
            images = accumulate * config.batch_size * self.processes.count
            self.flops.add(self.active_fraction, images)
            if self.sparsifier is not None and self.sparsifier.step():
                self.active_fraction = self.active_fractions()
            self.optimizer.zero_grad()
            if stepped:
                if self.average is not None:
                    self.average.update_parameters(self.model)
                self.scheduler.step()
                self.progress.step += 1
            self.progress.batch += accumulate
            self.after_step()

    def run(self) -> Summary:
        """Train the epochs that are left, then test. See `train` for what it raises."""
        with self.signals.listen():
            return self._run()

    def _run(self) -> Summary:
        self.record.begin()
        if self.monitor is not None:
            self.monitor.sinks = self.record.sinks()
        try:
            self.record.message(self.describe())
            try:
                while self.progress.epoch < self.config.epochs:
                    self.train_epoch()
                    self.finish_epoch()
            except Stopped:
                self.save(LAST)
                raise
            return self.test()
        finally:
            self.record.close()

    def see(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """A batch's loss and accuracy into the epoch's means."""
        self.running.add(loss, outputs, labels)
        self.last_loss = loss

    def after_step(self) -> None:
        """Show the step, and stop where that was asked for."""
        progress, interval = self.progress, self.config.log_interval
        self.record.step(progress.step)
        step_of_epoch = progress.batch // self.config.grad_accum_steps
        if interval and step_of_epoch % interval == 0:
            loss, lr = self.last_loss.item(), self.last_lr()
            self.record.running(progress.epoch + 1, progress.step, loss, lr)
        self.stop_if_asked()

    def finish_epoch(self) -> None:
        """Validate, record the epoch's row, keep the checkpoint, and the best one."""
        progress = self.progress
        self.record.trained(progress.epoch + 1)
        self.processes.add(self.running.sums)
        train_loss, train_acc = self.running.means()
        if self.average is not None:
            batches = self.source.train_batches(progress.epoch)
            self.passes.measure_statistics(self.average, batches)
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
        self.record.epoch(metrics)
        self.save(LAST)

    def test(self) -> Summary:
        """Test the best epoch's weights (which `network` has afterwards); write summary.yaml."""
        progress = self.progress
        name = LAST if progress.best_epoch is None else BEST
        if self.processes.is_first:
            self.network.load_state_dict(load_checkpoint(self.directory / name).network)
        # Not by the state_dict, where masks in another memory format are copies.
        self.processes.send(itertools.chain(self.network.parameters(), self.network.buffers()))
        test_loss, test_acc = self.evaluate(self.source.test_batches())
        _, val_acc = self.evaluate(self.source.val_batches())
        active, total = self.count_weights()
        sparse = inference_flops(self.dense_flops, self.active_fractions())
        summary = Summary(
            checkpoint=name,
            epoch=progress.best_epoch or progress.epoch,
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
        if self.processes.is_first:
            write_summary(self.directory / SUMMARY, summary)
        self.record.message(
            f"test accuracy {test_acc:.2f} % ({name}, epoch {summary.epoch}); "
            f"sparsity {summary.sparsity:.4f}, {active:,} of {total:,} weights active; "
            f"see {self.directory}"
        )
        return summary

    # What it is made of

    @property
    def network(self) -> nn.Module:
        """What is validated and tested: the average of the weights, or the weights."""
        return self.model if self.average is None else self.average.module

    def evaluate(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Mean cross-entropy, and accuracy in percent, in evaluation mode."""
        if self.processes.count > 1:  # one may have more batches than another, and would ask alone
            return self.passes.evaluate(batches)
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

    def common_settings(self, resume: Checkpoint | None) -> dict[str, object]:
        """What has to be the same in all processes of a run."""
        fields = dataclasses.asdict(self.config)
        fields = {name: value for name, value in fields.items() if name not in MACHINE_FIELDS}
        step = None if resume is None else resume.entries["progress"]["step"]
        return {**fields, "stop_after": self.stop_after, "step of the checkpoint": step}

    # Stopping and resuming

    def entries(self) -> dict[str, Any]:
        """Everything that decides how the run goes on. All processes take part."""
        self.progress.seconds = time.perf_counter() - self.began
        progress = dataclasses.asdict(self.progress)
        running = self.running.sums.clone()
        self.processes.add(running)
        progress |= {"total_steps": self.total_steps, "running": running}
        rng, *other_rngs = self.processes.collect(get_rng_state())
        parts = {
            name: None if part is None else part.state_dict() for name, part in self.parts().items()
        }
        return {
            "config": dataclasses.asdict(self.config),
            "progress": progress,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": rng,
            "other_rngs": other_rngs,
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
            "average": self.average,
        }

    def save(self, name: str) -> None:
        """Write a checkpoint into the run directory. All processes take part."""
        entries = self.entries()
        if self.processes.is_first:
            save_checkpoint(self.directory / name, entries)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Stand where the checkpoint stood. CheckpointError, nothing changed, if it cannot."""
        saved = dict(checkpoint.entries["progress"])
        steps, sums = saved.pop("total_steps"), saved.pop("running")
        rngs = [checkpoint.entries["rng"], *checkpoint.entries["other_rngs"]]
        check_progress(checkpoint, processes=self.processes.count, batches=self.batches_per_epoch)
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
        if saved["best_epoch"] is not None and not (self.directory / BEST).is_file():
            raise CheckpointError(
                f"{checkpoint.path}: expected the best epoch's checkpoint beside it, found no {BEST}"
            )
        self.progress = Progress(**saved)
        self.began = time.perf_counter() - self.progress.seconds
        if self.processes.is_first:
            self.running.sums.copy_(sums)
        set_rng_state(rngs[self.processes.rank])

    def stop_if_asked(self) -> None:
        """Raise Stopped after a signal, or at `stop_after`."""
        steps = self.progress.step - self.first_step
        reached = self.stop_after is not None and steps >= self.stop_after
        received = self.processes.highest(self.signals.received or 0)  # one gets it before another
        if received or reached:
            raise Stopped(self.directory / LAST, self.progress.step, received or None)

    def describe(self) -> str:
        """The run in one line."""
        config = self.config
        _, total = self.count_weights()
        start = f"from step {self.progress.step} of " if self.progress.step else ""
        others = f" x {self.processes.count}" if self.processes.count > 1 else ""
        goal = ""
        if self.sparsifier is not None:
            goal = f", sparsity {self.sparsifier.sparsity:.4g} to {config.sparsity}"
        return (
            f"{config.method} {config.model} on {config.dataset}: {total:,} weights{goal}; "
            f"{start}{self.total_steps} steps on {self.device}{others}; {self.directory}"
        )
