"""Methods with two adapters against their papers' loops: a tiny model in float64, three clients of unequal size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError
from fedllm.experiment.record import Experiment
from fedllm.messages.context import RoundContext
from fedllm.models.adapters.fusion import search
from fedllm.models.adapters.multi_lora import FACTORS, REFERENCE, MultiLora
from fedllm.models.batch import collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.models.task import Task
from fedllm.runs.artifacts import personal_leaves
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.folder import Folder
from fedllm.runs.launch import Result
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.engines.cohort import in_pieces
from tests.runs.small import SIZES, adapter_hash, spec, write_records

METHODS = ("ditto", "feddpa_t", "feddpa_f", "fdlora", "fedalt")
LR, STEPS = 0.1, 2
CLIENTS = tuple(SIZES)
LORA = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
Change = Callable[[Tree, Tree], Tree]  # (grads, values) -> grads


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))


def experiment(method: Any, data: Path, rounds: int = 3, **changes: Any) -> Experiment:
    made = spec(data, rounds=rounds, evaluation__metrics=[], evaluation__every=None, task__dtype="float64", **changes)
    del made["stages"]
    made["task"]["adapter"] = {"multi_lora": LORA}
    made["method"] = method
    return fedllm.build(made)


@dataclass
class Paper:
    """The local work of a client, written out."""

    made: Experiment

    def __post_init__(self) -> None:
        self.model: LoadedModel = load(self.made.task)
        self.data = self.made.federation.load(self.made.key).train
        self.start = self.model.initial_params(self.made.key)

    def branch(self, values: Tree, name: str) -> Tree:
        return {leaf: value for leaf, value in values.items() if f".{name}." in leaf}

    def examples(self, client: str) -> Sequence[Any]:
        return [each for each in self.model.encode_all(self.data[client], 48) if each is not None]

    def descend(self, client: str, round: int, trains: Tree, beside: Tree, change: Change = lambda g, v: g) -> Tree:
        """STEPS steps of SGD on `trains`."""
        examples, values = self.examples(client), dict(trains)
        ctx = RoundContext(round, self.made.key, 3, 3, self.made.rounds, client=client)
        for micro in self.made.work.plan(len(examples), ctx):
            stack = {name: leaf[None].clone().requires_grad_() for name, leaf in values.items()}
            others = {name: leaf[None] for name, leaf in beside.items()}
            batch = collate([[examples[at] for at in micro[0]]])
            (loss,) = self.model.losses({**others, **stack}, batch)
            grads = dict(zip(stack, (g[0] for g in torch.autograd.grad(loss, list(stack.values()))), strict=True))
            values = tree.add(values, change(grads, values), -LR)
        return values


def mean(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    shares = weights or [1.0] * len(trees)
    return {
        name: sum((w * each[name] for w, each in zip(shares, trees, strict=True)), torch.zeros(())) / sum(shares)
        for name in trees[0]
    }


def renamed(values: Tree, old: str, new: str) -> Tree:
    return {name.replace(f".{old}.", f".{new}."): leaf for name, leaf in values.items()}


def outcome(made: Experiment, result: Result) -> tuple[Tree, dict[str, Tree]]:
    """The server's parameters, and what each client has of its own."""
    state = Checkpoints(result.folder / "checkpoints", 9).load(made.rounds)
    assert state is not None
    start = load(made.task).initial_params(made.key)
    return state.params, personal_leaves(made, Folder(result.folder), state, {**start, **state.params})


def near(found: Mapping[str, torch.Tensor], expected: Tree) -> None:
    assert expected
    for name, leaf in expected.items():
        error = float((found[name] - leaf).abs().max())
        assert error < 1e-9, (name, error)
    assert any(float(leaf.abs().max()) > 1e-3 for name, leaf in expected.items() if name.endswith("lora_B"))


def test_ditto_pulls_towards_what_was_sent(data: Path, tmp_path: Path) -> None:
    made = experiment({"ditto": {"lam": 0.7}}, data)
    paper = Paper(made)
    shared, own = paper.branch(paper.start, "shared"), dict.fromkeys(CLIENTS, paper.branch(paper.start, "personal"))
    for round in range(3):
        anchor, new = renamed(shared, "shared", "personal"), []
        for client in CLIENTS:
            pull = lambda g, v, to=anchor: {n: leaf + 0.7 * (v[n] - to[n]) for n, leaf in g.items()}  # noqa: E731
            own[client] = paper.descend(client, round, own[client], {}, pull)
            new.append(paper.descend(client, round, shared, {}))
        shared = mean(new, list(map(float, SIZES.values())))
    params, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    near(params, shared)
    for client in CLIENTS:
        near(kept[client], own[client])


