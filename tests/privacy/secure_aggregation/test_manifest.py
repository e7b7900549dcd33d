"""The conditions of a round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedllm.privacy.secure_aggregation.faults import ManifestError, MessageError
from fedllm.privacy.secure_aggregation.manifest import HEAD, Manifest, read_manifest
from tests.privacy.secure_aggregation.network import cohort

KEYS = cohort(4).manifest.cohort
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "version": ({"version": 2}, "its protocol is version 2; this is version 1"),
    "one client": ({"cohort": KEYS[:1]}, "its cohort has 1 clients"),
    "same name": ({"cohort": (*KEYS[:3], (KEYS[0][0], KEYS[3][1]))}, "the same name"),
    "same key": ({"cohort": (*KEYS[:3], (KEYS[3][0], KEYS[0][1]))}, "the same identity key"),
    "no name": ({"cohort": (*KEYS[:3], ("", KEYS[3][1]))}, "too long or empty"),
    "short hash": ({"model": bytes(31)}, "have 32 bytes"),
    "empty vector": ({"length": 0}, "0 entries cannot be summed"),
    "odd degree": ({"degree": 1}, "a degree of 1 with 4 clients; it is even, or 3"),
    "high degree": ({"degree": 4}, "a degree of 4"),
    "no threshold": ({"threshold": 0}, "a threshold of 0"),
    "high threshold": ({"threshold": 4}, "a threshold of 4 with 3 neighbours"),
    "one survivor": ({"min_survivors": 1}, "a sum of 1 clients"),
    "odd ring": ({"bits": 24}, r"a ring of 2\^24"),
    "overflow": ({"bound": 2**29}, r"overflow the ring 2\^32; at most 536870911 fit"),
    "heavy": ({"bound": 5, "weight_cap": 6}, "a weight of 6"),
    "cipher": ({"cipher": "rot13"}, "masks by 'rot13'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_manifest_under_which_no_sum_is_right_cannot_be_made(case: str) -> None:
    changes, sentence = WRONG[case]
    good = cohort(4).manifest
    with pytest.raises(ManifestError, match=sentence):
        replace(good, **changes)


def test_nor_can_it_be_read() -> None:
    good = cohort(4).manifest
    made = object.__new__(Manifest)
    for name in good.__dataclass_fields__:
        object.__setattr__(made, name, getattr(good, name))
    object.__setattr__(made, "bound", 2**29)
    with pytest.raises(ManifestError, match="overflow"):
        read_manifest(made.to_bytes())


def test_every_field_is_in_the_hash() -> None:
    good = cohort(4).manifest
    other: dict[str, Any] = {
        **{"task": "x", "round": 8, "cohort": KEYS, "model": bytes(32), "layout": bytes(32), "length": 6},
        **{"degree": 2, "threshold": 1, "min_survivors": 3, "bits": 20, "bound": 9, "weight_cap": 2},
        "cipher": "chacha20",
    }
    small = replace(good, bound=10)
    found = {replace(small, **{name: value}).hash for name, value in other.items()} | {small.hash}
    assert len(found) == len(other) + 1
    assert set(other) | {"version"} == set(good.__dataclass_fields__)


def test_bytes_that_are_no_manifest_are_refused() -> None:
    good = cohort(4).manifest.to_bytes()
    assert read_manifest(good).to_bytes() == good
    for data in (b"", good[:-1], good + b"\0", b"x" + good[1:], HEAD + bytes(500)):
        with pytest.raises(MessageError):
            read_manifest(data)
    with pytest.raises(ManifestError, match="has no client 'nobody'"):
        read_manifest(good).place("nobody")
