"""What a training run is: its fields, their checks, and the YAML files that give them.

One dataclass is the source of everything: flags (`flags.py`), YAML keys, help texts and `args.yaml`.
A run is put together from layers, later ones winning: defaults, the checkpoint that is resumed, YAML
files and recipes, KEY=VALUE, flags.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import itertools
import math
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

from granet.method_arguments import ARGUMENTS, method_parameters
from granet.methods import METHODS

Time = int | str


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Everything that defines a training run. Flags and YAML keys have the fields' names.

    Times (`Time`) are optimizer steps, or a share of the run such as `"50%"`.

    Raises:
        ValueError: a field has the wrong type or lies outside its range; names field and value.
    """

    dataset: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder"] = "digits"
    """Images to train on. digits ships inside scikit-learn; the others are read from --data-dir."""
    data_dir: str | None = None
    """Folder that holds the dataset's files."""
    val_split: float = 0.1
    """Share of the training images held out to choose the best epoch."""
    image_size: int = 224
    """Height and width of imagefolder's images, in pixels."""
    workers: int = 0
    """Processes that load imagefolder's images; 0 loads them in this one."""

    model: str = "resnet_tiny"
    """lenet_300_100, resnet_tiny, resnet_tiny_s2, resnet20, resnet32, wrn16_8, wrn28_10, vgg19_cifar,
    resnet18_cifar, resnet50_cifar, or a model of torchvision, or timm/NAME."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory format."""
    torchcompile: bool = False
    """Compile the model with torch.compile."""

    batch_size: int = 64
    """Images in one forward pass."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added up for one optimizer step."""
    epochs: int = 30
    """Passes over the training images."""
    opt: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: sgd is granet_kernels.MaskedSGD, adamw is PyTorch's."""
    lr: float = 0.1
    """Peak learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov's form of momentum, as in the published CIFAR recipe (sgd only)."""
    weight_decay: float = 5e-4
    """L2 penalty on every parameter (sgd), or decoupled decay (adamw)."""
    sched: Literal["cosine", "step", "step3"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, tenths at 50 and 75 %, or at 30, 60 and 90 %."""
    warmup_epochs: float = 1.0
    """Epochs over which the learning rate rises linearly to its peak."""
    smoothing: float = 0.1
    """Label smoothing of the training loss."""
    clip_grad: float | None = None
    """Largest gradient norm (over active weights); larger gradients are scaled down."""
    amp: bool = False
    """Automatic mixed precision; float16 scales the loss to keep small gradients."""
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    """Compute type under --amp."""

    method: str = "granet"
    """dense trains every weight; `granet methods` lists the others."""
    sparsity: float = 0.9
    """Share of the weights that is zero at the end, in [0, 1)."""
    init_sparsity: float | None = None
    """Share of the weights that is zero at the start; 0 starts dense (granet: 0.5)."""
    update_freq: Time = "2%"
    """Time between two updates of the masks."""
    prune_start: Time | None = None
    """Time at which sparsity starts to rise (0)."""
    prune_end: Time | None = None
    """Time at which sparsity has reached its target (50%)."""
    ramp: str | None = None
    """The way there: cubic, linear, cosine, sigmoid or constant (cubic)."""
    distribution: str | None = None
    """How a sparsity is spread over the layers: erk, er, uniform, or a sparsity a layer, as 0.5,0.9,0.8."""
    erk_power: float | None = None
    """Power of the quotient in erk; 0 is uniform (1)."""
    scope: str | None = None
    """Prune the smallest weights of the whole network, or of each layer separately (global)."""
    floor: int | None = None
    """Fewest active weights of a layer (1)."""
    drop_fraction: float | None = None
    """Share of a layer's active weights replaced by an update, at first (granet: 0.5)."""
    drop_schedule: str | None = None
    """How that decays: cosine, linear or constant (granet: cosine)."""
    drop: str | None = None
    """What an update drops: magnitude, sign or random (granet: magnitude)."""
    grow: str | None = None
    """Where it regrows: gradient, momentum or random (granet: gradient)."""
    redistribution: str | None = None
    """How many each layer regrows: none (what it dropped), magnitude or momentum (none)."""
    regrown: str | None = None
    """How regrown weights start: keep, zero or layer_mean (keep)."""
    update_until: Time | None = None
    """Time of the last update (rigl: 75%)."""
    prune_at: Time | None = None
    """Time of one-shot's prune (50%)."""
    rounds: int | None = None
    """Prunes of lottery-ticket (11) and of synflow (100)."""
    rewind_to: Time | None = None
    """Step, or share of a round, that lottery-ticket returns to (0)."""
    score_batches: int = 1
    """Batches by which snip and grasp score weights before training."""
    official_rounding: bool = False
    """Reproduce the counts of the published code, which misses the target slightly."""

    seed: int = 0
    """Seed of the initial weights and masks, and of the order of the images."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda or cuda:N."""
    backend: str | None = None
    """Force a backend of granet_kernels, e.g. reference or cpp."""
    deterministic: bool = False
    """Ask PyTorch for deterministic CUDA algorithms (the CPU's always are)."""

    output: str = "runs"
    """Folder that holds the run directories."""
    experiment: str | None = None
    """Name of the run directory; without it DATASET-MODEL-METHOD-SEED."""
    log_interval: int = 50
    """Steps of an epoch between two reports of the running loss; 0 reports at its end only."""

    def __post_init__(self) -> None:
        for name, hint in field_types().items():
            if not _has_type(getattr(self, name), hint):
                raise _bad(name, _describe(hint), getattr(self, name))
        for name in ("batch_size", "grad_accum_steps", "epochs", "image_size", "score_batches"):
            self._require(name, getattr(self, name) >= 1, "a whole number of at least 1")
        for name in ("workers", "log_interval", "seed"):
            self._require(name, getattr(self, name) >= 0, "a whole number of at least 0")
        for name in ("sparsity", "smoothing", "momentum"):
            self._require(name, 0 <= getattr(self, name) < 1, "a number in [0, 1)")
        for name in ("weight_decay", "warmup_epochs"):
            self._require(name, 0 <= getattr(self, name) < math.inf, "a number of at least 0")
        self._require("lr", 0 < self.lr < math.inf, "a number above 0")
        self._require("val_split", 0 < self.val_split < 1, "a number in (0, 1)")
        if self.clip_grad is not None:
            self._require("clip_grad", 0 < self.clip_grad < math.inf, "a number above 0")
        known = ("dense", *METHODS)
        self._require("method", self.method in known, f"one of {', '.join(known)}")
        if self.method != "dense":
            self._check_method()

    def _check_method(self) -> None:
        """Whether a method takes the settings that were given; their values it checks itself."""
        taken = method_parameters(self.method)
        for name, argument in ARGUMENTS.items():
            is_given = getattr(self, name) is not None and getattr(self, name) is not False
            if is_given and argument not in taken:
                own = ", ".join(name for name, argument in ARGUMENTS.items() if argument in taken)
                raise ValueError(
                    f"{name}: {self.method} has no such setting; it has {own or 'none'}"
                )
        if self.init_sparsity is not None:
            in_range = 0 <= self.init_sparsity <= self.sparsity
            limit = f"a number from 0 to the final sparsity {self.sparsity}"
            self._require("init_sparsity", in_range, limit)
        if self.erk_power is not None:
            self._require(
                "erk_power", self.distribution in (None, "erk"), "distribution erk with it"
            )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise _bad(name, expected, getattr(self, name))

    @property
    def run_directory(self) -> Path:
        """`runs/experiment`, or `runs/DATASET-MODEL-METHOD-SEED`."""
        name = f"{self.dataset}-{self.model}-{self.method}-{self.seed}"
        return Path(self.output) / (self.experiment or name)


GROUPS: dict[str, str] = {
    "data": "dataset data_dir val_split image_size workers",
    "model": "model channels_last torchcompile",
    "optimization": """batch_size grad_accum_steps epochs opt lr momentum nesterov weight_decay
        sched warmup_epochs smoothing clip_grad amp amp_dtype""",
    "sparsity": """method sparsity init_sparsity update_freq prune_start prune_end ramp distribution
        erk_power scope floor drop_fraction drop_schedule drop grow redistribution regrown update_until
        prune_at rounds rewind_to score_batches official_rounding""",
    "machine": "seed device backend deterministic",
    "output": "output experiment log_interval",
}
"""Title of each group in `--help`, and the fields in it."""

SPARSE_FIELDS = frozenset(GROUPS["sparsity"].split()) - {"method"}
"""Fields that a dense run does not use."""

MACHINE_FIELDS = frozenset(
    f"data_dir workers torchcompile device backend deterministic {GROUPS['output']}".split()
)
"""Fields about where and how a run executes, not what it computes: resuming may change them."""


@functools.cache
def field_types() -> dict[str, Any]:
    """Field name -> type hint, in the order of the fields."""
    hints = typing.get_type_hints(TrainConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainConfig)}


