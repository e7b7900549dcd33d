"""A server that lies. Each attack is refused, and succeeds against clients without the one check that refuses it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pytest

from fedllm.privacy.secure_aggregation import client, messages, pairs, policy, primitives, recovery, server
from fedllm.privacy.secure_aggregation.client import ClientState
from fedllm.privacy.secure_aggregation.faults import (
    IdentityError,
    ManifestError,
    MessageError,
    RoundSpentError,
    SecureSumError,
    SignatureError,
    StageError,
    SurvivorsError,
    TooFewError,
    VectorError,
)
from fedllm.privacy.secure_aggregation.identity import new_identity
from fedllm.privacy.secure_aggregation.manifest import Manifest, read_manifest
from fedllm.privacy.secure_aggregation.masks import Mask, apply_masks
from fedllm.privacy.secure_aggregation.messages import FRONT, PLACE, Advertisement, Kind, Parcel, Secret
from fedllm.privacy.secure_aggregation.rings import signed
from fedllm.privacy.secure_aggregation.server import ServerState
from fedllm.privacy.secure_aggregation.shamir import combine
from fedllm.privacy.secure_aggregation.spent import SpentInMemory
from tests.privacy.secure_aggregation.network import Cohort, answer, cohort, conclude, deliver, encode, play, until

VICTIM = 0


def advertise(group: Cohort, manifest: Manifest | None = None, name: str = "client0") -> ClientState:
    """What a client does with a manifest."""
    data = (manifest or group.manifest).to_bytes()
    return client.advertise(data, group.identities[name], group.policies[name], group.content)[1]


# A manifest that breaks the client's own conditions: (what the server changes, error, sentence, the policy without it)
MANIFESTS: dict[str, tuple[dict[str, Any], type[SecureSumError], str, dict[str, Any]]] = {
    "few survivors": (
        {"min_survivors": 2},
        ManifestError,
        "a sum of 2 clients; this client asks for 4",
        {"min_survivors": 2},
    ),
    "low threshold": ({"threshold": 4}, ManifestError, "threshold 4 with 5 neighbours, of whom 3", {"corrupt": 0.0}),
    "other cipher": ({"cipher": "chacha20"}, ManifestError, "makes masks by chacha20", {"ciphers": {"chacha20"}}),
    "old round": ({"round": 6}, RoundSpentError, "round 6 of 'run/train' is not after round 6", {"spent": None}),
}


@pytest.mark.parametrize("attack", MANIFESTS)
def test_a_manifest_that_breaks_the_policy_is_refused(attack: str) -> None:
    changes, error, sentence, without = MANIFESTS[attack]
    group = cohort(6, threshold=5, min_survivors=4)
    spent = SpentInMemory({"run/train": 6})
    strict = replace(
        *(group.policies["client0"],),
        **{"min_survivors": 4, "corrupt": 0.4, "ciphers": frozenset({"aes-128-ctr"}), "spent": spent},
    )
    group.policies["client0"] = strict
    advertise(group)
    with pytest.raises(error, match=sentence):
        advertise(group, replace(group.manifest, **changes))
    lax = {name: SpentInMemory() if value is None else value for name, value in without.items()}
    group.policies["client0"] = replace(strict, **lax)
    advertise(group, replace(group.manifest, **changes))


@pytest.mark.parametrize(
    "setting", [{"min_cohort": 1}, {"min_survivors": 1}, {"corrupt": 1.0}, {"ciphers": frozenset({"rot13"})}], ids=str
)
def test_a_policy_that_protects_nothing_cannot_be_made(setting: dict[str, Any]) -> None:
    with pytest.raises(ManifestError, match=f"policy cannot be right: {next(iter(setting))}"):
        policy.Policy({}, **setting)


def test_a_shrunk_cohort_is_refused() -> None:
    group = cohort(3)
    group.policies["client0"] = replace(group.policies["client0"], min_cohort=4)
    with pytest.raises(ManifestError, match="has 3 clients; this client sums with at least 4"):
        advertise(group)
    group.policies["client0"] = replace(group.policies["client0"], min_cohort=3)
    advertise(group)


def test_a_cohort_that_shrinks_before_the_keys_is_refused() -> None:
    for least, refused in ((7, True), (6, False)):
        group = cohort(8)
        group.policies["client0"] = replace(group.policies["client0"], min_cohort=least)
        play(group, {"client4": "advertise", "client5": "advertise"})
        assert ("client0" in group.refused) == refused
        if refused:
            assert "6 clients sent keys; client 'client0' sums with at least 7" in str(group.refused["client0"])


@pytest.mark.parametrize("field", ["model", "layout", "length"])
def test_a_manifest_about_something_else_is_refused(field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = cohort(4)
    other = replace(group.manifest, **{field: 6 if field == "length" else bytes(32)})
    with pytest.raises(ManifestError):
        advertise(group, other)
    monkeypatch.setattr(client, "check_manifest", lambda *given: None)
    advertise(group, other)


@pytest.mark.parametrize("kind", ["unpinned", "swapped"])
def test_a_key_that_is_not_pinned_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = cohort(4)
    stranger = ("stranger" if kind == "unpinned" else "client1", new_identity("x").public)
    other = replace(group.manifest, cohort=(group.manifest.cohort[0], stranger, *group.manifest.cohort[2:]))
    with pytest.raises(IdentityError, match="not pinned" if kind == "unpinned" else "another key of the client"):
        advertise(group, other)
    monkeypatch.setattr(policy, "check_peers", lambda *given: None)
    advertise(group, other)


def bundle_of(group: Cohort, frames: dict[int, bytes]) -> bytes:
    return messages.sheet(Kind.BUNDLE, group.manifest, messages.join(list(frames), list(frames.values())))


def frames_of(group: Cohort) -> dict[int, bytes]:
    """What each client advertises."""
    sent = {name: answer(group, "advertise", name, group.manifest.to_bytes()) for name in group.identities}
    return {group.manifest.place(name): frame for name, frame in sent.items()}


def man_in_the_middle(group: Cohort) -> list[int]:
    """The server puts its own keys in the place of the victim's peers, opens its shares and takes off its masks."""
    manifest, frames = group.manifest, frames_of(group)
    forger, secrets = new_identity("server"), {}
    for place in range(1, len(group.identities)):
        (channel_secret, channel), (mask_secret, mask) = primitives.exchange_pair(), primitives.exchange_pair()
        secrets[place] = channel_secret, mask_secret
        own = Advertisement(channel, mask, primitives.random_bytes())
        frames[place] = messages.frame(Kind.ADVERTISEMENT, manifest, place, (own.to_bytes(),), forger)
    state, bundle = group.states["client0"], bundle_of(group, frames)
    sent = memoryview(client.share(state, bundle))[FRONT + PLACE : -64]
    found = messages.part(sent[32:], Parcel.size, len(manifest.cohort), "the shares")
    told, hash = manifest.hash + state.bundle, state.bundle
    inbox, shares = {}, {}
    for place, data in found.items():
        shared = primitives.exchange(secrets[place][0], state.keys[VICTIM].channel)
        opened = pairs.open_shares(
            *(pairs.channel_key(manifest, hash, VICTIM, place, shared), VICTIM, place, Parcel.read(data), told)
        )
        assert opened is not None
        shares[place + 1] = opened[1]
        key = pairs.channel_key(manifest, hash, place, VICTIM, shared)
        inbox[place] = pairs.seal_shares(key, place, VICTIM, bytes(33), bytes(33), told).to_bytes()
    body = messages.join(list(inbox), list(inbox.values()))
    masked = client.mask(state, messages.sheet(Kind.INBOX, manifest, body), encode(group, "client0"))
    seed = combine(dict(list(shares.items())[: manifest.threshold]))
    assert seed is not None
    public = state.keys[VICTIM].mask
    masks = [Mask(pairs.mask_of_seed(manifest, hash, VICTIM, seed), add=False)]
    masks += [
        Mask(pairs.mask_of_pair(manifest, hash, (place, pair[1]), (VICTIM, public))) for place, pair in secrets.items()
    ]
    return open_vector(group, masked, masks)


