"""The documentation: its facts are the code's, and the site builds, strictly and without a network."""

import inspect
import re
from pathlib import Path

import pytest

import granet
import granet_kernels
from granet.methods import METHODS
from granet.paper import DENSE, FIGURES
from tests.pages import ROOT, blocks, headings, links, pages

# Facts


def test_links_lead_somewhere():
    """Also in the plain repository: the site's own are checked by its build."""
    for page in [*pages(), "CONTRIBUTING.md"]:
        for link in links(page):
            if link.startswith("http"):
                continue
            path, _, anchor = link.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), (page, link)
            if anchor and not anchor.startswith("granet"):
                name = str(target.resolve().relative_to(ROOT))
                assert anchor in {anchor_of(title) for title in headings(name)}, (page, link)


def anchor_of(title):
    return re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-")


def test_the_readme_s_figures_are_those_of_the_performance_page():
    readme = (ROOT / "README.md").read_text().split("\n## How fast it is\n")[1].split("\n## ")[0]
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    assert len(rows) > 25
    performance = (ROOT / "docs/performance.md").read_text().splitlines()
    assert [row for row in rows if row not in performance] == []


def test_figures_of_others_are_those_of_the_module():
    text = (ROOT / "docs/methods.md").read_text()

    def cell(figure):
        return (
            "–" if figure is None else f"{figure.accuracy:.2f}{'*' * (figure.provenance == '2nd')}"
        )

    for model in ("vgg19_cifar", "resnet50_cifar"):
        both = [FIGURES["cifar10", model], FIGURES["cifar100", model]]
        for recipe in both[0]:
            cells = [cell(of.get(recipe, {}).get(s)) for of in both for s in (0.9, 0.95, 0.98)]
            assert f"| `{recipe}` | {' | '.join(cells)} |" in text
        dense = " and ".join(cell(DENSE[data, model]) for data in ("cifar10", "cifar100"))
        assert f"(dense {dense})" in text


def test_the_guide_has_every_method_its_source_and_its_defaults():
    text = (ROOT / "docs/methods.md").read_text()
    for name, method in METHODS.items():
        [row] = re.findall(rf"^\| `{name}`, `{method.__name__}` .*$", text, re.MULTILINE)
        assert row.endswith(f"| {method.source} |")
    rows = dict(
        re.findall(r"^\| `(\w+)` \| (\d.*) \|$", text.split("\n## Defaults\n")[1], re.MULTILINE)
    )
    assert rows.keys() == {"GraNet", "GMP", "RigL", "RigLITOP", "SET"}
    for name, row in rows.items():
        every, _, drop, distribution = row.split(" | ")
        defaults = inspect.signature(getattr(granet, name)).parameters
        assert int(every) == defaults["update_every"].default
        assert distribution.split(",")[0] == defaults["distribution"].default
        if "drop_fraction" in defaults:
            assert float(drop.split(",")[0]) == defaults["drop_fraction"].default


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Built as `make docs` does, where warnings are errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        from mkdocs.commands.build import build
        from mkdocs.config import load_config

        folder = tmp_path_factory.mktemp("site")
        build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True))
    return folder


def html(site):
    return {path.relative_to(site): path.read_text() for path in site.glob("**/*.html")}


def test_every_page_is_built(site):
    named = {page.removeprefix("docs/").replace(".md", ".html") for page in pages()}
    named -= {"README.html"}
    assert {"CONTRIBUTING.html", "CHANGELOG.html", *named} <= {str(path) for path in html(site)}


def test_the_site_fetches_nothing(site):
    """No script, style, font or image of another host, in pages or in styles."""
    fetches = r"<(?:script|link|img|iframe|source)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//"
    for path, text in html(site).items():
        assert not re.findall(fetches, text), path
    for path in site.glob("**/*.css"):
        assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", path.read_text()), path


def test_formulas_need_no_script(site):
    text = html(site)[Path("algorithm.html")]
    assert text.count("<math") == len(blocks("docs/algorithm.md", "math")) == 3
    assert "MathJax" not in text


def test_the_program_s_help_is_on_its_page(site):
    text = html(site)[Path("cli.html")]
    assert "--help --&gt;" not in text
    assert "<!-- granet" not in text
    assert "--sparsity X" in re.sub(r"<[^>]+>", "", text)


@pytest.mark.parametrize("package", [granet, granet_kernels])
def test_every_public_name_is_on_a_page_of_the_api(package, site):
    text = "".join(text for path, text in html(site).items() if path.parts[0] == "api")
    prefix = package.__name__
    missing = [name for name in package.__all__ if f'id="{prefix}.{name}"' not in text]
    assert missing == []
    modules = re.findall(
        rf'<h\d id="{prefix}\.(\w+)"[^>]*>\s*<code class="doc-symbol doc-symbol-heading doc-symbol-module',
        text,
    )
    assert set(modules).isdisjoint(package.__all__)  # of the same name


def test_roles_of_docstrings_are_links(site):
    for path, text in html(site).items():
        assert not re.findall(r":(?:class|func|meth|mod|attr):", text), path


@pytest.mark.parametrize("package", [granet, granet_kernels])
def test_every_public_name_has_a_docstring(package):
    for name in package.__all__:
        value = getattr(package, name)
        assert isinstance(value, dict) or (value.__doc__ or "").strip(), name
