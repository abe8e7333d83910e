"""The repository's pages, and the code in them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """Code on a page."""

    page: str
    line: int
    """Of the page, on which the code begins."""
    language: str
    """After the fence; "indented" of a block without one."""
    code: str

    def run(self, names: dict[str, Any]) -> None:
        """Execute it; tracebacks name the page's lines."""
        code = "\n" * (self.line - 1) + self.code
        exec(compile(code, str(ROOT / self.page), "exec"), names)

    def side(self, sign: str) -> Block:
        """Of a diff what it adds (+) or takes away (-), with the lines that stay."""
        kept = [line[1:] for line in self.code.splitlines() if line[:1] in ("", " ", sign)]
        return Block(page=self.page, line=self.line, language="python", code="\n".join(kept))


def pages() -> list[str]:
    """README.md and everything in docs/."""
    return ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]


def blocks(page: str, *languages: str) -> list[Block]:
    """All of a page, or those of some languages."""
    found = [
        Block(
            page=page,
            line=token.map[0] + (2 if token.type == "fence" else 1),
            language=token.info.strip() if token.type == "fence" else "indented",
            code=token.content,
        )
        for token in _tokens(page)
        if token.type in ("fence", "code_block") and token.map is not None
    ]
    return [block for block in found if not languages or block.language in languages]


def inline_code(page: str) -> list[str]:
    """What stands between backticks."""
    return [
        child.content
        for token in _tokens(page)
        for child in token.children or ()
        if child.type == "code_inline"
    ]


def links(page: str) -> list[str]:
    """Targets of a page's links."""
    return [
        str(child.attrs["href"])
        for token in _tokens(page)
        for child in token.children or ()
        if child.type == "link_open"
    ]


def headings(page: str) -> Iterator[str]:
    """Of all levels, as text."""
    tokens = _tokens(page)
    for token, text in itertools.pairwise(tokens):
        if token.type == "heading_open":
            yield "".join(child.content for child in text.children or ())


def _tokens(page: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())
