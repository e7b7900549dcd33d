"""The end of a secure sum: recover the secrets, take the masks off, and say who dealt or gave out wrong shares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations, islice

from fedllm.privacy.secure_aggregation.faults import StageError, TooFewError, VectorError
from fedllm.privacy.secure_aggregation.masks import Mask, apply_masks, apply_to_check
from fedllm.privacy.secure_aggregation.messages import Secret
from fedllm.privacy.secure_aggregation.pairs import mask_of_pair, mask_of_seed, seed_commitment
from fedllm.privacy.secure_aggregation.primitives import exchange_public
from fedllm.privacy.secure_aggregation.rings import Vector, largest, signed
from fedllm.privacy.secure_aggregation.server import ServerState, Stage
from fedllm.privacy.secure_aggregation.shamir import combine

MOST_TRIES = 1000  # subsets of the shares of one secret


@dataclass(frozen=True)
class Total:
    """What a round ends with.

    Args:
        values: (length,) the sum of the survivors' vectors, as signed integers.
        survivors: names of the clients whose vectors are in it.
        blamed: name -> what it did wrong.
        transcript: hash of the messages that the server accepted.
    """

    values: Vector
    survivors: tuple[str, ...]
    blamed: Mapping[str, str]
    transcript: bytes


def finish(state: ServerState, threads: int = 1) -> Total:
    """Stage 6: the sum of the survivors' vectors.

    threads: how many share the work of taking masks off.

    Raises:
        TooFewError: a secret has fewer right shares than the threshold; the message names whose.
        VectorError: the sum is beyond what honest clients can reach.
    """
    if state.stage != Stage.UNMASKINGS:
        raise StageError(f"the server was asked for the sum while it collects {state.stage.name}")
    manifest = state.manifest
    masks = []
    for own in state.survivors:
        seed = recover(state, own, Secret.SEED)
        masks.append(Mask(mask_of_seed(manifest, state.bundle, own, seed), add=False))
    for own in sorted(state.shared - set(state.survivors)):
        masks += _masks_of_dropout(state, own)
    state.stage = Stage.FINISHED
    apply_masks(state.total, masks, manifest.cipher, threads)
    apply_to_check(state.check, masks, manifest.cipher, manifest.length)
    check_sum(state)
    names = {manifest.name(client): what for client, what in sorted(state.blamed.items())}
    values = signed(state.total, manifest.bits)
    survivors = tuple(manifest.name(client) for client in state.survivors)
    return Total(values, survivors, names, state.transcript)


def check_sum(state: ServerState) -> None:
    """Pass if all masks are off and the sum is one that the survivors can reach.

    Raises:
        VectorError: it is not, and shows nothing; clients were told different things, or one of them did not mask as
            it should.
    """
    manifest, count = state.manifest, len(state.survivors)
    where = f"the sum of round {manifest.round} of {manifest.task!r}"
    if any(signed(state.check, manifest.bits) != count):
        raise VectorError(
            f"{where} still has masks in it; clients were told different things, or one sent a wrong vector"
        )
    if (found := largest(state.total, manifest.bits)) > count * manifest.bound:
        raise VectorError(
            f"{where} has an entry of magnitude {found}; {count} clients can reach {count * manifest.bound}, so one of "
            "them sent a wrong vector"
        )


def _masks_of_dropout(state: ServerState, own: int) -> Iterator[Mask]:
    """What is left in the total of the masks between the survivors and a client that shared and then dropped out."""
    peers = [peer for peer in state.graph[own] if peer in state.survivors]
    if peers:
        secret = recover(state, own, Secret.MASK)
        for peer in peers:
            key = mask_of_pair(state.manifest, state.bundle, (own, secret), (peer, state.keys[peer].mask))
            yield Mask(key, add=own > peer)  # the survivor subtracted it where own > peer


def recover(state: ServerState, own: int, secret: Secret) -> bytes:
    """A client's secret, checked against what it advertised.

    Shares come with their dealer's own hash, so that a wrong one is the dealer's doing; other subsets are then tried.

    Raises:
        TooFewError: too few shares, or no subset of them gives the secret.
    """
    manifest, name = state.manifest, state.manifest.name(own)
    shares = state.shares.get((own, secret), {})
    if len(shares) < manifest.threshold:
        raise TooFewError(
            f"{len(shares)} right shares of client {name!r} came; the threshold is {manifest.threshold}, so the round "
            f"shows nothing{_blame(state)}"
        )
    right = _test(state, own, secret)
    for tries, holders in enumerate(_subsets(sorted(shares), manifest.threshold)):
        found = combine({holder + 1: shares[holder] for holder in holders})
        if found is not None and right(found):
            if tries:
                state.blamed[own] = "dealt shares that do not belong together"
            return found
    state.blamed[own] = "dealt shares that do not give its secret"
    raise TooFewError(f"the shares that client {name!r} dealt do not give its secret; leave it out{_blame(state)}")


def _test(state: ServerState, own: int, secret: Secret) -> Callable[[bytes], bool]:
    """Whether bytes are the secret that a client advertised."""
    keys = state.keys[own]
    if secret == Secret.SEED:
        return lambda found: seed_commitment(state.manifest, own, found) == keys.commitment
    return lambda found: exchange_public(found) == keys.mask


def _subsets(holders: list[int], size: int) -> Iterator[tuple[int, ...]]:
    """Runs around the circle first, which leave out any one wrong share; then others, up to a limit."""
    twice = holders + holders
    runs = (tuple(twice[start : start + size]) for start in range(len(holders) if len(holders) > size else 1))
    return islice(chain(runs, combinations(holders, size)), MOST_TRIES)


def _blame(state: ServerState) -> str:
    """Who did what, as the tail of a sentence."""
    return "".join(f"; client {state.manifest.name(client)!r} {what}" for client, what in sorted(state.blamed.items()))
