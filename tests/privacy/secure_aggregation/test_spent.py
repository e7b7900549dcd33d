"""A round is masked once, whatever crashes in between."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedllm.errors import RunError
from fedllm.privacy.secure_aggregation import client, spent
from fedllm.privacy.secure_aggregation.faults import RoundSpentError
from fedllm.privacy.secure_aggregation.spent import SpentInMemory, SpentOnDisk
from tests.privacy.secure_aggregation.network import Cohort, answer, cohort, encode, until


class Crash(BaseException):
    """The process ends here."""


def on_disk(group: Cohort, folder: Path) -> Cohort:
    """Client 0 keeps its marker in a folder."""
    group.policies["client0"] = replace(group.policies["client0"], spent=SpentOnDisk(folder))
    return group


@pytest.mark.parametrize("make", [SpentOnDisk, lambda folder: SpentInMemory()])
def test_rounds_grow_within_a_task(make: Callable[[Path], Any], tmp_path: Path) -> None:
    marker = make(tmp_path / "spent")
    marker.check("train", 0)
    marker.spend("train", 3)
    for round in (0, 3):
        for act in (marker.check, marker.spend):
            with pytest.raises(RoundSpentError, match=f"round {round} of 'train' is not after round 3"):
                act("train", round)
    marker.spend("evaluate", 3)
    marker.spend("train", 10)
    marker.check("train", 11)
    with pytest.raises(RoundSpentError):
        marker.check("train", 9)


def test_the_marker_outlives_its_object_and_names_no_path(tmp_path: Path) -> None:
    SpentOnDisk(tmp_path).spend("../../up", 5)
    with pytest.raises(RoundSpentError):
        SpentOnDisk(tmp_path).spend("../../up", 5)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["5"]


def test_two_processes_do_not_both_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have looked before either has marked."""
    SpentOnDisk(tmp_path).spend("train", 5)
    monkeypatch.setattr(SpentOnDisk, "check", lambda *given: None)
    with pytest.raises(RoundSpentError, match="by another process of this client"):
        SpentOnDisk(tmp_path).spend("train", 5)


def test_a_marker_that_cannot_be_written_stops_the_mask(tmp_path: Path) -> None:
    (tmp_path / "spent").write_text("a file, where the folder would be")
    group = on_disk(cohort(3), tmp_path / "spent")
    _, inboxes = until(group, "mask")
    with pytest.raises(RunError, match="could not be written"):
        answer(group, "mask", "client0", inboxes["client0"])


def crash_at(count: int, calls: tuple[tuple[Any, str], ...], patch: pytest.MonkeyPatch) -> None:
    """End the process at the count-th of some calls, before it does anything."""
    left = [count]

    def dying(honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not left[0]:
                raise Crash
            left[0] -= 1
            return honest(*args, **kwargs)

        return call

    for owner, name in calls:
        patch.setattr(owner, name, dying(getattr(owner, name)))


CALLS = (
    *((os, name) for name in ("mkdir", "open", "close", "fsync", "unlink")),
    *((client, name) for name in ("apply_masks", "apply_to_check", "to_wire")),
    (client.messages, "frame"),
)


def test_no_crash_point_lets_a_client_mask_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every call of the file system and of the masks: what left before the crash, and after a restart, is one vector
    at most; after the last point the vector left, and the restart is refused."""
    ended = False
    for count in range(40):
        folder = tmp_path / str(count)
        first, again = on_disk(cohort(3), folder), None
        _, inboxes = until(first, "mask")
        vector = encode(first, "client0")
        left = []
        with monkeypatch.context() as patch:
            crash_at(count, CALLS, patch)
            try:
                left.append(client.mask(first.states["client0"], inboxes["client0"], vector))
                ended = True
            except Crash:
                pass
        again = Cohort(first.identities, first.manifest, first.policies, first.vectors)
        again.policies = {
            name: own if name == "client0" else replace(own, spent=SpentInMemory())
            for name, own in first.policies.items()
        }
        try:
            _, inboxes = until(again, "mask")
            left.append(answer(again, "mask", "client0", inboxes["client0"]))
        except RoundSpentError:
            pass
        assert len(left) <= 1
        if ended:
            break
    assert ended and count >= 8


def test_without_the_marker_the_restart_masks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The negative control: two different masked vectors of one round, whose masks the server may come to know."""
    monkeypatch.setattr(SpentOnDisk, "spend", lambda *given: None)
    group = on_disk(cohort(3), tmp_path)
    _, inboxes = until(group, "mask")
    first = answer(group, "mask", "client0", inboxes["client0"])
    again = Cohort(group.identities, group.manifest, group.policies, group.vectors)
    again.policies = {name: replace(own, spent=SpentInMemory()) for name, own in group.policies.items()}
    _, inboxes = until(again, "mask")
    assert answer(again, "mask", "client0", inboxes["client0"]) != first


def test_the_mark_is_on_the_disk_before_anything_is_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    honest = spent._sync
    monkeypatch.setattr(spent, "_sync", lambda path: (seen.append(path.name), honest(path))[1])
    group = on_disk(cohort(3), tmp_path)
    _, inboxes = until(group, "mask")
    masks = client.apply_masks
    monkeypatch.setattr(client, "apply_masks", lambda *given: (seen.append("masks"), masks(*given))[1])
    client.mask(group.states["client0"], inboxes["client0"], encode(group, "client0"))
    assert seen[0] == "7" and seen[-1] == "masks" and len(seen) == 4
