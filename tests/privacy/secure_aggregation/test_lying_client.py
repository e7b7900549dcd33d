"""Clients that lie: the wrong is found, laid at the right door, and the sum is exact or there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fedllm.privacy.secure_aggregation import client, messages, recovery, server
from fedllm.privacy.secure_aggregation.faults import (
    IdentityError,
    ManifestError,
    MessageError,
    SecureSumError,
    SignatureError,
    TooFewError,
    VectorError,
)
from fedllm.privacy.secure_aggregation.messages import FRONT, PLACE, Kind
from fedllm.privacy.secure_aggregation.primitives import random_bytes
from fedllm.privacy.secure_aggregation.shamir import PRIME
from tests.privacy.secure_aggregation.network import Cohort, answer, cohort, deliver, play, until

LIAR = "client2"


def body_of(message: bytes) -> bytes:
    return message[FRONT + PLACE : -64]


def signed_again(group: Cohort, name: str, message: bytes, body: bytes) -> bytes:
    """A message with another body, under its sender's own signature."""
    return messages.frame(
        *(Kind(message[4]), group.manifest, group.manifest.place(name), (body,), group.identities[name])
    )


def lying(group: Cohort, stage: str, change: Callable[[bytes], bytes]) -> Callable[[str, str, bytes], bytes]:
    """The liar changes the body of its message of a stage, and signs it."""

    def meddle(now: str, name: str, message: bytes) -> bytes:
        if (now, name) != (stage, LIAR):
            return message
        return signed_again(group, name, message, change(body_of(message)))

    return meddle


def flip(place: int) -> Callable[[bytes], bytes]:
    def change(body: bytes) -> bytes:
        found = bytearray(body)
        found[place] ^= 1
        return bytes(found)

    return change


def test_a_wrong_share_is_laid_at_its_holders_door(monkeypatch: pytest.MonkeyPatch) -> None:
    group = cohort(7, threshold=4)
    found = play(group, {"client5": "mask"}, lying(group, "unmask", flip(10)))
    assert found.values.tolist() == group.expected(found.survivors)
    assert found.blamed == {LIAR: "gave out a share of client 'client0' that it was not dealt"}
    # Without the hashes of the shares the dealer, who is honest, is blamed.
    monkeypatch.setattr(server, "share_hash", lambda *given: b"")
    monkeypatch.setattr(server, "_dealt", lambda *given: b"")
    group = cohort(7, threshold=4)
    assert play(group, {"client5": "mask"}, lying(group, "unmask", flip(10))).blamed == {
        "client0": "dealt shares that do not belong together"
    }


def test_a_share_of_the_other_secret_is_laid_at_its_holders_door() -> None:
    group = cohort(7, threshold=4)

    def other_kind(body: bytes) -> bytes:
        return body[:4] + bytes([3 - body[4]]) + body[5:]

    found = play(group, None, lying(group, "unmask", other_kind))
    assert list(found.blamed) == [LIAR]
    assert found.values.tolist() == group.expected(found.survivors)


def test_a_share_for_the_wrong_owner_is_laid_at_its_holders_door() -> None:
    group = cohort(7, threshold=4)

    def swapped(body: bytes) -> bytes:
        first, second = body[4:38], body[40:74]
        return body[:4] + second + body[38:40] + first + body[74:]

    found = play(group, None, lying(group, "unmask", swapped))
    assert list(found.blamed) == [LIAR]
    assert found.values.tolist() == group.expected(found.survivors)


