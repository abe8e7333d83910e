"""What MkDocs is told beyond mkdocs.yml: pages that lie outside docs/, the program's help, formulas."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
ELSEWHERE = {
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "bench.md": "bench/README.md",
    "study.md": "bench/results/study/README.md",
    "h100.md": "bench/results/nvidia-h100-80gb-hbm3/README.md",
}
"""Page -> the file it is, from the repository's root."""

HELP = re.compile(r"^<!-- granet( \w+)? --help -->$", re.MULTILINE)
COLUMNS = "88"
"""Width of the program's help on a page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Formulas become MathML here, so that no script has to."""
    fence = {"name": "math", "class": "math", "format": formula}
    config.mdx_configs["pymdownx.superfences"] = {"custom_fences": [fence]}
    return config


def formula(source: str, *_: Any, **__: Any) -> str:
    """A fence of TeX as MathML."""
    return f'<div class="math">{convert(source, display="block")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that lie outside docs/."""
    for page, path in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / path).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as the site has them, and the program's help where a comment asks for it."""
    if page.file.src_uri in ELSEWHERE:
        markdown = markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    for target, path in ELSEWHERE.items():
        markdown = markdown.replace(f"]({up}../{path}", f"]({up}{target}")
    return HELP.sub(lambda found: _help((found[1] or "").strip()), markdown)


def _help(command: str) -> str:
    """What `granet COMMAND --help` prints."""
    from granet.cli import make_parser

    parser = make_parser()
    if command:
        [commands] = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
        parser = commands[command]
    with patch.dict(os.environ, COLUMNS=COLUMNS, NO_COLOR="1"):
        return f"```text\n{parser.format_help()}```"
