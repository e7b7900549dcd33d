"""Methods as their papers write them: loops over flat vectors, with nothing of fedllm's stages.

A `Book` is FedAvg; each method overrides what it does otherwise. `play` is the loop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedllm.tensors.sparse_mask import positions
from tests.conformance.bench import ALPHA, BANDWIDTH, LR, RANK, ROUNDS, STEPS, UNEQUAL, Bench, Sizes


@dataclass
class Book:
    """FedAvg: sum_k n_k Δ_k / sum_k n_k (McMahan et al. 2017, algorithm 1)."""

    settings: Any = None
    names: list[str] = field(default_factory=list)  # of each entry of the vector, its leaf
    held: dict[str, Tensor] = field(default_factory=dict)
    tree: Any = None  # from a vector to its leaves
    key: Any = None  # of the run
    sums: dict[str, Tensor] = field(default_factory=dict)  # by layer: what was added to its frozen weight, unscaled

    def get(self, name: str, like: Tensor, value: float = 0.0) -> Tensor:
        return self.held.setdefault(name, torch.full_like(like, value))

    def weight(self, examples: int) -> float:
        return examples

    def start(self, k: str, x: Tensor) -> Tensor:
        return x

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return g

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        return delta

    def added(self) -> Tensor:
        return torch.cat([torch.empty(0), *(self.sums[layer].reshape(-1) for layer in sorted(self.sums))])

    @contextmanager
    def moving(self, model: Any) -> Iterator[None]:
        """The base model with what was added, written into its weights."""
        before = {layer: model.get_submodule(layer).weight.detach().clone() for layer in self.sums}
        try:
            for layer, whole in self.sums.items():
                model.get_submodule(layer).weight.data += ALPHA / RANK * whole
            yield
        finally:
            for layer, weight in before.items():
                model.get_submodule(layer).weight.data = weight

    def step(self, mean: Tensor, clients: int) -> Tensor:
        return mean

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        """The server's step from (weight, what was sent)."""
        return self.step(sum(w * d for w, d in sent) / sum(w for w, _ in sent), len(sent))


def play(book: Book, bench: Bench, sizes: Sizes = UNEQUAL) -> list[Tensor]:
    """The parameters after each round."""
    x, after = bench.fresh(), []
    book.tree, book.key = bench.tree, bench.experiment(()).key
    book.names = [name for name, leaf in bench.tree(x).items() for _ in range(leaf.numel())]
    for r in range(ROUNDS):
        sent = []
        for k, examples in sizes:
            start = book.start(k, x)
            with book.moving(bench.model.base.model):
                delta = bench.descend(k, r, start, lambda g, y, k=k, x=x: book.correct(k, g, y, x), sizes)
            sent.append((book.weight(examples), book.send(k, delta, x)))
        x = x + book.combined(sent, x)
        after.append(torch.cat([x, book.added()]))
    return after


@cache
def fedavg(bench: Bench, sizes: Sizes = UNEQUAL) -> list[Tensor]:
    """FedAvg with the local work itself, so that nothing but the pipeline can differ: equal to the bit."""
    x, after = bench.fresh(), []
    for r in range(ROUNDS):
        total = sum(bench.trained(k, r, x, sizes) * float(n) for k, n in sizes)
        x = x + total / float(sum(n for _, n in sizes))
        after.append(x)
    return after


class UniformBook(Book):
    def weight(self, examples: int) -> float:
        return 1


class ClippedBook(UniformBook):
    """McMahan et al. 2018, algorithm 1, without the noise."""

    def bound(self) -> float:
        return self.settings.clip

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        return delta * min(1.0, self.bound() / float(delta.norm()))


class AdaptiveClipBook(ClippedBook):
    """Andrew et al. 2021, algorithm 1, without the noise: C <- C exp(-lr (share below C - quantile))."""

    def bound(self) -> float:
        return float(self.held.get("clip", torch.tensor(self.settings.clip, dtype=torch.float64)))

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        self.held[k] = (delta.norm() <= self.bound()).double()
        return super().send(k, delta, x)

    def step(self, mean: Tensor, clients: int) -> Tensor:
        share = float(torch.stack([self.held[k] for k in ("a", "b")]).mean())
        change = math.exp(-self.settings.adaptive.lr * (share - self.settings.adaptive.quantile))
        self.held["clip"] = torch.tensor(self.bound() * change, dtype=torch.float64)
        return mean


