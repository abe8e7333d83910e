"""What a training run is: its fields, their checks, and the YAML files that give them.

One dataclass is the source of everything: flags (`flags.py`), YAML keys, help texts and `args.yaml`.
A run is put together from layers, later ones winning: defaults, the checkpoint that is resumed, YAML
files and recipes, KEY=VALUE, flags. Values that came as text are read by the dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass

from granet.files import replacing
from granet.methods import METHODS
from granet.training.explain import explain
from granet.training.method_arguments import ARGUMENTS, method_parameters

Time = Annotated[int | str, Field(union_mode="left_to_right")]
Fraction = Annotated[float, Field(ge=0, lt=1)]


@dataclass(
    frozen=True,
    kw_only=True,
    slots=True,
    config=ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True),
)
class TrainConfig:
    """Everything that defines a training run. Flags and YAML keys have the fields' names.

    Times (`Time`) are optimizer steps, or a share of the run such as `"50%"`. Text is read as the
    command line and YAML write it: "1e-4", "yes", "none".

    Raises:
        pydantic.ValidationError: fields have the wrong type or lie outside their range, or do not fit
            together. It is a ValueError; `build_config` says the same in one line.
    """

    dataset: Literal["digits", "fashion-mnist", "cifar10", "cifar100", "imagefolder"] = "digits"
    """Images to train on. digits ships inside scikit-learn; the others are read from --data-dir."""
    data_dir: str | None = None
    """Folder that holds the dataset's files."""
    val_split: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training images held out to choose the best epoch."""
    image_size: PositiveInt = 224
    """Height and width of imagefolder's images, in pixels."""
    workers: NonNegativeInt = 0
    """Processes that load imagefolder's images; 0 loads them in this one."""

    model: str = "resnet_tiny"
    """lenet_300_100, resnet_tiny, resnet_tiny_s2, resnet20, resnet32, wrn16_8, wrn28_10, vgg19_cifar,
    resnet18_cifar, resnet50_cifar, or a model of torchvision, or timm/NAME."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory format."""
    torchcompile: bool = False
    """Compile the model with torch.compile."""

    batch_size: PositiveInt = 64
    """Images in one forward pass of a process."""
    grad_accum_steps: PositiveInt = 1
    """Batches whose gradients are added up for one optimizer step."""
    epochs: PositiveInt = 30
    """Passes over the training images."""
    opt: Literal["sgd", "adamw"] = "sgd"
    """Optimizer: sgd is granet_kernels.MaskedSGD, adamw is PyTorch's."""
    lr: PositiveFloat = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    """Momentum of sgd."""
    nesterov: bool = True
    """Nesterov's form of momentum, as in the published CIFAR recipe (sgd only)."""
    weight_decay: NonNegativeFloat = 5e-4
    """L2 penalty on every parameter (sgd), or decoupled decay (adamw)."""
    sched: Literal["cosine", "step", "step3"] = "cosine"
    """Learning rate after the warm-up: cosine to zero, tenths at 50 and 75 %, or at 30, 60 and 90 %."""
    warmup_epochs: NonNegativeFloat = 1.0
    """Epochs over which the learning rate rises linearly to its peak."""
    smoothing: Fraction = 0.1
    """Label smoothing of the training loss."""
    clip_grad: PositiveFloat | None = None
    """Largest gradient norm (over active weights); larger gradients are scaled down."""
    mixup: NonNegativeFloat = 0.0
    """Alpha of mixup, which trains on blends of two images; 0 is without."""
    model_ema: bool = False
    """Validate, test and keep the average of the weights over the steps, not the last weights."""
    model_ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.9998
    """Share of the average that a step leaves as it was, in the end; less in the first steps."""
    amp: bool = False
    """Automatic mixed precision; float16 scales the loss to keep small gradients."""
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    """Compute type under --amp."""

    method: str = "granet"
    """dense trains every weight; `granet methods` lists the others."""
    sparsity: Fraction = 0.9
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
    score_batches: PositiveInt = 1
    """Batches by which snip and grasp score weights before training."""
    official_rounding: bool = False
    """Reproduce the counts of the published code, which misses the target slightly."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
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
    log_interval: NonNegativeInt = 50
    """Steps of an epoch between two reports of the running loss; 0 reports at its end only."""

    @field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: ValidationInfo) -> object:
        """`none` as the command line has it; a bool only where one is meant, though Python's is an int."""
        kinds = field_kinds(str(info.field_name))
        if isinstance(value, str) and value.lower() == "none" and "null" in kinds:
            return None
        if isinstance(value, bool) and "boolean" not in kinds:
            raise ValueError("expected no bool")
        return value

    def __post_init__(self) -> None:
        name = self.experiment
        is_inside = name is None or not (set(Path(name).parts) & {"..", "/"} or "\0" in name)
        self._require("experiment", is_inside, "a name inside the output folder")
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
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def run_directory(self) -> Path:
        """`runs/experiment`, or `runs/DATASET-MODEL-METHOD-SEED`."""
        name = f"{self.dataset}-{self.model}-{self.method}-{self.seed}"
        return Path(self.output) / (self.experiment or name)


