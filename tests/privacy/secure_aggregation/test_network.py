"""A network that repeats, swaps, cuts and flips: never a wrong sum, and never an error without a type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.privacy.secure_aggregation import client, recovery, server
from fedllm.privacy.secure_aggregation.faults import MessageError, SecureSumError, SignatureError, StageError
from fedllm.privacy.secure_aggregation.manifest import read_manifest
from tests.privacy.secure_aggregation.network import STAGES, answer, cohort, conclude, deliver, encode, play, until

LATE = ("agree", "unmask")
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda message: b"",
    "cut by one": lambda message: message[:-1],
    "cut to its half": lambda message: message[: len(message) // 2],
    "too long by one": lambda message: message + b"\0",
    "oversized": lambda message: message + bytes(1 << 20),
    "first bit": lambda message: bytes([message[0] ^ 1]) + message[1:],
    "last bit": lambda message: message[:-1] + bytes([message[-1] ^ 1]),
    "another kind": lambda message: message[:4] + bytes([message[4] ^ 3]) + message[5:],
    "another round": lambda message: message[:9] + bytes([message[9] ^ 1]) + message[10:],
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_message_to_the_server_leaves_its_sender_out(stage: str, damage: str) -> None:
    group = cohort(6)

    def change(now: str, name: str, message: bytes) -> bytes:
        return DAMAGE[damage](message) if (now, name) == (stage, "client2") else message

    found = play(group, None, change)
    assert isinstance(group.refused["client2"], MessageError | SignatureError)
    assert ("client2" in found.survivors) == (stage in LATE)
    assert found.values.tolist() == group.expected(found.survivors)
    assert found.blamed == {}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_message_to_a_client_makes_it_a_dropout(stage: str, damage: str) -> None:
    group = cohort(6)
    state, to_clients = until(group, stage)
    for now in STAGES[STAGES.index(stage) :]:
        for name, message in to_clients.items():
            try:
                damaged = DAMAGE[damage](message) if (now, name) == (stage, "client2") else message
                deliver(state, now, answer(group, now, name, damaged))
            except SecureSumError as error:
                group.refused[name] = error
        to_clients = conclude(state, now)
    found = recovery.finish(state)
    if (stage, damage) != ("mask", "last bit"):  # of the last parcel alone: it costs one share
        assert "client2" in group.refused
    assert found.values.tolist() == group.expected(found.survivors)


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_flipped_bit_anywhere_never_makes_a_wrong_sum(data: st.DataObject) -> None:
    group = cohort(5, 3, 16)
    stage = data.draw(st.sampled_from(STAGES), "stage")
    to_server = data.draw(st.booleans(), "to the server")

    def flipped(message: bytes) -> bytes:
        place = data.draw(st.integers(0, 8 * len(message) - 1), "bit")
        return message[: place // 8] + bytes([message[place // 8] ^ 1 << place % 8]) + message[place // 8 + 1 :]

    state = server.begin(group.manifest)
    to_clients = {name: group.manifest.to_bytes() for name in group.identities}
    for now in STAGES:
        for name, message in to_clients.items():
            hit = (now, name) == (stage, "client3")
            try:
                sent = answer(group, now, name, flipped(message) if hit and not to_server else message)
                deliver(state, now, flipped(sent) if hit and to_server else sent)
            except SecureSumError as error:
                group.refused[name] = error
        to_clients = conclude(state, now)
    found = recovery.finish(state)
    assert found.values.tolist() == group.expected(found.survivors)
    assert set(group.refused) <= {"client3"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_message_that_comes_twice_counts_once(stage: str) -> None:
    group = cohort(5)
    state, to_clients = until(group, stage)
    for name, message in to_clients.items():
        sent = answer(group, stage, name, message)
        deliver(state, stage, sent)
        with pytest.raises(MessageError, match="came twice; the first counts"):
            deliver(state, stage, sent)
        if stage != "advertise":
            with pytest.raises(StageError, match="that comes once"):
                answer(group, stage, name, message)
    to_clients = conclude(state, stage)
    for now in STAGES[STAGES.index(stage) + 1 :]:
        for name, message in to_clients.items():
            deliver(state, now, answer(group, now, name, message))
        to_clients = conclude(state, now)
    found = recovery.finish(state)
    assert found.values.tolist() == group.expected(found.survivors)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_message_that_comes_late_is_left_out(stage: str) -> None:
    """Of client 2, in the stage after its own."""
    group = cohort(6)
    earlier = STAGES[STAGES.index(stage) - 1]
    state, to_clients = until(group, earlier)
    kept = b""
    for name, message in to_clients.items():
        sent = answer(group, earlier, name, message)
        if name == "client2":
            kept = sent
        else:
            deliver(state, earlier, sent)
    to_clients = conclude(state, earlier)
    with pytest.raises(StageError, match="it is left out"):
        deliver(state, earlier, kept)
    for now in STAGES[STAGES.index(stage) :]:
        for name, message in to_clients.items():
            try:
                deliver(state, now, answer(group, now, name, message))
            except SecureSumError as error:
                group.refused[name] = error
        to_clients = conclude(state, now)
    found = recovery.finish(state)
    assert found.values.tolist() == group.expected(found.survivors)


@pytest.mark.parametrize("asked", STAGES[1:])
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_request_out_of_turn_changes_nothing(stage: str, asked: str) -> None:
    """The client is asked for another stage first, and the round goes on as if it had not been."""
    if stage == asked:
        return
    group = cohort(4)
    state, to_clients = until(group, stage)
    own = group.states["client1"]
    before = (own.stage, own.seed, own.mask_secret)
    with pytest.raises(StageError, match=r"was asked for [A-Z]+ after [A-Z]+; that comes once"):
        answer(group, asked, "client1", to_clients["client1"])
    assert (own.stage, own.seed, own.mask_secret) == before
    for now in STAGES[STAGES.index(stage) :]:
        for name, message in to_clients.items():
            deliver(state, now, answer(group, now, name, message))
        to_clients = conclude(state, now)
    found = recovery.finish(state)
    assert found.values.tolist() == group.expected(found.survivors) and len(found.survivors) == 4


@pytest.mark.parametrize("stage", STAGES)
def test_the_server_ends_no_stage_twice_or_out_of_turn(stage: str) -> None:
    group = cohort(4)
    state, _ = until(group, stage)
    for other in STAGES[:-1]:
        if other != stage:
            with pytest.raises(StageError, match="asked to end the stage"):
                conclude(state, other)
    if stage != "unmask":
        with pytest.raises(StageError, match="asked for the sum while it collects"):
            recovery.finish(state)


def test_the_sum_is_given_once() -> None:
    group = cohort(4)
    state, to_clients = until(group, "unmask")
    for name, message in to_clients.items():
        deliver(state, "unmask", answer(group, "unmask", name, message))
    assert recovery.finish(state).values.tolist() == group.expected(tuple(group.identities))
    with pytest.raises(StageError, match="while it collects FINISHED"):
        recovery.finish(state)


def test_messages_of_another_round_are_refused() -> None:
    """The same clients and keys in the next round."""
    group = cohort(4)
    old, _ = until(group, "mask")
    later = cohort(4, round=8)
    for stage in ("advertise", "share"):
        state, _ = until(later, stage)
        with pytest.raises(MessageError, match="is not of round 8"):
            deliver(state, stage, answer_of(group, stage))
    with pytest.raises(MessageError, match="is not of round 7"):
        client.mask(group.states["client0"], until(later, "mask")[1]["client0"], encode(group, "client0"))
    assert old.stage == server.Stage.MASKED


def answer_of(group: object, stage: str) -> bytes:
    """What client 0 of a fresh cohort sends in round 7."""
    other = cohort(4)
    _, to_clients = until(other, stage)
    return answer(other, stage, "client0", to_clients["client0"])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_manifest_of_any_bytes_is_read_as_it_was_or_refused(data: st.DataObject) -> None:
    whole = cohort(3).manifest.to_bytes()
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    damaged = whole[:start] + data.draw(st.binary(max_size=20)) + whole[end:]
    try:
        assert read_manifest(damaged).to_bytes() == damaged
    except SecureSumError:
        return


@pytest.mark.parametrize("read", ["advertisement", "shares", "masked", "consent", "unmasking"])
@settings(max_examples=50, deadline=None)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_by_type(read: str, data: bytes) -> None:
    group = cohort(3)
    stage = dict(zip(("advertisement", "shares", "masked", "consent", "unmasking"), STAGES, strict=True))[read]
    state = server.begin(group.manifest)
    state.stage = server.Stage(STAGES.index(stage) + 1)
    with pytest.raises(SecureSumError):
        deliver(state, stage, data)
    with pytest.raises(SecureSumError):
        deliver(state, stage, b"fss\x01" + bytes([STAGES.index(stage) + 1]) + group.manifest.hash + data)