def test_ditto_without_a_pull_is_fedit_beside_local_training(data: Path, tmp_path: Path) -> None:
    made = experiment({"ditto": {"lam": 0.0}}, data)
    params, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "ditto"))
    plain = spec(data, evaluation__metrics=[], evaluation__every=None, task__dtype="float64")
    fedit = fedllm.run(fedllm.build(plain), engine=Serial(), out=tmp_path / "fedit")
    paper = Paper(made)
    assert tree.equal(renamed(paper.branch(params, "shared"), "x", "x"), {
        name.replace(".lora_", ".shared.lora_"): leaf for name, leaf in fedit.params.items()
    })  # fmt: skip
    alone = paper.branch(paper.start, "personal")
    for round in range(3):
        alone = paper.descend("ann", round, alone, {})
    near(kept["ann"], alone)


def test_feddpa_trains_the_shared_branch_alone_and_then_its_own_beside_it(data: Path, tmp_path: Path) -> None:
    """The order of the paper: the personal branch sees the client's freshly trained shared one, each at a half."""
    made = experiment("feddpa_t", data)
    paper = Paper(made)
    shared, own = paper.branch(paper.start, "shared"), dict.fromkeys(CLIENTS, paper.branch(paper.start, "personal"))
    for round in range(3):
        new = {client: paper.descend(client, round, shared, {}) for client in CLIENTS}
        own = {client: paper.descend(client, round, own[client], new[client]) for client in CLIENTS}
        last, shared = shared, mean([*new.values()])
    params, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    near(params, shared)
    for client in CLIENTS:
        near({name: leaf for name, leaf in kept[client].items() if name != REFERENCE}, own[client])
        assert 0 < float(kept[client][REFERENCE].norm()) <= 1 + 1e-6, "a mean of directions"
    assert not tree.equal(last, shared)


def test_feddpa_f_tunes_a_copy_of_the_result(data: Path, tmp_path: Path) -> None:
    made = experiment("feddpa_f", data)
    paper = Paper(made)
    shared = paper.branch(paper.start, "shared")
    for round in range(2):
        shared = mean([paper.descend(client, round, shared, {}) for client in CLIENTS])
    copy = renamed(shared, "shared", "personal")
    params, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    near(params, shared)
    for client in CLIENTS:
        near(kept[client], paper.descend(client, 2, copy, {}))


def test_fedalt_leaves_the_client_itself_out(data: Path, tmp_path: Path) -> None:
    """The rest of the world is the mean over the two others, made explicitly; the own branch is never overwritten."""
    made = experiment("fedalt", data)
    paper = Paper(made)
    first = {name: leaf for name, leaf in paper.start.items() if ".shared." not in name}
    own, rest = (
        dict.fromkeys(CLIENTS, first),
        dict.fromkeys(CLIENTS, tree.zeros_like(paper.branch(paper.start, "shared"))),
    )
    for round in range(3):
        own = {client: paper.descend(client, round, own[client], rest[client]) for client in CLIENTS}
        sent = {client: renamed(paper.branch(own[client], "personal"), "personal", "shared") for client in CLIENTS}
        rest = {client: mean([sent[k] for k in CLIENTS if k != client]) for client in CLIENTS}
    params, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    for client in CLIENTS:
        near(kept[client], {**own[client], **rest[client]})
    everybody = mean([paper.branch(own[k], "personal") for k in CLIENTS])
    near(params, renamed(everybody, "personal", "shared"))


def test_fedalt_of_one_client_has_no_rest_and_absent_ones_count_with_their_latest(data: Path, tmp_path: Path) -> None:
    made = experiment("fedalt", data, rounds=2)
    lost = tuple(ClientOutage(client, round) for client, round in (("ben", 0), ("cid", 0), ("ann", 1)))
    assert isinstance(made.federation, Shards)
    made = replace(made, federation=replace(made.federation, failures=lost))
    _, kept = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    own = {
        client: {n: leaf for n, leaf in kept[client].items() if ".personal." in n}
        for client in CLIENTS
        if client in kept
    }
    wanted = renamed(mean([own["ann"], own["cid"]]), "personal", "shared")
    near({name: kept["ben"][name] for name in wanted}, wanted)


