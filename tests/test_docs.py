"""The code of README.md and docs/ runs as it stands, and its commands and flags are those there are."""

import re
import shlex
import tomllib
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

import granet
import granet_kernels
from granet import cli, recipes
from granet.commands.flags import flags_given, parse_settings
from granet.training.config import build_config
from granet_kernels import MaskedSGD, masked_layers, sparsify
from granet_kernels.ops import registry
from tests.pages import ROOT, blocks, inline_code, pages

RUN_ELSEWHERE = {"docs/integrations.md": "tests/test_integrations.py"}
NO_COMMANDS = {"docs/architecture.md": 1}
"""Indented blocks that are pictures, not commands."""
OTHERS = {"--no-build-isolation", "--dryrun", "--nproc-per-node", "--help", "--editable"}
"""Flags of pip, nvcc, torchrun, every command, and one of `granet report` that is on its way."""


def a_loader():
    return [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,))) for _ in range(25)]


def a_model():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def names_for_blocks():
    """What the blocks of a page take for granted."""
    x, y = a_loader()[0]
    names = {"model": a_model(), "build_model": a_model, "loader": a_loader(), "epochs": 4}
    return names | {"x": x, "y": y}


@pytest.fixture
def names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some save files
    return names_for_blocks()


@pytest.fixture
def one_rank():
    """A process group of this process, for the page on many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Blocks


@pytest.mark.parametrize("page", [*pages(), "CONTRIBUTING.md"])
def test_no_block_is_of_a_kind_that_nothing_looks_at(page):
    kinds = {"python", "console", "diff", "math", "indented"}
    found = blocks(page)
    assert {block.language for block in found} <= kinds
    if page == "CONTRIBUTING.md":
        assert [block.language for block in found] == ["python", "python"]  # each has its test
    if page in RUN_ELSEWHERE:
        code = (ROOT / RUN_ELSEWHERE[page]).read_text()
        assert len(blocks(page, "python")) == code.count("documented(") - 1  # its definition


@pytest.mark.parametrize(
    "page",
    [page for page in pages() if page not in RUN_ELSEWHERE and blocks(page, "python")],
)
def test_python_of_a_page_runs_from_top_to_bottom(page, names, request):
    if page == "docs/distributed.md":
        request.getfixturevalue("one_rank")
    for block in blocks(page, "python"):
        block.run(names)
    if page == "README.md":
        check_what_it_trained(names)


def check_what_it_trained(names):
    layers = masked_layers(names["model"]).values()
    numel = sum(layer.weight.numel() for layer in layers)
    assert sum(layer.count_active() for layer in layers) == numel - round(0.9 * numel)


def test_what_the_quickstart_prints(names, capsys):
    loop = blocks("docs/quickstart.md", "python")[0]
    loop.run(names)
    [promised] = re.findall(r"print\(sparsifier\) +# (.*)", loop.code)
    assert capsys.readouterr().out.strip() == promised


@pytest.mark.parametrize(
    ("page", "index"),
    [("docs/index.md", 0), ("docs/two-line-diff.md", 0), ("docs/two-line-diff.md", 1)],
)
@pytest.mark.parametrize("sign", ["-", "+"])
def test_both_sides_of_the_two_line_diff_run(page, index, sign, names):
    blocks(page, "diff")[index].side(sign).run(names)
    assert bool(masked_layers(names["model"])) == (sign == "+" and index == 1)


@pytest.mark.parametrize("index", [0, 1])
def test_what_a_migration_ends_with_runs(index, names):
    names |= vars(granet) | {"MaskedSGD": MaskedSGD, "sparsify": sparsify, "torch": torch}
    names["total"] = 25
    names["args"] = SimpleNamespace(update_frequency=5)
    names["optimizer"] = MaskedSGD(names["model"].parameters(), lr=0.1)
    blocks("docs/migration.md", "diff")[index].side("+").run(names)
    assert names["sparsifier"].steps == (25, 1)[index]


def test_every_diff_is_run():
    diffs = {page: len(found) for page in pages() if (found := blocks(page, "diff"))}
    assert diffs == {"docs/index.md": 1, "docs/two-line-diff.md": 2, "docs/migration.md": 2}


def test_the_example_backend_of_contributing(monkeypatch):
    monkeypatch.setattr(registry, "_backends", dict(registry._backends))
    blocks("CONTRIBUTING.md", "python")[0].run({})
    assert "opencl" in granet_kernels.backend_status()["opencl"]  # there is no such module
    registry._loaded.pop("opencl")


def test_the_example_method_of_contributing():
    names = {}
    blocks("CONTRIBUTING.md", "python")[1].run(names)
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


# Commands


def commands(page):
    """Lines of a page's command blocks, and what stands in its text as a command."""
    shown = blocks(page, "console")
    if page not in NO_COMMANDS:
        shown += blocks(page, "indented")
    lines = [line for block in shown for line in block.code.splitlines() if line.strip()]
    lines += [code for code in inline_code(page) if re.match(r"(\w+=\S+ )?granet [a-z]", code)]
    return [part.strip() for line in lines for part in line.split("#")[0].split(";")]