class KeepBook(Book):
    """Own leaves go on from where they were; the others are averaged."""

    def start(self, k: str, x: Tensor) -> Tensor:
        return torch.where(self.mine(), self.held.get(k, x), x)

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        self.held[k] = self.start(k, x) + delta
        return torch.where(self.mine(), 0, delta)

    def mine(self) -> Tensor:
        return torch.tensor([name.endswith("lora_B") for name in self.names])


class OwnBook(KeepBook):
    """The personal branch stays; `copied` takes the shared one's entries to its places."""

    def mine(self) -> Tensor:
        return torch.tensor([".personal." in name for name in self.names])

    def copied(self, x: Tensor, source: str = "shared", to: str = "personal") -> Tensor:
        leaves = self.tree(x)
        return torch.cat([leaves[name.replace(f".{to}.", f".{source}.")].reshape(-1) for name in sorted(leaves)])


class DittoBook(OwnBook):
    """Li et al. 2021, algorithm 1, both models in one pass."""

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.mine(), g + self.settings.lam * (y - self.copied(x)), g)


class PersonalLastBook(OwnBook):
    """Yang et al. 2024, sequential: FedAvg for all rounds but the last one, which tunes a copy."""

    def last(self) -> bool:
        return "done" in self.held

    def start(self, k: str, x: Tensor) -> Tensor:
        return torch.where(self.mine(), self.copied(x), x) if self.last() else x

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.mine() == self.last(), g, 0)

    def step(self, mean: Tensor, clients: int) -> Tensor:
        self.held["done"] = torch.tensor(1)
        return mean


class RestOfWorldBook(OwnBook):
    """FedALT: of two clients, the rest of each one's world is the other."""

    def weight(self, examples: int) -> float:
        return 1

    def start(self, k: str, x: Tensor) -> Tensor:
        other = self.held.get("last " + {"a": "b", "b": "a"}[k], torch.zeros_like(x))
        return torch.where(self.mine(), self.held.get(k, x), self.copied(other, "personal", "shared"))

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        for k in ("a", "b"):
            self.held[f"last {k}"] = self.held[k]
        mean = self.copied((self.held["a"] + self.held["b"]) / 2, "personal", "shared")
        return torch.where(self.mine(), 0, mean - x)


class FdloraBook(OwnBook):
    """FDLoRA with a copy in each round: the personal branch first, its mean as the shared one, then that one."""

    def weight(self, examples: int) -> float:
        return 1

    def first(self) -> bool:
        return "done" not in self.held

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.mine() == self.first(), g, 0)

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        if not self.first():
            return delta
        self.held[k] = self.copied(self.start(k, x) + delta, "personal", "shared")
        return torch.where(self.mine(), 0, self.held[k] - x)

    def step(self, mean: Tensor, clients: int) -> Tensor:
        self.held["done"] = torch.tensor(1)
        return mean


class ProxBook(Book):
    """Li et al. 2020, eq. 2."""

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return g + self.settings.mu * (y - x)


class ScaffoldBook(UniformBook):
    """Karimireddy et al. 2020, algorithm 1, option II."""

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return g - self.get(k, x) + self.get("c", x)

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        new = self.get(k, x) - self.get("c", x) - delta / (STEPS * LR)
        self.held["change"] = self.get("change", x) + new - self.get(k, x)
        self.held[k] = new
        return delta

    def step(self, mean: Tensor, clients: int) -> Tensor:
        self.held["c"] = self.held["c"] + self.held.pop("change") / clients
        return mean


class DynBook(UniformBook):
    """Acar et al. 2021, algorithm 1."""

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return g - self.get(k, x) + self.settings.alpha * (y - x)

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        self.held[k] = self.get(k, x) - self.settings.alpha * delta
        self.held["sum"] = self.get("sum", x) + delta
        return delta

    def step(self, mean: Tensor, clients: int) -> Tensor:
        h = self.get("h", mean) - self.settings.alpha / clients * self.held.pop("sum")
        self.held["h"] = h
        return mean - h / self.settings.alpha


