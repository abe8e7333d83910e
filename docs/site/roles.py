"""Docstrings' cross-references, :class:`granet.GraNet`, as links of the site."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?([\w.]+)`")


class Roles(griffe.Extension):
    """Where the site has no such name the text stays, without a link."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda role: _link(role[1], obj), obj.docstring.value)


def _link(name: str, obj: griffe.Object) -> str:
    path = name if name.startswith(("granet", "torch")) else _path(name, obj)
    return f'<autoref optional identifier="{path}"><code>{name}</code></autoref>'


def _path(name: str, obj: griffe.Object) -> str:
    """Of a name as it is known where a docstring stands: in its class, or its module."""
    first, *rest = name.split(".")
    scope = obj if obj.is_class or obj.is_module else obj.parent
    while scope is not None and first not in scope.members:
        scope = scope.parent
    if scope is None:
        return name
    member = scope.members[first]
    path = member.target_path if isinstance(member, griffe.Alias) else member.path
    return ".".join([path, *rest])
