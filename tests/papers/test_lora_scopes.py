"""FFA-LoRA, RoLoRA and FedSA-LoRA: which factor trains, which is sent, and what the mean of products then is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError
from fedllm.experiment.record import Experiment, Limits
from fedllm.messages.update import Update
from fedllm.models.task import Scope
from fedllm.runs import launch
from fedllm.runs.checkpoints import Checkpoints
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.client_drift.scaffold import Scaffold
from fedllm.stages.compression.top_k import TopK
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.training.base import Work
from tests.engines.cohort import ADAMW, CLIENTS, SGD, SIZES, Watched, experiment, in_pieces, write_records

SCOPES = {
    "fedit": Scope(),
    "ffa_lora": Scope(freeze=("*lora_A",)),
    "rolora": Scope(alternate=("*lora_B", "*lora_A")),
    "fedsa_lora": Scope(share=("*lora_A",)),
}
ROUNDS = 4
Sent = Mapping[int, Mapping[str, Tree]]  # by round and client: what it sent, as it trained it


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "people.jsonl")


def made(data: Path, scope: Scope, work: Work = ADAMW, stages: tuple[Stage, ...] = (ByExamples(),)) -> Experiment:
    federation = Shards(str(data), partition=By("who"), heldout=0.0)
    settings = {"rounds": ROUNDS, "limits": Limits(keep_last=9), "federation": federation}
    plain = experiment(data, work=work, stages=stages, **settings)
    return replace(plain, task=replace(plain.task, scope=scope))


def course(exp: Experiment, out: Path, engine: Serial | Batched | None = None) -> tuple[list[Tree], Sent]:
    """The server's parameters after 0, 1, ... rounds, and what each client sent in each."""
    watched = Watched(engine or Serial())
    launch.run(exp, engine=watched, out=out)
    sent: dict[int, dict[str, Tree]] = {}
    for (name, round, client), reply in watched.sent.items():
        assert name == "work" and isinstance(reply, Update)
        part = reply.parts["delta"]
        assert part.weight == SIZES[client]
        sent.setdefault(round, {})[client] = tree.divide(part.tree, part.weight)
    saved = Checkpoints(out / "checkpoints", 9)
    return [run.params for n in range(ROUNDS + 1) if (run := saved.load(n)) is not None], sent


def bias(before: Tree, frozen: Tree, sent: Mapping[str, Tree]) -> float:
    """||mean(B A) - mean(B) mean(A)|| over ||mean(B A)||, of all layers together, written out."""
    start = {**frozen, **before}
    total = sum(SIZES.values())
    layers = [name.removesuffix("lora_A") for name in start if name.endswith("lora_A")]
    off, whole = 0.0, 0.0
    for layer in layers:
        factors = [
            (
                start[layer + "lora_B"] + deltas.get(layer + "lora_B", 0),
                start[layer + "lora_A"] + deltas.get(layer + "lora_A", 0),
            )
            for deltas in sent.values()
        ]
        shares = [SIZES[client] / total for client in sent]
        ideal = sum(share * b @ a for share, (b, a) in zip(shares, factors, strict=True))
        mean_b = sum(share * b for share, (b, _) in zip(shares, factors, strict=True))
        mean_a = sum(share * a for share, (_, a) in zip(shares, factors, strict=True))
        off += float((ideal - mean_b @ mean_a).square().sum())
        whole += float(ideal.square().sum())
    return (off / whole) ** 0.5


def fresh(exp: Experiment) -> Tree:
    from fedllm.models.loaded_model import load

    model = load(exp.task)
    return {**model.with_constants(exp.key).constants, **model.initial_params(exp.key)}


@pytest.mark.parametrize("name", ["fedit", "ffa_lora", "rolora"])
def test_the_mean_of_products_is_the_product_of_means_where_one_factor_moves(
    name: str, data: Path, tmp_path: Path
) -> None:
    exp = made(data, SCOPES[name])
    params, sent = course(exp, tmp_path / "run")
    found = [bias(params[round], fresh(exp), sent[round]) for round in range(ROUNDS)]
    if name == "fedit":
        assert all(one > 1e-3 for one in found), found
    else:
        assert all(one < 1e-12 for one in found), found


def kinds(leaves: Mapping[str, torch.Tensor]) -> set[str]:
    return {name.rpartition(".")[2] for name in leaves}


def test_rolora_sends_one_factor_in_turn_and_moves_both(data: Path, tmp_path: Path) -> None:
    params, sent = course(made(data, SCOPES["rolora"], replace(ADAMW, weight_decay=0.1)), tmp_path / "run")
    for round, replies in sent.items():
        moving, still = ("lora_B", "lora_A") if round % 2 == 0 else ("lora_A", "lora_B")
        assert all(kinds(deltas) == {moving} for deltas in replies.values()), round
        before, after = params[round], params[round + 1]
        assert all(torch.equal(after[name], leaf) for name, leaf in before.items() if name.endswith(still))
        assert all(not torch.equal(after[name], leaf) for name, leaf in before.items() if name.endswith(moving))


