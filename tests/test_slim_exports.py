"""What comes out where dead channels are removed: masks, dtypes, programs, the command."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from granet.cli import main
from granet.export.dead_channels import remove_dead_channels
from granet.export.formats import PROGRAMS, export_program
from granet.training.train import train
from granet_kernels import masked_layers, sparsify
from tests.dead_channels import DEAD, settle, stack
from tests.tiny_runs import tiny, tiny_config  # noqa: F401


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def masked_network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Flatten(),
        nn.Linear(8 * 16, 3),
    )
    settle(model[1], -1.0)
    model = sparsify(model, exclude=["5"]).eval()
    for layer in masked_layers(model).values():
        mask = torch.rand(layer.weight.shape) < 0.5
        if layer.in_channels == 2:
            mask[DEAD] = False
        layer.mask = mask  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_and_dtypes_are_kept(dtype: torch.dtype) -> None:
    model = masked_network().to(dtype)
    slim = remove_dead_channels(model, (2, 6, 6)).model
    assert list(masked_layers(slim)) == ["0", "3"]
    assert {p.dtype for p in slim.parameters()} == {dtype}
    counts = [layer.bitmask.count() for layer in masked_layers(model).values()]
    left = [layer.bitmask.count() for layer in masked_layers(slim).values()]
    assert left[0] == counts[0]  # the dead had none
    assert left[1] < counts[1]


def test_new_biases_have_their_weights_dtype() -> None:
    model = stack(nn.BatchNorm2d(6), padding=0).bfloat16().eval()
    settle(model[1], 1.0)
    slim = remove_dead_channels(model, (2, 8, 8)).model
    assert slim.get_submodule("2").bias.dtype == torch.bfloat16


@pytest.mark.parametrize("form", PROGRAMS)
def test_exported_programs(form: str, tmp_path: Path) -> None:
    model = masked_network()
    path = tmp_path / f"net.{'onnx' if form == 'onnx' else 'pt2'}"
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    export_program(remove_dead_channels(model, (2, 6, 6)).model, form, path, (2, 6, 6))
    images = torch.randn(5, 2, 6, 6)
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        [result] = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        assert torch.allclose(torch.from_numpy(result), model(images), atol=1e-5)
        return
    torch.save(images, tmp_path / "images.pt")
    wanted = "import granet_kernels" if form == "compressed" else "import torch"
    code = f"""if True:
        {wanted}; import sys, torch
        model = torch.export.load({str(path)!r}).module()
        torch.save(model(torch.load({str(tmp_path / "images.pt")!r})), {str(tmp_path / "out.pt")!r})
        assert "granet" not in sys.modules"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    assert torch.allclose(torch.load(tmp_path / "out.pt"), model(images), atol=1e-5)


def test_safetensors_needs_a_class(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected one of dense, compressed, onnx for a network"):
        export_program(masked_network(), "safetensors", tmp_path / "net", (2, 6, 6))


class ReadsValues(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


def test_what_cannot_be_traced_or_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"that torch\.fx can trace, got ReadsValues: "):
        remove_dead_channels(ReadsValues(), (4,))
    with pytest.raises(ValueError, match=r"runs in fp64 on samples of \(5,\), got Linear: "):
        remove_dead_channels(nn.Linear(4, 4), (5,))


def test_a_difference_is_an_error() -> None:
    class Hidden(nn.Module):
        """Which tracing would take for the identity."""

        def forward(self, x: Tensor) -> Tensor:
            return x if isinstance(x, torch.fx.Proxy) else x + 1

    with pytest.raises(ValueError, match="remove_dead_channels: the outputs differ by 1"):
        remove_dead_channels(nn.Sequential(nn.Linear(4, 4), Hidden()), (4,))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(tmp_path, sparsity=0.9)
    train(config)
    run = str(config.run_directory)
    capsys.readouterr()
    line = ["export", run, "--remove-dead-channels", "--format", "dense", "--format", "compressed"]
    assert main(line) == 0
    printed = capsys.readouterr().out
    assert " such stay; parameters: " in printed
    assert "best.slim.dense.pt2: " in printed
    assert (
        "    import granet_kernels  # which has the operators\n    model = torch.export.load("
        in printed
    )
    assert sorted(path.name for path in config.run_directory.glob("*.slim.*")) == [
        "best.slim.compressed.pt2",
        "best.slim.dense.pt2",
    ]
    with pytest.raises(SystemExit):
        main([*line, "--format", "safetensors"])
    assert "expected dense, compressed or onnx with remove_dead_channels" in capsys.readouterr().err