GROUPS: dict[str, str] = {
    "data": "dataset data_dir val_split image_size workers",
    "model": "model channels_last torchcompile",
    "optimization": """batch_size grad_accum_steps epochs opt lr momentum nesterov weight_decay
        sched warmup_epochs smoothing clip_grad mixup model_ema model_ema_decay amp amp_dtype""",
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
def field_schemas() -> dict[str, dict[str, Any]]:
    """Field name -> its JSON schema, in the order of the fields: type, range, default, description."""
    schemas: dict[str, dict[str, Any]] = TypeAdapter(TrainConfig).json_schema()["properties"]
    return schemas


def field_kinds(name: str) -> list[str]:
    """JSON's names of the types that a field may have: "integer", "string", "null" and so on."""
    schema = field_schemas()[name]
    return [alternative["type"] for alternative in schema.get("anyOf", [schema])]


def read_config_file(path: Path) -> dict[str, object]:
    """Fields given in a YAML file; keys are those of the flags, with - or _.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a YAML mapping, or holds a key that is not a field (says which are
            close).
    """
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
    return fields


def refuse_unknown(names: Iterable[str], source: str) -> None:
    """Raise ValueError when one of `names` is not a field; the message starts with `source`."""
    for name in names:
        if name not in field_schemas():
            close = difflib.get_close_matches(name, field_schemas(), n=3)
            hint = f"; close: {', '.join(close)}" if close else ""
            raise ValueError(f"{source}: unknown key {name!r}{hint}")


def build_config(*layers: Mapping[str, object]) -> TrainConfig:
    """The defaults, overridden by each of `layers` in turn.

    Raises:
        ValueError: a value does not fit; one line that names fields, what was expected and what came.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged.update(layer)
    refuse_unknown(merged, "config")
    try:
        return TrainConfig(**merged)
    except ValidationError as error:
        raise ValueError(explain(error, field_schemas())) from None


def write_config_file(path: Path, config: TrainConfig) -> None:
    """Write every field as YAML; `read_config_file` gives it back."""
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def resume_conflicts(saved: TrainConfig, current: TrainConfig) -> list[str]:
    """Fields that differ between a checkpoint and the run that would continue it.

    Fields about the machine and the output may differ; so may, in a dense run, the sparse ones.
    """
    free = MACHINE_FIELDS | (SPARSE_FIELDS if saved.method == current.method == "dense" else set())
    return [
        f"{name}: {getattr(saved, name)!r} in the checkpoint, {getattr(current, name)!r} now"
        for name in field_schemas()
        if name not in free and getattr(saved, name) != getattr(current, name)
    ]