class TopKBook(Book):
    """Stich et al. 2018, algorithm 1."""

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        error = self.get(k, x) + delta
        keep = error.abs().topk(round(self.settings.fraction * len(error))).indices
        sent = torch.zeros_like(error).index_copy(0, keep, error[keep])
        self.held[k] = error - sent
        return sent


class SelectiveBook(Book):
    """Top entries of sum_k |w_k Δ_k| of the first round, and nothing else later (Jin et al. 2023, in effect)."""

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        whole = super().combined(sent, x)
        if "map" in self.held:
            return whole * self.held["map"]
        sizes = sum(w * d.abs() for w, d in sent)
        self.held["map"] = torch.zeros_like(x).index_fill(0, sizes.topk(round(self.settings.share * len(x))).indices, 1)
        return whole


class MomentumBook(Book):
    def step(self, mean: Tensor, clients: int) -> Tensor:
        beta = self.settings.beta
        self.held["v"] = beta * self.get("v", mean) + (1 - beta) * mean
        return self.settings.server_lr * self.held["v"]


class NesterovBook(Book):
    """torch.optim.SGD on the pseudo-gradient -Δ (Douillard et al. 2023, algorithm 1)."""

    def step(self, mean: Tensor, clients: int) -> Tensor:
        if "w" not in self.held:
            self.held["w"] = torch.zeros_like(mean)
            settings = {"lr": self.settings.server_lr, "momentum": self.settings.momentum, "nesterov": True}
            self.optimizer = torch.optim.SGD([self.held["w"]], **settings)
        before = self.held["w"].clone()
        self.held["w"].grad = -mean
        self.optimizer.step()
        return self.held["w"] - before


class AdaptiveBook(Book):
    """Reddi et al. 2021, algorithm 2."""

    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return v + d**2

    def step(self, mean: Tensor, clients: int) -> Tensor:
        s = self.settings
        self.held["m"] = s.beta1 * self.get("m", mean) + (1 - s.beta1) * mean
        self.held["v"] = self.second(self.get("v", mean, s.tau**2), mean)
        return s.server_lr * self.held["m"] / (self.held["v"] ** 0.5 + s.tau)


class AdamBook(AdaptiveBook):
    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return self.settings.beta2 * v + (1 - self.settings.beta2) * d**2


class YogiBook(AdaptiveBook):
    def second(self, v: Tensor, d: Tensor) -> Tensor:
        return v - (1 - self.settings.beta2) * d**2 * torch.sign(v - d**2)