def open_vector(group: Cohort, frame: bytes, masks: Sequence[Mask]) -> list[int]:
    """What is left of a masked vector when masks are taken off."""
    size = 4 * group.manifest.length
    vector = np.frombuffer(frame[FRONT + PLACE :][:size], "<u4").copy()
    apply_masks(vector, masks, group.manifest.cipher)
    return [int(value) for value in signed(vector, 32)]


def test_swapped_keys_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SignatureError, match="ADVERTISEMENT of client 'client1' does not verify"):
        man_in_the_middle(cohort(4))
    monkeypatch.setattr(messages, "verify", lambda *given: None)
    group = cohort(4)
    assert man_in_the_middle(group) == list(group.vectors["client0"])


Attack = Callable[[Cohort, dict[int, bytes]], dict[int, bytes]]
BUNDLES: dict[str, tuple[Attack, type[SecureSumError], str]] = {
    "own keys missing": (lambda group, frames: {i: f for i, f in frames.items() if i}, IdentityError, "does not have"),
    "own keys of an earlier try": (
        lambda group, frames: {**frames, 0: answer(cohort_again(group), "advertise", "client0", manifest_of(group))},
        IdentityError,
        "does not have",
    ),
    "another's in its place": (
        lambda group, frames: {**frames, 1: frames[2]},
        MessageError,
        "of client 2 in the place",
    ),
    "few": (lambda group, frames: {i: frames[i] for i in (0, 1)}, TooFewError, "1 neighbours of 'client0' sent keys"),
}