def test_rolora_is_the_textbook_loop(data: Path, tmp_path: Path) -> None:
    """The round of the second factor, written out: plain descent on A alone, at the server's B."""
    from fedllm.models.batch import collate
    from fedllm.models.loaded_model import load

    exp = made(data, SCOPES["rolora"], replace(SGD, momentum=0.0))
    params, sent = course(exp, tmp_path / "run")
    model, train = load(exp.task), exp.federation.load(exp.key).train
    for client in CLIENTS:
        examples = [e for record in train[client] if (e := model.encode(record, 48)) is not None]
        from fedllm.messages.context import RoundContext

        ctx = RoundContext(1, exp.key, len(CLIENTS), len(CLIENTS), ROUNDS, client, CLIENTS.index(client))
        b = {name: leaf for name, leaf in params[1].items() if name.endswith("lora_B")}
        a = {name: leaf.clone() for name, leaf in params[1].items() if name.endswith("lora_A")}
        for (chosen,) in exp.work.plan(len(examples), ctx):
            leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in a.items()}
            held = {name: leaf[None] for name, leaf in b.items()}
            loss = model.losses({**held, **leaves}, collate([[examples[index] for index in chosen]])).sum()
            for name, grad in zip(a, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                a[name] = a[name] - 0.05 * grad[0]
        moved = {name: leaf - params[1][name] for name, leaf in a.items()}
        assert tree.norm(tree.sub(moved, dict(sent[1][client]))) < 1e-12 * tree.norm(moved)


def test_ffa_lora_has_one_a_and_never_sends_it(data: Path, tmp_path: Path) -> None:
    exp = made(data, SCOPES["ffa_lora"])
    params, sent = course(exp, tmp_path / "run")
    assert all(kinds(leaves) == {"lora_B"} for leaves in [*params, *(d for r in sent.values() for d in r.values())])
    out = sum(leaf.shape[0] for leaf in params[0].values())
    assert tree.num_values(sent[0]["ann"]) == 4 * out, "rank times the sum of the layers' outputs"


def test_fedsa_lora_never_sends_b_which_differs_between_clients(data: Path, tmp_path: Path) -> None:
    from fedllm.runs.artifacts import personal_leaves
    from fedllm.runs.folder import Folder

    exp = made(data, SCOPES["fedsa_lora"])
    params, sent = course(exp, tmp_path / "run")
    assert all(kinds(leaves) == {"lora_A"} for leaves in [*params, *(d for r in sent.values() for d in r.values())])
    state = Checkpoints(tmp_path / "run" / "checkpoints", 9).load(ROUNDS)
    assert state is not None
    own = personal_leaves(exp, Folder(tmp_path / "run"), state, state.params)
    assert kinds(own["ann"]) == {"lora_B"} and not tree.equal(dict(own["ann"]), dict(own["ben"]))


STAGES = (Momentum(beta=0.5), Scaffold(("adamw",)), Prox(0.1), TopK(0.3), Uniform())


@pytest.mark.parametrize("name", SCOPES)
def test_with_many_stages_stacks_give_the_same_and_a_run_resumes(name: str, data: Path, tmp_path: Path) -> None:
    """To the bit from every round; without them, and with Ray: tests/papers/test_presets_everywhere.py."""
    exp = made(data, SCOPES[name], stages=STAGES)
    serial = launch.run(exp, engine=Serial(), out=tmp_path / "serial").params
    batched = launch.run(exp, engine=Batched(stack=3), out=tmp_path / "batched").params
    moved = tree.norm(tree.sub(dict(serial), {name: fresh(exp)[name] for name in serial}))
    assert tree.norm(tree.sub(dict(batched), dict(serial))) < 1e-9 * moved
    assert tree.equal(dict(in_pieces(exp, tmp_path / "cut").params), dict(serial))


def test_turns_that_cannot_be_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task.scope.alternate holds one pattern; give two or more"):
        Scope(alternate=("*lora_A",))
    with pytest.raises(CheckError, match=r"task.scope.alternate: '\*lora_C' fits no tensor"):
        launch.run(made(data, Scope(alternate=("*lora_A", "*lora_C"))), out=tmp_path / "a")
    turns = Scope(train=("*lora_A",), alternate=("*lora_A", "*lora_B"))
    with pytest.raises(
        CheckError, match=r"task.scope.alternate: nothing trains in the turn of '\*lora_B'; leave it out"
    ):
        launch.run(made(data, turns), out=tmp_path / "b")
