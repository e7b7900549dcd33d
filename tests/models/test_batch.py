"""Batches of a stack of clients, against a naive loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.models.batch import IGNORE, Batch, Example, client_means, collate

Labels = list[list[list[bool]]]  # client, example, position: is it labelled?
LABELS: st.SearchStrategy[Labels] = st.lists(
    st.lists(st.lists(st.booleans(), min_size=1, max_size=5), max_size=4), min_size=1, max_size=4
).filter(any)


def examples(labels: Labels) -> list[list[Example]]:
    """Tokens are numbered through, so that every place is its own; a target is its token plus 1000."""
    found, token = [], 0
    for client in labels:
        encoded = []
        for positions in client:
            tokens = torch.arange(token, token + len(positions))
            token += len(positions)
            encoded.append(Example(tokens, torch.where(torch.tensor(positions), tokens + 1000, IGNORE)))
        found.append(encoded)
    return found


def seen(positions: list[bool]) -> list[bool]:
    """Up to the last label; all of them without one."""
    left = list(positions)
    while any(positions) and not left[-1]:
        left.pop()
    return left


@given(LABELS)
def test_collate_lays_clients_side_by_side(labels: Labels) -> None:
    clients = examples(labels)
    batch = collate(clients)
    lengths = [[len(seen(positions)) for positions in client] for client in labels]
    pairs = [
        (e, length) for client, own in zip(clients, lengths, strict=True) for e, length in zip(client, own, strict=True)
    ]
    assert batch.tokens.tolist() == [token for e, length in pairs for token in e.tokens[:length].tolist()]
    assert batch.positions.tolist() == [t for _, length in pairs for t in range(length)]
    assert batch.lengths == tuple(length for _, length in pairs)
    assert batch.counts == tuple(map(len, clients))
    labelled = [(place, target, owner) for place, (target, owner) in enumerate(naive_rows(labels)) if target]
    assert batch.rows.tolist() == [place for place, _, _ in labelled]
    assert batch.targets.tolist() == [target for _, target, _ in labelled]
    assert batch.row_sequences.tolist() == [owner for _, _, owner in labelled]
    assert batch.sequence_clients.tolist() == [k for k, client in enumerate(clients) for _ in client]
    assert batch.client_tokens == tuple(sum(len(e.tokens) for e in client) for client in clients)
    assert batch.client_computed == tuple(map(sum, lengths))
    types = {
        batch.tokens.dtype,
        batch.positions.dtype,
        batch.rows.dtype,
        batch.targets.dtype,
        batch.row_sequences.dtype,
    }
    assert types == {torch.int64}


@given(LABELS.filter(lambda labels: any(labels[-1])))
def test_one_client_of_a_batch_is_the_batch_of_that_client(labels: Labels) -> None:
    clients = examples(labels)
    own, alone = collate(clients).only(len(clients) - 1), collate(clients[-1:])
    for name, value in vars(alone).items():
        other = vars(own)[name]
        assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


@given(LABELS)
def test_each_sequence_apart_is_a_client_of_its_own(labels: Labels) -> None:
    clients = examples(labels)
    generators = tuple(torch.Generator() for _ in clients)
    found = collate(clients, generators).apart
    each = [(k, example) for k, client in enumerate(clients) for example in client]
    alone = collate([[example] for _, example in each], tuple(generators[k] for k, _ in each))
    for name, value in vars(alone).items():
        if name != "unseen":  # these are counted as their clients'
            other = vars(found)[name]
            assert torch.equal(other, value) if isinstance(value, torch.Tensor) else other == value, name


def test_apart_nothing_is_computed_once_for_several_sequences() -> None:
    same = torch.arange(12)
    pair = [Example(same, torch.where(same < 10, IGNORE, same)) for _ in range(2)]
    shared = collate([pair], share=True)
    assert shared.shared and shared.client_computed == (14,)
    assert shared.apart.shared == () and shared.apart.client_computed == (12, 12)


def naive_rows(labels: Labels) -> list[tuple[int, int]]:
    """(target or 0, sequence) of each token that is seen."""
    found, token = [], 0
    for owner, positions in enumerate(positions for client in labels for positions in client):
        found += [((token + place + 1000) * is_one, owner) for place, is_one in enumerate(seen(positions))]
        token += len(positions)
    return found


def naive_means(labels: Labels, losses: list[float]) -> list[float]:
    """Mean over a client's examples of the mean over an example's labelled positions, by two loops."""
    rest, means = iter(losses), []
    for client in labels:
        each = []
        for positions in client:
            own = [next(rest) for is_one in positions if is_one]
            each.append(sum(own) / len(own) if own else 0.0)
        means.append(sum(each) / len(each) if each else 0.0)
    return means


@given(LABELS, st.integers(0, 1000))
def test_client_means_equal_the_loop(labels: Labels, seed: int) -> None:
    batch = collate(examples(labels))
    losses = torch.rand(len(batch.rows), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    means = client_means(losses, batch)
    expected = torch.tensor(naive_means(labels, losses.tolist()), dtype=torch.float64)
    torch.testing.assert_close(means, expected, rtol=1e-14, atol=1e-14)  # float32 weights would be off by 1e-8
    low = client_means(losses.float(), batch)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low.double(), expected, rtol=1e-5, atol=1e-6)


def test_means_by_hand() -> None:
    # client 0: two examples, of 1 and 3 labelled rows; client 1 idle; client 2: one of its two has no labelled row
    labels = [[[True, False], [True, True, True]], [], [[True, True], [False]]]
    batch = collate(examples(labels))
    losses = torch.tensor([8.0, 1.0, 2.0, 6.0, 3.0, 5.0])
    assert client_means(losses, batch).tolist() == [(8 + 3) / 2, 0, (4 + 0) / 2]


def test_gradients_reach_each_row_and_idle_clients_stand_still() -> None:
    batch = collate(examples([[], [[True, True]], [[True]]]))
    losses = torch.ones(3, requires_grad=True)
    means = client_means(losses, batch)
    means[1].backward()
    assert losses.grad is not None and losses.grad.tolist() == [0.5, 0.5, 0.0]
    assert means[0] == 0


def test_one_client_is_not_moved_by_another() -> None:
    labels = [[[True, True, False]], [[True], [True, True]]]
    batch = collate(examples(labels))
    losses = torch.rand(5, generator=torch.Generator().manual_seed(1))
    changed = losses.clone()
    changed[2:] = torch.tensor([1e30, float("inf"), 7.0])
    assert client_means(losses, batch)[0] == client_means(changed, batch)[0]


def test_generators_are_handed_on() -> None:
    generators = (torch.Generator(), torch.Generator())
    assert collate(examples([[[True]], [[True]]]), generators).dropout is generators
    assert collate(examples([[[True]]])).dropout == ()


def test_values_are_compared_by_identity() -> None:
    one, two = collate(examples([[[True]]])), collate(examples([[[True]]]))
    assert one == one and one != two and isinstance(hash(one), int) and isinstance(one, Batch)
    with pytest.raises(AttributeError):
        one.counts = ()  # type: ignore[misc]