def cohort_again(group: Cohort) -> Cohort:
    return Cohort(group.identities, group.manifest, group.policies, group.vectors)


def manifest_of(group: Cohort) -> bytes:
    return group.manifest.to_bytes()


@pytest.mark.parametrize("attack", BUNDLES)
def test_a_false_bundle_is_refused(attack: str) -> None:
    change, error, sentence = BUNDLES[attack]
    group = cohort(5, threshold=3)
    with pytest.raises(error, match=sentence):
        false = bundle_of(group, change(group, frames_of(group)))
        client.share(group.states["client0"], false)
    frames = frames_of(group)
    client.share(group.states["client0"], bundle_of(group, frames))


def test_two_bundles_leave_noise() -> None:
    """The server leaves client 4 out of what client 0 sees: keys of the two bundles differ, so nothing cancels."""
    group = cohort(6, threshold=3)
    frames = frames_of(group)
    state = server.begin(group.manifest)
    for frame in frames.values():
        server.add_advertisement(state, frame)
    whole = server.bundle(state)
    partial = bundle_of(group, {place: frame for place, frame in frames.items() if place != 4})
    for name in group.identities:
        message = client.share(group.states[name], partial if name == "client0" else whole)
        if name == "client0":
            with pytest.raises(MessageError, match="are for another bundle"):
                server.add_shares(state, message)
        else:
            server.add_shares(state, message)
    inboxes = server.inboxes(state)
    assert "client0" not in inboxes
    told = client.mask(group.states["client1"], inboxes["client1"], encode(group, "client1"))
    server.add_masked(state, told)


def split_lists(group: Cohort) -> list[int]:
    """Each client is shown itself and the victim as the only survivors: the victim's seed comes from all, and every
    other's mask secret from all but two."""
    state, inboxes = until(group, "mask")
    masked = {name: answer(group, "mask", name, message) for name, message in inboxes.items()}
    manifest, clients = group.manifest, range(len(group.identities))
    lists = {own: [VICTIM, own] if own else [VICTIM, 1] for own in clients}
    signed_lists = {
        own: client.agree(group.states[f"client{own}"], survivors_sheet(manifest, lists[own])) for own in clients
    }
    shares: dict[tuple[int, int], dict[int, bytes]] = {}
    for own in clients:
        body = messages.join([p for p in clients if p != own], [signed_lists[p] for p in clients if p != own])
        sent = client.unmask(group.states[f"client{own}"], messages.sheet(Kind.CONSENTS, manifest, body))
        for owner, item in messages.part(sent[FRONT + PLACE : -64], 34, len(clients), "the shares").items():
            shares.setdefault((owner, item[0]), {})[own + 1] = item[1:]
    return victims_vector(group, state, masked["client0"], shares)


