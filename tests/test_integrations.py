"""Other libraries' training loops, each as it is installed: what a step is, and resuming bit for bit."""

import copy
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from granet import GraNet
from granet.distributed import unwrapped_optimizer
from granet_kernels import MaskedSGD, masked_layers, sparsify

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*isinstance.treespec, LeafSpec",  # theirs, about torch
    "ignore:Checkpoint directory .* is not empty",
    "ignore:The number of training batches",
    "ignore:Using ModelCheckpoint with manual optimization",
)

STEPS, BATCH = 20, 4
OPTIONS = {"sparsity": 0.8, "initial_sparsity": 0.5, "update_every": 3}


def examples(n=BATCH * 2 * STEPS):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 12, generator=generator)
    return [{"x": a, "labels": b} for a, b in zip(x, x.abs().argmax(1) % 3, strict=True)]


def a_net(dropout=0.0):
    torch.manual_seed(1)
    first = nn.Linear(12, 16), nn.ReLU(), nn.Dropout(dropout)
    return sparsify(nn.Sequential(*first, nn.Linear(16, 3)))


def an_optimizer(model, kind):
    if kind == "MaskedSGD":
        return MaskedSGD(model.parameters(), lr=0.1, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


class Watch:
    """A method for callbacks: GraNet that notes its updates, and at which steps they were."""

    def __init__(self):
        self.steps, self.changed = [], 0

    def __call__(self, model, optimizer, *, total_steps, **options):
        sparsifier = GraNet(model, optimizer, total_steps=total_steps, **options)
        sparsifier.observers.append(self.note)
        return sparsifier

    def note(self, change):
        self.steps.append(change.step)
        self.changed += sum(not torch.equal(m, change.after[n]) for n, m in change.before.items())


def bits(model, optimizer):
    """Copies of weights, masks and optimizer state, by place."""
    states = unwrapped_optimizer(optimizer).state_dict()["state"]
    return copy.deepcopy([model.state_dict(), states])


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def assert_sparsity(model, sparsity):
    layers = masked_layers(model).values()
    numel = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.count_active() for layer in layers) == numel - round(sparsity * numel)


def assert_sparse(model, optimizer):
    """Also that what is inactive is zero in the weights and in the optimizer's state."""
    assert_sparsity(model, OPTIONS["sparsity"])
    for layer in masked_layers(model).values():
        states = unwrapped_optimizer(optimizer).state[layer.weight].values()
        for tensor in (layer.weight, *(s for s in states if s.shape == layer.weight.shape)):
            assert not tensor[~layer.mask].any()


class Skips(torch.amp.GradScaler):
    """A scaler on the CPU, to which the gradients of one step look infinite."""

    def __init__(self, skipped):
        super().__init__("cpu", init_scale=16.0, growth_interval=1000)
        self.skipped, self.calls = skipped, 0

    def scale(self, outputs):
        self.calls += 1
        return super().scale(outputs) * (float("inf") if self.calls == self.skipped else 1)


# accelerate


@pytest.fixture
def accelerator():
    accelerate = pytest.importorskip("accelerate")
    states = accelerate.state
    states.AcceleratorState._reset_state(reset_partial_state=True)
    states.GradientState._reset_state()
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    states.AcceleratorState._reset_state(reset_partial_state=True)
    states.GradientState._reset_state()


