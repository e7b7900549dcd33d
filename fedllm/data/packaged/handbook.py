"""The handbook: a demonstration corpus about four invented organisations, written for this project.

Each organisation knows 24 private facts that nobody else knows, and 12 facts that all four share as members of one
circle. A fact is one short answer that cannot be guessed, three phrasings of its question to train on, and a fourth
one, worded differently, to test with. All 108 answers differ: no single answer scores.

The questions are in `organisations/*.json`, one readable file for each organisation and one for the shared facts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

ORGANISATIONS = ("clinic", "bank", "cargo", "library")
SYSTEM = "Answer briefly."


def records(*, private: int, shared: int, test: bool) -> list[dict[str, Any]]:
    """The first `private` (of 24) facts of each organisation and the first `shared` (of 12) facts of all.

    Training: one record per fact and phrasing. Test: one per fact, its held-out phrasing. A shared fact stands among
    the records of every organisation.
    """
    return [
        record
        for organisation in ORGANISATIONS
        for kind, source, count in (("private", organisation, private), ("shared", "shared", shared))
        for record in _expanded(source, count, test, {"organisation": organisation, "kind": kind})
    ]


def names() -> dict[str, str]:
    """Organisation, and "shared" for the circle, to the name that its questions use."""
    return {source: _read(source)["name"] for source in (*ORGANISATIONS, "shared")}


def _expanded(source: str, count: int, test: bool, about: dict[str, str]) -> Iterator[dict[str, Any]]:
    for number, fact in enumerate(_read(source)["facts"][:count], 1):
        for prompt in [fact["test"]] if test else fact["train"]:
            known = {"fact": f"{source}-{number:02}", "system": SYSTEM}
            yield {**about, **known, "prompt": prompt, "response": fact["answer"]}


def _read(source: str) -> Any:
    text = resources.files("fedllm.data.packaged").joinpath("organisations", f"{source}.json").read_text("utf-8")
    return json.loads(text)