def survivors_sheet(manifest: Manifest, places: Sequence[int]) -> bytes:
    return messages.sheet(Kind.SURVIVORS, manifest, messages.join(list(places), [b""] * len(places)))


def victims_vector(
    group: Cohort, state: ServerState, frame: bytes, shares: dict[tuple[int, int], dict[int, bytes]]
) -> list[int]:
    """The victim's vector from shares of its seed, and of its own or all others' mask secrets."""
    manifest, t = group.manifest, group.manifest.threshold

    def secret(owner: int, kind: Secret) -> bytes:
        found = combine(dict(list(shares[owner, kind].items())[:t]))
        assert found is not None
        return found

    masks = [Mask(pairs.mask_of_seed(manifest, state.bundle, VICTIM, secret(VICTIM, Secret.SEED)), add=False)]
    for other in range(1, len(group.identities)):
        if len(shares.get((VICTIM, Secret.MASK), {})) >= t:
            own, peer = (VICTIM, secret(VICTIM, Secret.MASK)), (other, state.keys[other].mask)
        else:
            own, peer = (other, secret(other, Secret.MASK)), (VICTIM, state.keys[VICTIM].mask)
        masks.append(Mask(pairs.mask_of_pair(manifest, state.bundle, own, peer)))  # the victim subtracted it
    return open_vector(group, frame, masks)


def test_split_lists_of_survivors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SurvivorsError, match=r"signed the list of survivors that it was shown; the threshold is 5"):
        split_lists(cohort(9, threshold=5))
    monkeypatch.setattr(client, "_consenting", lambda state, consents: set(state.peers))
    group = cohort(9, threshold=5)
    assert split_lists(group) == list(group.vectors["client0"])


def both_secrets(group: Cohort, again: Callable[[ClientState], None]) -> list[int]:
    """The server asks every client twice: with the victim among the survivors, and without."""
    state, inboxes = until(group, "mask")
    masked = {name: answer(group, "mask", name, message) for name, message in inboxes.items()}
    manifest, clients = group.manifest, range(len(group.identities))
    shares: dict[tuple[int, int], dict[int, bytes]] = {}
    for listed in (list(clients), [place for place in clients if place != VICTIM]):
        asked = [place for place in listed if place != VICTIM]
        consents = {
            place: client.agree(group.states[f"client{place}"], survivors_sheet(manifest, listed)) for place in asked
        }
        body = messages.join(list(consents), list(consents.values()))
        for own in asked:
            sent = client.unmask(group.states[f"client{own}"], messages.sheet(Kind.CONSENTS, manifest, body))
            for owner, item in messages.part(sent[FRONT + PLACE : -64], 34, len(clients), "the shares").items():
                shares.setdefault((owner, item[0]), {})[own + 1] = item[1:]
            again(group.states[f"client{own}"])
    return victims_vector(group, state, masked["client0"], shares)


def test_both_kinds_of_share_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="was asked for AGREED after DONE"):
        both_secrets(cohort(6, threshold=4), lambda state: None)

    def reopen(state: ClientState) -> None:
        state.stage = client.Stage.MASKED

    monkeypatch.setattr(ClientState, "erase", lambda state: None)
    group = cohort(6, threshold=4)
    assert both_secrets(group, reopen) == list(group.vectors["client0"])


LISTS: dict[str, tuple[list[int], str]] = {
    "below the minimum": ([0, 1, 2], "has 3 clients; a sum must be of at least 4"),
    "without this client": ([1, 2, 3, 4], "does not have this client"),
    "with one that sent no keys": ([0, 1, 2, 3, 5], "has a client that sent no keys"),
    "with one whose shares never came": ([0, 1, 2, 3, 6], "has a neighbour whose shares never came"),
}