@pytest.mark.parametrize(("wrong", "recovered"), [(1, True), (2, True), (6, False)])
def test_wrong_shares_are_laid_at_their_dealers_door(
    wrong: int, recovered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 2 deals shares, with the right hashes, that are not of its secret."""
    group = cohort(7, threshold=4)
    honest = client.split

    def deal(secret: bytes, holders: list[int], threshold: int) -> list[bytes]:
        shares = honest(secret, holders, threshold)
        if 3 not in holders:  # its own number: the liar's own split
            for i in range(wrong):
                shares[i] = ((int.from_bytes(shares[i], "big") + 1 + i) % PRIME).to_bytes(33, "big")
        return shares

    monkeypatch.setattr(client, "split", deal)
    if recovered:
        found = play(group)
        assert found.blamed == {LIAR: "dealt shares that do not belong together"}
        assert found.values.tolist() == group.expected(found.survivors)
    else:
        with pytest.raises(TooFewError, match="the shares that client 'client2' dealt do not give its secret"):
            play(group)


def test_a_parcel_that_does_not_open_costs_one_share() -> None:
    """Client 2 spoils what it sends client 0: client 0 goes on, and gives out no share of client 2."""
    group = cohort(7, threshold=4)
    found = play(group, None, lying(group, "share", flip(32 + 2 + 2 + 64 + 20)))
    assert group.states["client0"].stage == client.Stage.DONE
    assert found.blamed == {} and found.values.tolist() == group.expected(found.survivors)


@pytest.mark.parametrize(
    ("stage", "change", "error", "sentence"),
    [
        ("advertise", lambda body: body[:-1], MessageError, "ends after"),
        ("share", lambda body: body[:32] + bytes(2), MessageError, "not one for each of its neighbours"),
        ("share", lambda body: bytes(32) + body[32:], MessageError, "for another bundle"),
        ("mask", lambda body: body[:-4], MessageError, "a masked vector has 12 bytes"),
        ("mask", lambda body: body + bytes(4), MessageError, "belong to it"),
        ("agree", lambda body: bytes(32), MessageError, "signed another list of survivors"),
        ("unmask", lambda body: body[:-1], MessageError, "ends after"),
        ("unmask", lambda body: body[:2] + body[38:40] + body[4:], MessageError, "names client 1 after client 1"),
    ],
)
def test_a_malformed_message_leaves_its_sender_out(
    stage: str, change: Callable[[bytes], bytes], error: type[SecureSumError], sentence: str
) -> None:
    group = cohort(8, threshold=4)
    found = play(group, None, lying(group, stage, change))
    assert isinstance(group.refused[LIAR], error)
    assert sentence in str(group.refused[LIAR])
    assert (LIAR in found.survivors) == (stage in ("agree", "unmask"))
    assert found.values.tolist() == group.expected(found.survivors)


def test_a_key_of_another_client_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the mask key of client 0, client 2 would share with each peer what client 0 shares with it."""

    def copied(group: Cohort) -> Callable[[str, str, bytes], bytes]:
        seen: dict[str, bytes] = {}

        def meddle(stage: str, name: str, message: bytes) -> bytes:
            if stage == "advertise":
                seen[name] = body_of(message)
                if name == LIAR:
                    return signed_again(
                        group, name, message, seen[LIAR][:32] + seen["client0"][32:64] + seen[LIAR][64:]
                    )
            return message

        return meddle

    group = cohort(7, threshold=4)
    found = play(group, None, copied(group))
    assert isinstance(group.refused[LIAR], IdentityError) and LIAR not in found.survivors
    monkeypatch.setattr(server, "check_distinct", lambda keys: None)
    group = cohort(7, threshold=4)
    with pytest.raises(TooFewError):  # the server lets it pass: every client refuses on its own
        play(group, None, copied(group))
    assert all("sent the same key" in str(error) for name, error in group.refused.items() if name != LIAR)
    monkeypatch.setattr(client, "check_distinct", lambda keys: None)
    group = cohort(7, threshold=4)
    play(group, {LIAR: "share"}, copied(group))
    assert set(group.refused) == set()


def test_a_message_in_anothers_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 sends keys as client 0."""
    for checked in (True, False):
        group = cohort(4)
        state = server.begin(group.manifest)
        own = answer(group, "advertise", LIAR, group.manifest.to_bytes())
        forged = messages.frame(Kind.ADVERTISEMENT, group.manifest, 0, (body_of(own),), group.identities[LIAR])
        if checked:
            with pytest.raises(SignatureError, match="of client 'client0' does not verify"):
                server.add_advertisement(state, forged)
            monkeypatch.setattr(messages, "verify", lambda *given: None)
        else:
            assert server.add_advertisement(state, forged) == "client0"


def test_a_vector_that_is_not_masked_as_agreed_leaves_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 makes masks with its peers that they do not make with it."""
    honest = client.mask_key

    def other(*given: Any) -> bytes:
        return random_bytes(len(honest(*given)))

    def once(stage: str, name: str, message: bytes) -> bytes:  # after client 1 it is the turn of client 2
        monkeypatch.setattr(client, "mask_key", other if (stage, name) == ("mask", "client1") else honest)
        return message

    with pytest.raises(VectorError, match="still has masks in it"):
        play(cohort(5), None, once)
    monkeypatch.setattr(recovery, "check_sum", lambda state: None)
    group = cohort(5)
    found = play(group, None, once)
    assert found.values.tolist() != group.expected(found.survivors)


def test_a_sum_beyond_what_clients_can_reach_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    group = cohort(5, bound=100)
    group.vectors[LIAR] = np.full(5, 10_000)
    with pytest.raises(TooFewError):  # an honest client's own check stops it: all five are needed here
        play(cohort_with(group), {name: "mask" for name in ("client0", "client1")})
    assert isinstance(play_refused(group), VectorError)
    monkeypatch.setattr(client, "check_vector", lambda *given: None)
    with pytest.raises(VectorError, match=r"entry of magnitude \d+; 5 clients can reach 500"):
        play(cohort_with(group))
    monkeypatch.setattr(recovery, "largest", lambda *given: 0)
    found = play(cohort_with(group))
    assert found.values.tolist() == group.expected(found.survivors)


def cohort_with(group: Cohort) -> Cohort:
    """The same clients and vectors, before anything was sent."""
    fresh = cohort(len(group.identities), bound=group.manifest.bound)
    fresh.vectors = group.vectors
    return fresh


def play_refused(group: Cohort) -> SecureSumError:
    play(group)
    return group.refused[LIAR]


def test_a_weight_above_the_bound_has_no_manifest() -> None:
    with pytest.raises(ManifestError, match="a weight of 101 does not fit under the bound 100"):
        replace(cohort(3, bound=100).manifest, weight_cap=101)


BODIES = {
    "share": (Kind.SHARES, 2),
    "mask": (Kind.MASKED, 36),
    "agree": (Kind.CONSENT, 32),
    "unmask": (Kind.UNMASKING, 2),
}


@pytest.mark.parametrize("stage", BODIES)
def test_what_a_client_sends_that_missed_the_stage_before_is_refused(stage: str) -> None:
    group = cohort(8)
    liar = group.identities.pop(LIAR)
    state, _ = until(group, stage)
    kind, size = BODIES[stage]
    body = state.bundle + bytes(2) if stage == "share" else bytes(size)
    late = messages.frame(kind, group.manifest, 2, (body,), liar)
    with pytest.raises(MessageError):
        deliver(state, stage, late)


def test_a_client_that_is_not_of_the_cohort_is_refused() -> None:
    group = cohort(4)
    stranger = messages.frame(Kind.ADVERTISEMENT, group.manifest, 4, (bytes(96),), group.identities[LIAR])
    with pytest.raises(MessageError, match="from client 4 of a cohort of 4"):
        server.add_advertisement(server.begin(group.manifest), stranger)


def test_until_is_what_play_does() -> None:
    state, to_clients = until(cohort(4), "unmask")
    assert sorted(to_clients) == [f"client{i}" for i in range(4)] and state.stage == server.Stage.UNMASKINGS
