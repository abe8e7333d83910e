"""Sparse training with ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from granet.distributed import leave_masks_alone, unwrapped
from granet.integrations.keeper import Keeper
from granet.placement import layers_of

FILE = "sparsifier.pt"
"""In each checkpoint's directory."""


class SparsifierCallback(Keeper, TrainerCallback):
    """Trains the Trainer's model sparsely: ``callbacks=[SparsifierCallback(GraNet, sparsity=0.9)]``.

    The model has masked layers already (``granet_kernels.sparsify``). Each checkpoint gets a file with
    the sparsifier's state, and a run that is resumed from it goes on bit for bit. Trials of a
    hyperparameter search have no such file.
    """

    def on_init_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Before the Trainer wraps the model for several processes."""
        if model is not None:
            leave_masks_alone(model)

    def on_train_begin(
        self, args: Any, state: Any, _: Any, *, model: Any, optimizer: Any, **__: Any
    ) -> None:
        """Make the sparsifier; model and optimizer have been loaded if the run goes on.

        Raises:
            FileNotFoundError: it goes on from a checkpoint without a file of the sparsifier.
            ValueError: the file found belongs to another checkpoint or another method.
        """
        if state.global_step == 0:
            self.make(model, optimizer, state.max_steps)
            return
        saved = torch.load(_file(args, state), map_location="cpu", weights_only=True)
        loaded = {
            name: layer.bitmask.canonical().cpu().clone()
            for name, layer in layers_of(unwrapped(model)).items()
        }
        self.make(model, optimizer, state.max_steps, saved)
        for name, mask in loaded.items():
            if not torch.equal(mask, saved["masks"][name]):
                raise ValueError(
                    f"{_file(args, state)}: expected the state of the checkpoint that was loaded, got "
                    f"other masks of {name}; {_HINT}"
                )

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Put the sparsifier's state beside the model's."""
        if self.sparsifier and args.should_save and not state.is_hyper_param_search:
            torch.save(self.sparsifier.state_dict(), _last(args, state) / FILE)


_HINT = (
    "to go on from a checkpoint outside of output_dir, name it in "
    "TrainingArguments(resume_from_checkpoint=...) too"
)


def _last(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")


def _file(args: Any, state: Any) -> Path:
    """Callbacks are not told which checkpoint was loaded, only which step it was taken at."""
    named = args.resume_from_checkpoint
    folders = [*([Path(named)] if named else []), _last(args, state)]
    for folder in folders:
        if (folder / FILE).is_file():
            return folder / FILE
    places = " or ".join(str(folder) for folder in folders)
    raise FileNotFoundError(f"checkpoint: expected {FILE} in {places}, found none; {_HINT}")