@pytest.mark.parametrize("attack", LISTS)
def test_a_false_list_of_survivors_is_refused(attack: str) -> None:
    places, sentence = LISTS[attack]
    group = cohort(7, threshold=4, min_survivors=4)
    state = server.begin(group.manifest)
    for name in group.identities:
        if name != "client5":
            deliver(state, "advertise", answer(group, "advertise", name, group.manifest.to_bytes()))
    bundle = server.bundle(state)
    for name in group.identities:
        if name not in ("client5", "client6"):
            deliver(state, "share", answer(group, "share", name, bundle))
    inboxes = server.inboxes(state)
    answer(group, "mask", "client0", inboxes["client0"])
    answer(group, "mask", "client1", inboxes["client1"])
    with pytest.raises(SurvivorsError, match=sentence):
        client.agree(group.states["client0"], survivors_sheet(group.manifest, places))
    client.agree(group.states["client1"], survivors_sheet(group.manifest, [0, 1, 2, 3]))


@pytest.mark.parametrize("least", [2, 4])
def test_min_survivors_is_what_stops_a_list_of_three(least: int) -> None:
    group = cohort(6, threshold=3, min_survivors=least)
    _, inboxes = until(group, "mask")
    answer(group, "mask", "client0", inboxes["client0"])
    listed = survivors_sheet(group.manifest, [0, 1, 2])
    if least > 3:
        with pytest.raises(SurvivorsError, match="has 3 clients"):
            client.agree(group.states["client0"], listed)
    else:
        client.agree(group.states["client0"], listed)


def test_forged_consents_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forger = new_identity("server")
    for checked in (True, False):
        group = cohort(5, threshold=3)
        _, lists = until(group, "agree")
        client.agree(group.states["client0"], lists["client0"])
        hash = messages.survivors_hash(group.manifest, range(5))
        forged = [messages.frame(Kind.CONSENT, group.manifest, place, (hash,), forger) for place in range(1, 5)]
        sheet = messages.sheet(Kind.CONSENTS, group.manifest, messages.join(range(1, 5), forged))
        if checked:
            with pytest.raises(SignatureError, match="CONSENT of client 'client1' does not verify"):
                client.unmask(group.states["client0"], sheet)
            monkeypatch.setattr(messages, "verify", lambda *given: None)
        else:
            client.unmask(group.states["client0"], sheet)


def test_one_consent_does_not_count_for_many() -> None:
    group = cohort(5, threshold=3)
    _, lists = until(group, "agree")
    sent = {name: client.agree(group.states[name], message) for name, message in lists.items()}
    repeated = messages.join(range(1, 5), [sent["client1"]] * 4)
    with pytest.raises(MessageError, match="that of client 1 in the place of client 2"):
        client.unmask(group.states["client0"], messages.sheet(Kind.CONSENTS, group.manifest, repeated))
    own = messages.join([0, 1, 2], [sent["client0"], sent["client1"], sent["client2"]])
    with pytest.raises(SurvivorsError, match="2 neighbours of client 'client3'"):
        few = messages.join([0, 1], [sent["client0"], sent["client1"]])
        client.unmask(group.states["client3"], messages.sheet(Kind.CONSENTS, group.manifest, few))
    with pytest.raises(SurvivorsError, match="2 neighbours of client 'client1'"):
        client.unmask(group.states["client1"], messages.sheet(Kind.CONSENTS, group.manifest, own))  # its own is none


def test_a_second_vector_of_a_round_is_refused() -> None:
    """Of a state that has masked, and of a client that began the round anew."""
    group = cohort(4, threshold=2)
    _, inboxes = until(group, "mask")
    answer(group, "mask", "client0", inboxes["client0"])
    with pytest.raises(StageError, match="was asked for MASKED after MASKED"):
        answer(group, "mask", "client0", inboxes["client0"])
    with pytest.raises(RoundSpentError):
        advertise(group)
    _, inboxes = until(cohort(4), "mask")
    fresh = cohort_again(group)
    fresh.policies = {name: replace(own, spent=SpentInMemory()) for name, own in group.policies.items()}
    _, inboxes = until(fresh, "mask")
    answer(fresh, "mask", "client0", inboxes["client0"])  # without the marker it masks again