def test_fdlora_begins_with_the_mean_copies_and_mixes_at_the_end(data: Path, tmp_path: Path) -> None:
    made = experiment({"fdlora": {"every": 2}}, data, rounds=5)
    paper = Paper(made)
    shared, own = paper.branch(paper.start, "shared"), paper.branch(paper.start, "personal")
    kept = {client: paper.descend(client, 0, own, {}) for client in CLIENTS}
    shared, momentum = renamed(mean([*kept.values()]), "personal", "shared"), tree.zeros_like(shared)
    for round in (1, 2, 3):
        new = {client: paper.descend(client, round, shared, {}) for client in CLIENTS}
        if round == 2:
            kept = {client: renamed(new[client], "shared", "personal") for client in CLIENTS}
        step = tree.sub(mean([*new.values()]), shared)
        momentum = tree.add(step, momentum, 0.5)  # in PyTorch's form
        shared = tree.add(shared, tree.add(step, momentum, 0.5))
    params, found = outcome(made, fedllm.run(made, engine=Serial(), out=tmp_path / "run"))
    near(params, shared)
    fixed = load(
        Task(
            "tiny-llama",
            adapter=MultiLora(rank=2, alpha=4, targets=("q_proj", "v_proj"), mixer="fused"),
            dtype="float64",
        )
    )
    for client in CLIENTS:
        near({n: leaf for n, leaf in found[client].items() if n != FACTORS}, kept[client])
        factors = found[client][FACTORS]
        assert factors.abs().max() <= 1.5 and factors.any()

        def loss(w: tuple[float, float], client: str = client) -> float:
            given = {**shared, **kept[client], FACTORS: torch.tensor(w, dtype=torch.float64)}
            batch = collate([paper.examples(client)[:8]])
            value = fixed.losses({n: leaf[None] for n, leaf in given.items()}, batch)
            return float(value) + 0.05 * (abs(w[0]) + abs(w[1])) / 2

        best = loss((float(factors[0]), float(factors[1])))
        assert best <= min(loss((1.0, 0.0)), loss((0.0, 1.0)), loss((0.5, 0.5))) + 1e-9


def test_the_search_finds_the_least_of_a_bowl() -> None:
    """(w_1 - 0.625)^2 + 2 (w_2 + 0.25)^2, whose least is on the last grid but for the penalty's pull."""

    def bowl(w: torch.Tensor) -> torch.Tensor:
        return 40 * ((w[:, 0] - 0.625) ** 2 + 2 * (w[:, 1] + 0.25) ** 2)

    assert search(bowl) == (0.625, -0.25)
    assert search(lambda w: -w[:, 0])[0] == 1.5, "no further than the reach"


@pytest.mark.parametrize("method", METHODS)
def test_resumed_from_any_round_it_is_the_same_to_the_bit(method: str, data: Path, tmp_path: Path) -> None:
    made = experiment(method, data)
    whole = fedllm.run(made, engine=Serial(), out=tmp_path / "whole")
    assert adapter_hash(in_pieces(made, tmp_path / "pieces").folder) == adapter_hash(whole.folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_stack_is_its_clients_one_by_one(method: str, data: Path, tmp_path: Path) -> None:
    made = experiment(method, data, rounds=2 if method != "fdlora" else 3)
    (one, ours), (two, theirs) = (
        outcome(made, fedllm.run(made, engine=engine, out=tmp_path / name))
        for name, engine in (("serial", Serial()), ("batched", Batched(stack=3, workers=1)))
    )
    for left, right in ((one, two), *((ours[client], theirs[client]) for client in CLIENTS)):
        for name, leaf in left.items():
            assert float((leaf - right[name]).abs().max()) < 1e-9, name


def test_patterns_of_phases_must_fit(data: Path) -> None:
    made = experiment("fedalt", data, task__scope={"phases": [{"train": ["*.nobody.*"]}]})
    with pytest.raises(CheckError, match=r"task.scope.phases\[0\].train: '\*.nobody.\*' fits no tensor"):
        load(made.task).initial_params(made.key)
    with pytest.raises(ConfigError, match="in which nothing trains"):
        experiment("fedalt", data, task__scope={"phases": [{"train": []}]})