class FlexLoraBook(Book):
    """The server's factors are the best of their rank for the mean of the clients' products, made and cut densely."""

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        total = sum(w for w, _ in sent)
        new = self.factors(self.tree(x), [(w / total, self.tree(x + d)) for w, d in sent])
        return torch.cat([new[name].reshape(-1) for name in sorted(new)]) - x

    def factors(self, old: dict[str, Tensor], news: list[tuple[float, dict[str, Tensor]]]) -> dict[str, Tensor]:
        """The server's leaves from (share, leaves) of the clients."""
        found = {}
        for layer in {name.removesuffix(".lora_A") for name in old if name.endswith(".lora_A")}:
            pairs = [(p, new[f"{layer}.lora_B"], new[f"{layer}.lora_A"]) for p, new in news]
            found[f"{layer}.lora_B"], found[f"{layer}.lora_A"] = self.pair(pairs)
        return found

    def pair(self, pairs: list[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """B and A of a layer, from (share, B_k, A_k)."""
        u, s, v = self.cut(sum(p * b @ a for p, b, a in pairs), len(pairs[0][2]))
        return u * s.sqrt(), s.sqrt()[:, None] * v

    def cut(self, product: Any, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """The largest singular values; the largest entry of each column of U is positive."""
        u, s, v = torch.linalg.svd(product)
        u, s, v = u[:, :rank], s[:rank], v[:rank]
        for j in range(rank):
            sign = u[u[:, j].abs().argmax(), j].sign()
            u[:, j], v[j] = u[:, j] * sign, v[j] * sign
        return u, s, v


class FloraBook(Book):
    """Wang et al. 2024, eq. 5 to 7, densely: the mean of the products joins W, and the adapter begins anew."""

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        total, round = sum(w for w, _ in sent), self.held.setdefault("round", torch.tensor(0))
        old, new = self.tree(x), {}
        for layer in sorted(name.removesuffix(".lora_A") for name in old if name.endswith(".lora_A")):
            pairs = [(w / total, self.tree(x + d)) for w, d in sent]
            mean = sum(p * leaves[f"{layer}.lora_B"] @ leaves[f"{layer}.lora_A"] for p, leaves in pairs)
            self.sums[layer] = self.sums.get(layer, 0) + mean
            a = old[f"{layer}.lora_A"]
            generator = self.key.fold(int(round), "", f"{layer}.lora_A").generator()
            drawn = torch.rand(a.shape, generator=generator, dtype=torch.float64)
            new |= {
                f"{layer}.lora_A": (2 * drawn - 1) / a.shape[1] ** 0.5,
                f"{layer}.lora_B": 0 * old[f"{layer}.lora_B"],
            }
        self.held["round"] = round + 1
        return torch.cat([new[name].reshape(-1) for name in sorted(new)]) - x


class FedexBook(Book):
    """Singhal et al. 2024, eq. 9 to 11, densely: FedIT, and its error joins W."""

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        total = sum(w for w, _ in sent)
        mean = sum(w * d for w, d in sent) / total
        pairs, means = [(w / total, self.tree(x + d)) for w, d in sent], self.tree(x + mean)
        for layer in sorted(name.removesuffix(".lora_A") for name in means if name.endswith(".lora_A")):
            b, a = f"{layer}.lora_B", f"{layer}.lora_A"
            error = sum(p * leaves[b] @ leaves[a] for p, leaves in pairs) - means[b] @ means[a]
            self.sums[layer] = self.sums.get(layer, 0) + error
        return mean


class SparseFirstBook(FlexLoraBook):
    """Babakniya et al. 2023, algorithm 1, with one round of sparse tuning: then the best factors, and the rest in W."""

    def active(self, x: Tensor) -> Tensor:
        first = "round" not in self.held
        return torch.tensor([name.endswith("lora_sparse") == first for name in self.names])

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return torch.where(self.active(x), g, 0)

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        mean = sum(w * d for w, d in sent) / sum(w for w, _ in sent)
        if "round" in self.held:
            return mean
        self.held["round"] = torch.tensor(1)
        new = self.tree(x + mean)
        for layer in sorted(name.removesuffix(".lora_A") for name in new if name.endswith(".lora_A")):
            a, b = new[f"{layer}.lora_A"], new[f"{layer}.lora_B"]
            whole = torch.zeros(len(b) * a.shape[1], dtype=x.dtype)
            whole[positions(layer, len(whole), len(new[f"{layer}.lora_sparse"]))] = new[f"{layer}.lora_sparse"]
            u, s, v = self.cut(whole.view(len(b), -1), len(a))
            new[f"{layer}.lora_B"], new[f"{layer}.lora_A"] = u * s.sqrt(), s.sqrt()[:, None] * v
            self.sums[layer] = whole.view(len(b), -1) - (u * s) @ v
            new[f"{layer}.lora_sparse"] = torch.zeros_like(new[f"{layer}.lora_sparse"])
        return torch.cat([new[name].reshape(-1) for name in sorted(new)]) - x


class LoraFairBook(Book):
    """The mean of A, and the B that solves the regularised least squares as torch does, made densely."""

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        total = sum(w for w, _ in sent)
        old, news = self.tree(x), [(w / total, self.tree(x + d)) for w, d in sent]
        means = {name: sum(p * new[name] for p, new in news) for name in old}
        for layer in {name.removesuffix(".lora_A") for name in old if name.endswith(".lora_A")}:
            a, b = means[f"{layer}.lora_A"], means[f"{layer}.lora_B"]
            gap = sum(p * new[f"{layer}.lora_B"] @ new[f"{layer}.lora_A"] for p, new in news) - b @ a
            root = self.settings.penalty**0.5 * torch.eye(len(a), dtype=a.dtype)
            known = torch.cat([a.T, root])  # (in + rank, rank)
            wanted = torch.cat([gap.T, gap.new_zeros(len(a), len(b))])
            means[f"{layer}.lora_B"] = b + torch.linalg.lstsq(known, wanted).solution.T
        return torch.cat([(means[name] - old[name]).reshape(-1) for name in sorted(old)])


class HetLoraBook(Book):
    """Cho et al. 2024: a penalty on the trailing components, self-pruning, zero padding, weights by norms of products.

    A client's vector keeps its length; components that it has pruned are zeros, and so are their gradients.
    """

    def start(self, k: str, x: Tensor) -> Tensor:
        return self.first(x, self.rank(k))

    def correct(self, k: str, g: Tensor, y: Tensor, x: Tensor) -> Tensor:
        y = y.clone().requires_grad_()
        return g + self.settings.penalty * torch.autograd.grad(self.trailing(k, y), y)[0]

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        before = self.start(k, x)
        if self.trailing(k, before + delta) < self.trailing(k, before):
            self.held[k] = torch.tensor(self.kept(k))
        return self.first(before + delta, self.rank(k))

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        norms = [float(torch.cat([(b @ a).flatten() for b, a in self.pairs(after)]).norm()) for _, after in sent]
        return sum(n * after for n, (_, after) in zip(norms, sent, strict=True)) / sum(norms) - x

    def rank(self, k: str) -> int:
        return int(self.held.get(k, 2))

    def kept(self, k: str) -> int:
        return math.ceil(self.settings.gamma * self.rank(k))

    def trailing(self, k: str, y: Tensor) -> Tensor:
        kept, rank = self.kept(k), self.rank(k)
        return sum(b[:, kept:rank].norm() * a[kept:rank].norm() for b, a in self.pairs(y))

    def pairs(self, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        leaves = self.tree(y)
        return [(leaves[n.replace("_A", "_B")], leaf) for n, leaf in leaves.items() if n.endswith("lora_A")]

    def first(self, y: Tensor, rank: int) -> Tensor:
        y = y.clone()
        for b, a in self.pairs(y):
            b[:, rank:], a[rank:] = 0, 0
        return y


class HaflqBook(Book):
    """Su et al. 2024, by the change of a component's product: the components that fit the bandwidth, in full precision.

    A component's mean is over those who sent it.
    """

    def send(self, k: str, delta: Tensor, x: Tensor) -> Tensor:
        before, after, sent = self.tree(x), self.tree(x + delta), self.tree(torch.full_like(x, torch.nan))
        moved, values = {}, {}
        for name in [name for name in before if name.endswith("lora_A")]:
            other = name.replace("_A", "_B")
            for j in range(len(before[name])):
                products = (torch.outer(leaves[other][:, j], leaves[name][j]) for leaves in (after, before))
                moved[name, j] = float((next(products) - next(products)).norm())
                values[name, j] = len(before[other]) + before[name].shape[1]
        figures, marks = 3, 2 * len(moved)  # loss, steps, tokens; who holds what of each factor
        room = BANDWIDTH // 8 - figures - marks
        for name, j in sorted(moved, key=lambda component: -moved[component]):
            if values[name, j] <= room:
                room -= values[name, j]
                other = name.replace("_A", "_B")
                sent[name][j] = after[name][j] - before[name][j]
                sent[other][:, j] = after[other][:, j] - before[other][:, j]
        return torch.cat([sent[name].reshape(-1) for name in sorted(sent)])

    def combined(self, sent: list[tuple[float, Tensor]], x: Tensor) -> Tensor:
        weights = torch.stack([torch.where(delta.isnan(), 0, w) for w, delta in sent])
        total = sum(w * delta.nan_to_num() for w, (_, delta) in zip(weights, sent, strict=True))
        return torch.where(weights.sum(0) > 0, total / weights.sum(0), 0)


class SvdBook(FlexLoraBook):
    """Lee et al. 2025, algorithm 1, where lora_A is averaged, too."""

    def pair(self, pairs: list[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        b, a = sum(p * b for p, b, _ in pairs), sum(p * a for p, _, a in pairs)
        u, s, v = self.cut(b @ a, len(a))
        return u * s, v