def test_different_models_leave_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends client 0 another model, and a manifest that fits it."""
    other = bytes(32)

    def tell(group: Cohort) -> list[int]:
        state = server.begin(group.manifest)
        to_clients = {name: group.manifest.to_bytes() for name in group.identities}
        to_clients["client0"] = replace(group.manifest, model=other).to_bytes()
        for stage in ("advertise", "share", "mask", "agree", "unmask"):
            for name, message in to_clients.items():
                if stage == "advertise" and name == "client0":
                    content = replace(group.content, model=other)
                    sent, group.states[name] = client.advertise(
                        message, group.identities[name], group.policies[name], content
                    )
                else:
                    sent = answer(group, stage, name, message)
                deliver(state, stage, sent)
            to_clients = conclude(state, stage)
        return [int(value) for value in recovery.finish(state).values]

    with pytest.raises(MessageError, match="or of another manifest"):
        tell(cohort(4))
    # Without the manifest's hash in what is signed, the keys of the masks still hold the model: nothing cancels.
    bare = cached_property(lambda manifest: bytes(32))
    bare.__set_name__(Manifest, "hash")
    monkeypatch.setattr(Manifest, "hash", bare)
    honest = pairs.key_info

    def with_model(purpose: str, manifest: Manifest, *rest: Any) -> bytes:
        return (
            primitives.digest("model", manifest.model, honest(purpose, manifest, *rest))
            if "mask" in purpose
            else honest(purpose, manifest, *rest)
        )

    with monkeypatch.context() as patch:
        patch.setattr(pairs, "key_info", with_model)
        with pytest.raises(VectorError, match="still has masks in it"):
            tell(cohort(4))
    group = cohort(4)  # with neither, the attack succeeds
    assert tell(group) == group.expected(tuple(group.vectors))


def test_an_inbox_of_others_is_refused() -> None:
    group = cohort(10, degree=4, threshold=3)
    state, _ = until(group, "mask")
    stranger = next(place for place in range(1, 10) if place not in state.graph[0])
    body = messages.join([stranger], [state.parcels[stranger, state.graph[stranger][0]]])
    with pytest.raises(MessageError, match="who is no neighbour"):
        client.mask(
            *(group.states["client0"], messages.sheet(Kind.INBOX, group.manifest, body), encode(group, "client0"))
        )


def test_a_parcel_for_another_gives_no_share() -> None:
    group = cohort(5, threshold=3)
    state, _ = until(group, "mask")
    body = messages.join([1, 2, 3, 4], [state.parcels[1, 2], *(state.parcels[i, 0] for i in (2, 3, 4))])
    own = group.states["client0"]
    client.mask(own, messages.sheet(Kind.INBOX, group.manifest, body), encode(group, "client0"))
    assert own.shares[1] is None
    assert None not in [own.shares[i] for i in (2, 3, 4)]


def test_few_parcels_end_the_round_before_anything_is_masked() -> None:
    group = cohort(5, threshold=3)
    state, _ = until(group, "mask")
    body = messages.join([1, 2], [state.parcels[i, 0] for i in (1, 2)])
    vector = encode(group, "client0")
    with pytest.raises(TooFewError, match="2 neighbours of 'client0' shared; the threshold is 3"):
        client.mask(group.states["client0"], messages.sheet(Kind.INBOX, group.manifest, body), vector)
    assert np.array_equal(vector, encode(group, "client0"))
    assert group.policies["client0"].spent == SpentInMemory()


def test_a_refusal_erases_the_secrets() -> None:
    group = cohort(5, threshold=3)
    until(group, "agree")
    own = group.states["client0"]
    assert own.seed and own.mask_secret and own.shares
    with pytest.raises(SurvivorsError):
        client.agree(own, survivors_sheet(group.manifest, [1, 2, 3, 4]))
    assert (own.seed, own.mask_secret, own.channel_secret) == (b"", b"", b"")
    assert own.shares == own.channels == {}
    assert own.stage == client.Stage.DONE


def test_no_secret_is_shown_by_a_state_or_an_identity() -> None:
    group = cohort(3)
    until(group, "agree")
    own = group.states["client0"]
    shown = repr(own)
    for secret in (own.seed, own.mask_secret, own.channel_secret, own.identity.secret):
        assert repr(secret) not in shown and secret.hex() not in shown
    assert read_manifest(group.manifest.to_bytes()) == group.manifest
