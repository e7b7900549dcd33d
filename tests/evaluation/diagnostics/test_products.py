"""Aggregation bias and spectra against dense products of layers that are not square."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch

from fedllm.evaluation.diagnostics.products import Bias, Seen, bias, layers, spectra
from fedllm.tensors import low_rank
from fedllm.tensors.tree import Tree

LAYERS = {"q": (192, 576), "down": (576, 1536)}  # out, in
WEIGHTS = (5.0, 3.0, 11.0)
SHARES = [weight / sum(WEIGHTS) for weight in WEIGHTS]


def drawn(rank: int, seed: int, layers: Mapping[str, tuple[int, int]] = LAYERS) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    found: Tree = {}
    for layer, (size_out, size_in) in layers.items():
        b, a = (torch.randn(*shape, generator=generator) / 8 for shape in ((size_out, rank), (rank, size_in)))
        found |= low_rank.layer_leaves(layer, b, a)
    return found


def cut(leaves: Tree, rank: int) -> Tree:
    return low_rank.sliced(leaves, rank)


def clients(server: Tree, after: Sequence[Tree]) -> list[Seen]:
    """Each began with the server's first components."""
    starts = [cut(server, len(leaves["q.lora_A"])) for leaves in after]
    deltas = [
        {name: leaves[name] - start[name] for name in leaves} for leaves, start in zip(after, starts, strict=True)
    ]
    return [
        Seen(str(k), weight, start, delta)
        for k, (weight, start, delta) in enumerate(zip(WEIGHTS, starts, deltas, strict=False))
    ]


def dense(leaves: Tree, layer: str) -> np.ndarray:
    b, a = (leaf.double().numpy() for leaf in low_rank.pair(leaves, layer))
    return b @ a


def relative(after: Sequence[Tree], server: Tree) -> float:
    """||sum p B A - B A|| / ||sum p B A|| over both layers, with every product written out."""
    lost = norm = 0.0
    for layer in LAYERS:
        mean = sum(p * dense(leaves, layer) for p, leaves in zip(SHARES, after, strict=True))
        lost += float(((mean - dense(server, layer)) ** 2).sum())
        norm += float((mean**2).sum())
    return float(np.sqrt(lost / norm))


def mean_of_factors(after: Sequence[Tree], rank: int) -> Tree:
    whole = [low_rank.padded(leaves, drawn(rank, 0))[0] for leaves in after]
    return {name: sum(p * leaves[name].double() for p, leaves in zip(SHARES, whole, strict=True)) for name in whole[0]}  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [(4, 4, 4), (4, 8, 16)])
def test_bias_of_the_mean_of_factors(ranks: tuple[int, ...]) -> None:
    server, after = drawn(max(ranks), 0), [drawn(rank, seed) for seed, rank in enumerate(ranks, 1)]
    merged = mean_of_factors(after, max(ranks))
    found = bias(clients(server, after), merged, None)
    assert found is not None and found.total is not None
    assert found.total == pytest.approx(relative(after, merged), rel=1e-6) == found.means
    assert found.total > 0.3
    means = [sum(p * dense(leaves, layer) for p, leaves in zip(SHARES, after, strict=True)) for layer in LAYERS]
    assert found.norm == pytest.approx(float(np.sqrt(sum((mean**2).sum() for mean in means))), rel=1e-6)


def test_what_the_server_came_to_and_what_the_mean_would_are_two_things() -> None:
    """A server that holds the mean of the products has no bias, whatever the mean of the factors has."""
    server, after = drawn(12, 0), [drawn(4, seed) for seed in (1, 2, 3)]
    exact: Tree = {}
    for layer in LAYERS:
        b = torch.cat([low_rank.pair(leaves, layer)[0] for leaves in after], 1)
        a = torch.cat([p * low_rank.pair(leaves, layer)[1] for p, leaves in zip(SHARES, after, strict=True)])
        exact |= low_rank.layer_leaves(layer, b, a)
    found = bias(clients(server, after), exact, None)
    assert found is not None and found.total is not None and found.means is not None
    assert found.total < 1e-6
    assert found.means == pytest.approx(relative(after, mean_of_factors(after, 12)), rel=1e-6)


