"""The code blocks of README.md and CONTRIBUTING.md run as they stand."""

import re
from pathlib import Path

import torch
from torch import nn

from granet_kernels import MaskedSGD, masked_layers, sparsify

ROOT = Path(__file__).parent.parent


def code_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def a_loader():
    return [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(25)]


def a_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def test_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # one of them saves a file
    blocks = code_blocks("README.md")
    assert len(blocks) == 3
    names = {"model": a_model(), "loader": a_loader(), "epochs": 4, "build_model": a_model}
    for block in blocks:
        exec(block, names)
    layers = masked_layers(names["model"]).values()
    numel = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.count_active() for layer in layers) == numel - round(0.9 * numel)


def test_the_example_method_of_contributing():
    (block,) = code_blocks("CONTRIBUTING.md")
    names = {}
    exec(block, names)
    model = sparsify(a_model())
    optimizer = MaskedSGD(model.parameters(), lr=0.01, momentum=0.9)
    method = names["SNFS"](model, optimizer, sparsity=0.8, total_steps=25, update_every=5)
    before = [layer.mask for layer in method.layers.values()]
    for x, y in a_loader():
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        method.step()
        optimizer.zero_grad()
    assert sum(method.active_counts()) == method.numel - round(0.8 * method.numel)
    changed = [
        not torch.equal(layer.mask, old)
        for layer, old in zip(method.layers.values(), before, strict=True)
    ]
    assert all(changed)