def words_of(command):
    """Without the environment before it, and with a value for what stands for one."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        del words[0]
    return [{"NAME": "rigl"}.get(word, word) for word in words]


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)])
def test_commands_are_what_the_program_takes(page):
    for command in commands(page):
        words = words_of(command)
        if words[0] == "granet":
            check_granet(words[1:], command)
        elif words[0] == "make":
            targets = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets[0].split(), command
        else:
            assert words[:2] == ["pip", "install"], command
            check_extras(words)


def check_granet(words, command):
    if OTHERS & set(words):
        return
    if len(words) == 1:  # spoken of, not called
        assert words[0] in parsers(), command
        return
    args, unknown = cli.make_parser().parse_known_args(words)
    assert not unknown, command
    needs_a_run = args.command == "train" and (
        args.resume is not None or any("/" in name for name in args.config)
    )
    if args.command == "train" and not needs_a_run:
        files = map(recipes.read, args.config)
        build_config(*files, parse_settings(args.settings) | flags_given(args))


def check_extras(words):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\.\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def test_indented_blocks_that_are_no_commands_are_known():
    for page, count in NO_COMMANDS.items():
        assert len(blocks(page, "indented")) == count


def test_the_quickstart_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """Its commands as they stand, but for pip."""
    monkeypatch.chdir(tmp_path)
    for block in blocks("docs/quickstart.md", "console"):
        for line in block.code.splitlines():
            words = words_of(line)
            if words[0] == "granet":
                assert cli.main(words[1:]) == 0, line
    out = capsys.readouterr().out
    assert "7,451 of 74,512 weights active" in out
    left = {file.name for file in (tmp_path / "runs" / "first").iterdir()}
    text = (ROOT / "docs/quickstart.md").read_text()
    named = set(re.findall(r"`(\w+\.(?:pt|yaml|csv))`", text))
    assert named >= {"best.pt", "last.pt", "topology.csv"}
    assert named <= left


@pytest.mark.parametrize("page", [page for page in pages() if page != "docs/cli.md"])
def test_listings_are_printed(page, capsys):
    for command in dict.fromkeys(commands(page)):
        words = words_of(command)
        if words[0] == "granet" and words[1] in ("methods", "recipes"):
            assert cli.main(words[1:]) == 0, command


def flags_of(parser):
    return {
        flag for action in parser._actions for flag in action.option_strings if flag[:2] == "--"
    }


def parsers():
    [found] = [a.choices for a in cli.make_parser()._actions if isinstance(a.choices, dict)]
    return found


@pytest.mark.parametrize("page", pages())
def test_flags_exist(page):
    text = (ROOT / page).read_text()
    if (
        page == "docs/migration.md"
    ):  # others' flags: the first cell of rows, comments, prose on them
        text = "\n".join(re.sub(r"^\| [^|]* \|", "", line) for line in text.splitlines())
        text = re.sub(r"# --.*|`--(multiplier|fp16)[^`]*`", "", text)
    known = OTHERS.union(*map(flags_of, parsers().values()))
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))
    assert named <= known


def test_the_program_s_page_has_every_command_and_its_own_flags():
    text = (ROOT / "docs/cli.md").read_text()
    shared = flags_of(parsers()["train"])
    for name, parser in parsers().items():
        assert f"granet {name}" in text
        own = set() if f"<!-- granet {name} --help -->" in text else flags_of(parser) - shared
        assert own <= set(re.findall(r"--[a-z-]+", text)), name
