"""A failed validation in one line: which fields, what was expected, what came."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

KINDS = {
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "boolean": "true or false",
    "null": "none",
}
BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "of at most",
    "exclusiveMaximum": "below",
}


def explain(error: ValidationError, schemas: Mapping[str, Mapping[str, Any]]) -> str:
    """What is wrong with each field; `schemas` are the JSON schemas of all of them."""
    problems = {}
    for problem in error.errors():
        if not problem["loc"]:  # of a check of several fields, in its own words
            problems[""] = str(problem["ctx"]["error"])
            continue
        # Once for a field of several types, of which pydantic reports each.
        name = str(problem["loc"][0])
        problems[name] = f"{name}: expected {in_words(schemas[name])}, got {problem['input']!r}"
    return "; ".join(problems.values())


def in_words(schema: Mapping[str, Any]) -> str:
    """The values that a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join(map(in_words, schema["anyOf"]))
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    bounds = [f"{words} {schema[bound]:g}" for bound, words in BOUNDS.items() if bound in schema]
    return f"{KINDS[schema['type']]} {' and '.join(bounds)}".rstrip()