def test_no_bias_of_clients_that_are_alike() -> None:
    server, after = drawn(4, 0), [drawn(4, 1)] * 3
    found = bias(clients(server, after), after[0], None)
    assert found is not None and found.total is not None and found.total < 1e-6 and found.means < 1e-6  # type: ignore[operator]


@pytest.mark.parametrize("still", ["lora_A", "lora_B"])
def test_no_bias_where_one_factor_stands_still(still: str) -> None:
    """FFA-LoRA and RoLoRA: the factor is where the client began, and not in its delta."""
    server = drawn(4, 0)
    held = {name: leaf for name, leaf in server.items() if name.endswith(still)}
    after = [{**drawn(4, seed), **held} for seed in (1, 2, 3)]
    seen = [
        Seen(one.client, one.weight, one.start, {name: d for name, d in one.delta.items() if name not in held})
        for one in clients(server, after)
    ]
    merged = {name: leaf.float() for name, leaf in mean_of_factors(after, 4).items()}
    found = bias(seen, merged, None)
    assert found is not None and found.total is not None and found.total < 1e-6 and found.means < 1e-6  # type: ignore[operator]


def test_products_that_are_not_known() -> None:
    server, after = drawn(4, 0), [drawn(4, seed) for seed in (1, 2, 3)]
    seen = clients(server, after)
    assert bias([], server, None) is None
    alone = [Seen("a", 1.0, {"q.lora_A": server["q.lora_A"]}, {"q.lora_A": server["q.lora_A"]})]
    assert bias(alone, server, None) is None, "lora_B stays with the clients"
    other = [*seen[1:], Seen("a", 1.0, seen[0].start, {"q.lora_BA": torch.ones(192, 576)})]
    assert bias(other, server, None) is None, "a product travels"
    flat = {name: leaf.flatten() for name, leaf in seen[0].delta.items()}
    assert bias([Seen("a", 1.0, seen[0].start, flat), *seen[1:]], server, None) is None, "values travel in a row"
    still = {name: torch.zeros_like(leaf) if name.endswith("lora_B") else leaf for name, leaf in server.items()}
    unmoved = [Seen("a", 1.0, still, {name: torch.zeros_like(leaf) for name, leaf in still.items()})]
    assert bias(unmoved, still, None) == Bias(0.0, None, None), "nothing is lost of nothing"


def test_spectra_are_means_over_layers() -> None:
    server = drawn(6, 0)
    ranks, energies = [], []
    for layer in LAYERS:
        s = np.linalg.svd(dense(server, layer), compute_uv=False)[:6]
        q = s / s.sum()
        ranks.append(np.exp(-(q * np.log(q)).sum()))
        energies.append((s[2:] ** 2).sum() / (s**2).sum())
    found = spectra(server, list(LAYERS), 2)
    assert found == pytest.approx((np.mean(ranks), np.mean(energies)), rel=1e-6)
    assert spectra(server, list(LAYERS), None)[1] is None
    server["q.lora_B"] = torch.zeros(192, 6)
    assert spectra(server, list(LAYERS), 2) == pytest.approx((ranks[1], energies[1]), rel=1e-6), "q has no product"
    assert spectra(server, ["q"], 2) == (None, None)


def test_layers_are_spread_evenly() -> None:
    """Not a stride, which could fall on one kind of layer alone."""
    leaves: Tree = {}
    for place in range(10):
        leaves |= low_rank.layer_leaves(f"l{place}", torch.ones(2, 1), torch.ones(1, 3))
    leaves["lone.lora_A"] = torch.ones(1, 3)
    assert layers(leaves, leaves, None) == [f"l{place}" for place in range(10)]
    assert layers(leaves, leaves, 4) == ["l0", "l2", "l5", "l7"]
    assert layers(leaves, {"l3.lora_B", "l8.lora_A"}, 32) == ["l3", "l8"]
    assert layers(leaves, {"lone.lora_A"}, 32) == []


def test_bias_of_some_layers() -> None:
    server, after = drawn(4, 0), [drawn(4, seed) for seed in (1, 2, 3)]
    merged = mean_of_factors(after, 4)
    one, both = (bias(clients(server, after), merged, most) for most in (1, None))
    mean = sum(p * dense(leaves, "down") for p, leaves in zip(SHARES, after, strict=True))
    assert one is not None and both is not None
    assert one.norm == pytest.approx(float(np.linalg.norm(mean)), rel=1e-6) and one.norm < both.norm