def documented(library):
    """The block that docs/integrations.md has under a library's heading."""
    text = (Path(__file__).parent.parent / "docs" / "integrations.md").read_text()
    section = text.split(f"\n## {library}\n")[1].split("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    return code


class Accelerated:
    """A loop as accelerate's documentation has it."""

    def __init__(self, accelerator, kind, scaler=None):
        accelerator.scaler = scaler
        self.accelerator = accelerator
        model = a_net()
        loader = torch.utils.data.DataLoader(examples(), batch_size=BATCH)
        prepared = accelerator.prepare(model, an_optimizer(model, kind), loader)
        self.model, self.optimizer, self.loader = prepared
        self.watch = Watch()
        self.sparsifier = self.watch(self.model, self.optimizer, total_steps=STEPS, **OPTIONS)
        accelerator.register_for_checkpointing(self.sparsifier)

    def train(self, first=0, save_at=None, folder=None):
        accelerator = self.accelerator
        for i, batch in enumerate(self.loader):
            if i < first:
                continue
            with accelerator.accumulate(self.model):
                loss = nn.functional.cross_entropy(self.model(batch["x"]), batch["labels"])
                accelerator.backward(loss)
                self.optimizer.step()
                self.sparsifier.step()
                self.optimizer.zero_grad()
            if i + 1 == save_at:
                accelerator.save_state(folder)
        return bits(accelerator.unwrap_model(self.model), self.optimizer)


@pytest.mark.parametrize("kind", ["MaskedSGD", "AdamW"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(accelerator, kind, precision, tmp_path):
    options = {"gradient_accumulation_steps": 2, "mixed_precision": precision}
    whole = Accelerated(accelerator(**options), kind)
    end = whole.train(save_at=14, folder=tmp_path)
    assert whole.sparsifier.steps == STEPS
    assert whole.watch.steps == [3, 6, 9, 12, 15, 18]
    assert whole.watch.changed > 6
    assert_sparse(whole.model, whole.optimizer)

    resumed = Accelerated(accelerator(**options), kind)
    resumed.accelerator.load_state(tmp_path)
    assert resumed.sparsifier.steps == 7
    assert_same(resumed.train(first=14), end)
    assert resumed.watch.steps == [9, 12, 15, 18]


@pytest.mark.parametrize("kind", ["MaskedSGD", "AdamW"])
def test_accelerate_skips_a_step(accelerator, kind):
    run = Accelerated(accelerator(gradient_accumulation_steps=2), kind, Skips(skipped=5))
    run.train()
    assert run.sparsifier.steps == STEPS - 1
    assert run.watch.steps == [3, 6, 9, 12, 15, 18]
    assert_sparse(run.model, run.optimizer)


def test_optimizers_with_hooks_of_their_own_are_left_alone():
    class Slow(torch.optim.SGD):
        """Does more than the optimizer inside."""

    model = a_net()
    outer = Slow(model.parameters(), lr=0.1)
    outer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert unwrapped_optimizer(outer) is outer


def test_accelerate_in_docs(accelerator):
    model, data = a_net(), examples()
    names = {
        "torch": torch,
        "GraNet": GraNet,
        "accelerator": accelerator(),
        "total_steps": 2 * STEPS,
    }
    names |= {"model": model, "optimizer": an_optimizer(model, "AdamW")}
    names["loader"] = [(row["x"][None], row["labels"][None]) for row in data[: 2 * STEPS]]
    exec(documented("accelerate"), names)
    assert names["sparsifier"].steps == 2 * STEPS
    assert_sparsity(model, 0.9)


# Hugging Face


def hf_parts(folder, **changes):
    """A model and the arguments of a Trainer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig

        def __init__(self):
            super().__init__(transformers.PretrainedConfig())
            self.net = a_net(dropout=0.1)  # the Trainer saves the random state too
            self.post_init()

        def _init_weights(self, module):
            pass

        def forward(self, x, labels):
            return {"loss": nn.functional.cross_entropy(self.net(x), labels)}

    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 2,
        "save_strategy": "steps",
        "save_steps": 7,
        "logging_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return Model(), transformers.TrainingArguments(**settings | changes)


def hf_run(folder, kind="MaskedSGD", resume=None, scaler=None, method=None, **changes):
    model, args = hf_parts(folder, **changes)
    from transformers import Trainer

    from granet.integrations.huggingface import SparsifierCallback

    callback = SparsifierCallback(method or GraNet, **OPTIONS)
    trainer = Trainer(
        model,
        args,
        train_dataset=examples(BATCH * 2 * 9),  # so that a run is more than two epochs
        optimizers=(an_optimizer(model, kind), None),
        callbacks=[callback],
    )
    if scaler:
        trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return callback, trainer, bits(trainer.model, trainer.optimizer)


@pytest.mark.parametrize("kind", ["MaskedSGD", "AdamW"])
@pytest.mark.parametrize("bf16", [False, True])
def test_huggingface(tmp_path, kind, bf16):
    watch = Watch()
    callback, trainer, end = hf_run(tmp_path, kind, method=watch, bf16=bf16)
    assert callback.sparsifier.steps == trainer.state.global_step == STEPS
    assert watch.steps == [3, 6, 9, 12, 15, 18]
    assert watch.changed > 6
    assert_sparse(trainer.model, trainer.optimizer)
    assert trainer.accelerator.mixed_precision == ("bf16" if bf16 else "no")
    assert (tmp_path / "checkpoint-7" / "sparsifier.pt").is_file()
    assert "net.0.packed_mask" in trainer.model._ddp_params_and_buffers_to_ignore
    watch = Watch()
    resume = str(tmp_path / "checkpoint-7")
    _, _, again = hf_run(tmp_path, kind, resume, method=watch, bf16=bf16)
    assert watch.steps == [9, 12, 15, 18]
    assert_same(again, end)


def test_huggingface_skips_a_step(tmp_path):
    callback, trainer, _ = hf_run(tmp_path, "AdamW", scaler=Skips(skipped=5))
    assert callback.sparsifier.steps == trainer.state.global_step - 1 == STEPS - 1
    assert_sparse(trainer.model, trainer.optimizer)


def test_huggingface_goes_on_in_another_folder(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    _, _, end = hf_run(one)
    resume = str(one / "checkpoint-14")
    with pytest.raises(FileNotFoundError, match=r"expected sparsifier\.pt in .*checkpoint-14, .*"):
        hf_run(two, resume=resume)
    _, _, again = hf_run(two, resume=resume, resume_from_checkpoint=resume)
    assert_same(again, end)
    other = tmp_path / "other"  # holds a checkpoint of the same step of another run
    hf_run(other, learning_rate=1.0, seed=5)
    with pytest.raises(ValueError, match=r"other masks of net\.0"):
        hf_run(other, resume=resume)


def test_huggingface_saves_where_the_trainer_does(tmp_path):
    callback, trainer, _ = hf_run(tmp_path)
    trainer.state.global_step = 99  # a checkpoint that another process or a search has elsewhere
    trainer.state.is_hyper_param_search = True
    callback.on_save(trainer.args, trainer.state)
    trainer.state.is_hyper_param_search = False
    other = SimpleNamespace(output_dir=str(tmp_path), should_save=False)
    callback.on_save(other, trainer.state)
    with pytest.raises(RuntimeError, match="checkpoint-99"):
        callback.on_save(trainer.args, trainer.state)


def test_huggingface_takes_a_function_and_trains_twice(tmp_path):
    made = []

    def method(model, optimizer, total_steps, **options):
        made.append(GraNet(model, optimizer, total_steps=total_steps, **options))
        return made[-1]

    _, trainer, _ = hf_run(tmp_path, method=method)
    trainer.train()
    first, second = made
    assert first.steps == second.steps == STEPS
    hooks = unwrapped_optimizer(trainer.optimizer)._optimizer_step_post_hooks
    assert len(hooks) == 2  # those of the second alone


def test_huggingface_in_docs(tmp_path):
    model, args = hf_parts(tmp_path, optim="adamw_torch")
    import transformers

    names = {"transformers": transformers, "GraNet": GraNet, "model": model}
    exec(documented("transformers"), names | {"args": args, "dataset": examples()})
    assert (tmp_path / "checkpoint-7" / "sparsifier.pt").is_file()
    assert_sparsity(model, 0.9)


# Lightning


def lightning_module(kind, by_hand=False):
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = a_net()
            self.automatic_optimization = not by_hand

        def training_step(self, batch, _):
            loss = nn.functional.cross_entropy(self.net(batch["x"]), batch["labels"])
            if by_hand:
                optimizer = self.optimizers()
                self.manual_backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return loss

        def configure_optimizers(self):
            return an_optimizer(self, kind)

    return Module()


def lightning_run(
    folder,
    kind="MaskedSGD",
    resume=None,
    method=None,
    by_hand=False,
    module=None,
    callback=None,
    **changes,
):
    module = module or lightning_module(kind, by_hand)
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint

    from granet.integrations.lightning import SparsifierCallback

    callback = callback or SparsifierCallback(method or GraNet, **OPTIONS)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=7, save_top_k=-1)
    settings = {
        "max_steps": STEPS,
        "accumulate_grad_batches": 1 if by_hand else 2,
        "gradient_clip_val": 1.0 if kind == "AdamW" else None,  # never if an optimizer unscales
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [callback, saving],
    }
    trainer = Trainer(**settings | changes)
    # An epoch is 7 steps: plain loaders go on exactly from its end, which is no update, and no other.
    data = examples(BATCH * 7 * settings["accumulate_grad_batches"])
    loader = torch.utils.data.DataLoader(data, batch_size=BATCH)
    trainer.fit(module, loader, ckpt_path=resume)
    return callback, trainer, bits(module, trainer.optimizers[0])


@pytest.mark.parametrize("kind", ["MaskedSGD", "AdamW"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning(tmp_path, kind, precision):
    watch = Watch()
    callback, trainer, end = lightning_run(tmp_path, kind, method=watch, precision=precision)
    assert callback.sparsifier.steps == trainer.global_step == STEPS
    assert watch.steps == [3, 6, 9, 12, 15, 18]
    assert watch.changed > 6
    assert_sparse(trainer.lightning_module, trainer.optimizers[0])
    watch = Watch()
    _, _, again = lightning_run(
        tmp_path, kind, tmp_path / "step=7.ckpt", watch, precision=precision
    )
    assert watch.steps == [9, 12, 15, 18]
    assert_same(again, end)


def test_lightning_skips_a_step(tmp_path):
    plugins = pytest.importorskip("lightning.pytorch.plugins")
    scaler = plugins.MixedPrecision("16-mixed", "cpu", Skips(skipped=5))
    for kind in ("MaskedSGD", "AdamW"):
        scaler.scaler.calls = 0
        callback, trainer, _ = lightning_run(tmp_path, kind, plugins=[scaler])
        assert callback.sparsifier.steps == trainer.global_step - 1 == STEPS - 1
        assert_sparse(trainer.lightning_module, trainer.optimizers[0])


def test_lightning_with_a_step_in_the_module(tmp_path):
    watch = Watch()
    callback, _, _ = lightning_run(tmp_path, method=watch, by_hand=True)
    assert callback.sparsifier.steps == STEPS
    assert watch.steps == [3, 6, 9, 12, 15, 18]


def test_lightning_starts_anew_after_a_checkpoint_was_tested(tmp_path):
    callback, _, _ = lightning_run(tmp_path)
    callback.load_state_dict(callback.state_dict())  # as trainer.test(ckpt_path=...) does
    _, again, _ = lightning_run(tmp_path, callback=callback)
    assert callback.sparsifier.steps == again.global_step == STEPS


def test_lightning_refuses_what_has_no_end(tmp_path):
    with pytest.raises(
        ValueError, match="trainer: expected an end, max_epochs or max_steps, got inf"
    ):
        lightning_run(tmp_path, max_steps=-1, max_epochs=-1)


def test_lightning_refuses_two_optimizers(tmp_path):
    module = lightning_module("AdamW", by_hand=True)
    both = [an_optimizer(module.net[i], "AdamW") for i in (0, 3)]
    module.configure_optimizers = lambda: both
    with pytest.raises(ValueError, match="trainer: expected one optimizer, got 2"):
        lightning_run(tmp_path, module=module, by_hand=True)


def test_lightning_in_docs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # for logs and checkpoints
    lightning = pytest.importorskip("lightning")
    module = lightning_module("AdamW")
    names = {"lightning": lightning, "GraNet": GraNet, "epochs": 1}
    names |= {"module": module, "loader": torch.utils.data.DataLoader(examples(), batch_size=BATCH)}
    exec(documented("Lightning"), names)
    assert_sparsity(module, 0.9)
