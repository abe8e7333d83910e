"""Exports come back as the network that they were made of."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from granet import models
from granet.cli import main
from granet.export.formats import FORMATS, compacted, expanded, export, load_compact
from granet.training.checkpoint import load_checkpoint
from granet.training.train import train
from granet_kernels import compress, densify, masked_layers, sparsify
from tests.tiny_runs import make_network, tiny, tiny_config  # noqa: F401


def network(memory_format: torch.memory_format = torch.contiguous_format) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 5)
    )
    model = sparsify(model).to(memory_format=memory_format)
    for layer in masked_layers(model).values():
        layer.mask = torch.rand(layer.weight.shape) < 0.2
    model(torch.randn(16, 2, 5, 5))  # statistics
    return model.eval()


IMAGES = torch.randn(3, 2, 5, 5, generator=torch.Generator().manual_seed(1))
BOTH = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])


@BOTH
def test_dense(tmp_path: Path, memory_format: torch.memory_format) -> None:
    model = network(memory_format)
    export(model, "dense", tmp_path / "net.pt", (2, 5, 5))
    dense = densify(network())
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert not any("mask" in key for key in state)
    for parameter in dense.parameters():
        nn.init.zeros_(parameter)
    dense.load_state_dict(state)
    assert torch.allclose(dense.eval()(IMAGES), model(IMAGES), atol=1e-6)


@pytest.mark.parametrize("form", ["dense", "compressed"])
def test_files_are_the_same_bytes_under_any_name(tmp_path: Path, form: str) -> None:
    model, files = network(), [tmp_path / "net.pt", tmp_path / "net", tmp_path / ".net"]
    for file in files:
        export(model, form, file, (2, 5, 5))
    assert sorted(tmp_path.iterdir()) == sorted(files)
    assert len({file.read_bytes() for file in files}) == 1


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safetensors(
    tmp_path: Path, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    pytest.importorskip("safetensors")
    model = network(memory_format).to(dtype)
    size = export(model, "safetensors", tmp_path / "net.safetensors", (2, 5, 5))
    assert size < sum(p.numel() for p in model.parameters()) * dtype.itemsize + 2000
    again = load_compact(tmp_path / "net.safetensors", sparsify(densify(network().to(dtype))))
    assert _same(again.state_dict(), model.state_dict())
    dense = load_compact(tmp_path / "net.safetensors", densify(network().to(dtype)))
    assert _same(dense.state_dict(), densify(model).state_dict())
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        load_compact(tmp_path / "net.safetensors", nn.Linear(2, 2))
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="expected a network that granet exported"):
        load_compact(tmp_path / "other.safetensors", model)


def _same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_network_with_nothing_active_comes_back() -> None:
    model = network()
    for layer in masked_layers(model).values():
        layer.mask = torch.zeros_like(layer.weight, dtype=torch.bool)
    assert _same(expanded(*compacted(model)), dict(model.state_dict()))


def test_compressed(tmp_path: Path) -> None:
    model = network()
    export(model, "compressed", tmp_path / "net.pt", (2, 5, 5))
    again = compress(network())
    again.load_state_dict(torch.load(tmp_path / "net.pt", weights_only=True))
    assert torch.allclose(again(IMAGES), model(IMAGES), atol=1e-5)


def test_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = network()
    export(model, "onnx", tmp_path / "net.onnx", (2, 5, 5))
    session = runtime.InferenceSession(
        str(tmp_path / "net.onnx"), providers=["CPUExecutionProvider"]
    )
    [name] = [entry.name for entry in session.get_inputs()]
    for images in (IMAGES, IMAGES[:1]):
        [outputs] = session.run(None, {name: images.numpy()})
        assert torch.allclose(torch.from_numpy(outputs), model(images), atol=1e-5)


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="format: expected one of dense, safetensors"):
        export(network(), "tflite", tmp_path / "net", (2, 5, 5))
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(ImportError, match="format: 'onnx' needs the packages onnx and onnxscript"):
        export(network(), "onnx", tmp_path / "net", (2, 5, 5))


def pasted(printed: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Of what the command prints: how each format's file is loaded."""
    monkeypatch.setattr(models, "create_model", make_network)
    parts = re.split(r"^(?=\S)", printed, flags=re.M)[1:]
    names = {".dense.pt": "dense", ".compressed.pt": "compressed", ".onnx": "onnx"}
    found = {}
    for part in parts:
        head, _, lines = part.partition("\n")
        form = next((name for end, name in names.items() if f"best{end}:" in head), None)
        if "best.safetensors:" in head:
            form = "safetensors"
        if form is not None:
            found[form] = textwrap.dedent(lines)
    assert {"dense", "compressed", "safetensors"} <= found.keys()
    return found


def test_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    train(config)
    capsys.readouterr()
    assert main(["export", str(config.run_directory), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"{tmp_path}/out/best.dense.pt: " in printed
    for form in FORMATS:
        assert f"best.{form}" in printed or f"{form}: left out" in printed
    expected = load_checkpoint(config.run_directory / "best.pt").network
    for form, lines in pasted(printed, monkeypatch).items():
        found: dict[str, Any] = {}
        exec(lines, found)
        if form == "onnx":
            assert found["session"].get_inputs()
            continue
        weights = dict(found["model"].state_dict())
        if form == "compressed":
            assert sum(v.numel() for k, v in weights.items() if k.endswith("values")) == 159
        else:
            assert torch.equal(weights["5.weight"], expected["5.weight"]), form
    assert main(["export", str(config.run_directory / "last.pt"), "--format", "dense"]) == 0
    assert (config.run_directory / "last.dense.pt").is_file()
    dense = tiny_config(tmp_path, method="dense", experiment="dense", epochs=1)
    train(dense)
    with pytest.raises(SystemExit):
        main(["export", str(dense.run_directory), "--format", "compressed"])
    assert "granet export: error: " in capsys.readouterr().err