@functools.cache
def field_docs() -> dict[str, str]:
    """Field name -> the docstring under it; Python keeps those in the source only."""
    source = textwrap.dedent(inspect.getsource(TrainConfig))
    [definition] = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for field, doc in itertools.pairwise(definition.body):
        if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
            docs[ast.unparse(field.target)] = str(ast.literal_eval(doc.value))
    return docs


def _bad(name: str, expected: str, value: object) -> ValueError:
    return ValueError(f"{name}: expected {expected}, got {value!r}")


def choices_of(hint: Any) -> tuple[str, ...]:
    """Of a field that takes some words only; none of any other."""
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def alternatives_of(hint: Any) -> tuple[Any, ...]:
    """Types that a field may have."""
    is_union = typing.get_origin(hint) in (Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _has_type(value: object, hint: Any) -> bool:
    if choices := choices_of(hint):
        return value in choices
    kinds = alternatives_of(hint)
    if isinstance(value, bool):  # a subclass of int, which `epochs: yes` should not slip through
        return bool in kinds
    if isinstance(value, int) and float in kinds:
        return True
    return isinstance(value, kinds)


def _describe(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    if choices := choices_of(hint):
        return "one of " + ", ".join(choices)
    return " or ".join(names.get(kind, "none") for kind in alternatives_of(hint))


def parse_value(name: str, text: str) -> object:
    """Value of the field `name` written as `text`; text that does not fit is returned as it is.

    The dataclass reports what does not fit, so that flags and YAML share one message.
    """
    kinds = alternatives_of(field_types()[name])
    if type(None) in kinds and text.lower() == "none":
        return None
    if bool in kinds and text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    for kind in (int, float):
        if kind in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    return text


def read_config_file(path: Path) -> dict[str, object]:
    """Fields given in a YAML file; keys are those of the flags, with - or _.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a YAML mapping, or holds a key that is not a field (says which are
            close).
    """
    import yaml  # in the [train] extra, and `granet check` must run without it

    if not path.is_file():
        raise FileNotFoundError(f"config: expected a YAML file, found none at {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not YAML: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"config: expected key: value lines in {path}, got {content!r}")
    fields = {str(key).replace("-", "_"): value for key, value in content.items()}
    refuse_unknown(fields, f"config: {path}")
    # YAML 1.1 reads 1e-4 as text
    return {
        name: parse_value(name, value) if isinstance(value, str) else value
        for name, value in fields.items()
    }


def refuse_unknown(names: Iterable[str], source: str) -> None:
    """Raise ValueError when one of `names` is not a field; the message starts with `source`."""
    for name in names:
        if name not in field_types():
            close = difflib.get_close_matches(name, field_types(), n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"{source}: unknown key {name!r}{hint}")


def build_config(*layers: Mapping[str, object]) -> TrainConfig:
    """The defaults, overridden by each of `layers` in turn."""
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    return TrainConfig(**merged)


def write_config_file(path: Path, config: TrainConfig) -> None:
    """Write every field as YAML; `read_config_file` gives it back."""
    import yaml

    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def resume_conflicts(saved: TrainConfig, current: TrainConfig) -> list[str]:
    """Fields that differ between a checkpoint and the run that would continue it.

    Fields about the machine and the output may differ; so may, in a dense run, the sparse ones.
    """
    free = MACHINE_FIELDS | (SPARSE_FIELDS if saved.method == current.method == "dense" else set())
    return [
        f"{name}: {getattr(saved, name)!r} in the checkpoint, {getattr(current, name)!r} now"
        for name in field_types()
        if name not in free and getattr(saved, name) != getattr(current, name)
    ]
