"""What a run is held against: each client alone and the pooled data, beside textbook loops."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.data.federation import Population
from fedllm.errors import RunError
from fedllm.events import Event, Progress
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.files import cache_dir
from fedllm.messages.context import RoundContext
from fedllm.models.batch import collate
from fedllm.models.loaded_model import LoadedModel, load
from fedllm.runs.baselines import CHOICE, Baselines

ROUNDS, STEPS = 3, 2


@pytest.fixture
def experiment(cache_folder: Path, tmp_path: Path) -> Experiment:
    words = ["teal", "owl", "plum", "wolf", "opal", "mint", "fern"]
    rows = [
        {"org": "a" if place < 4 else "b", "prompt": f"Word {place}?", "response": word}
        for place, word in enumerate(words)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return build(
        {
            "task": {"model": "tiny-llama", "dtype": "float64", "adapter": {"lora": {"rank": 2, "alpha": 4}}},
            "federation": {"shards": {"data": str(data), "heldout": str(data), "partition": {"by": "org"}}},
            "work": {"sgd": {"optimizer": "adamw", "lr": 1e-2, "steps": STEPS, "batch_size": 2, "max_length": 200}},
            "method": "fedavg",
            "rounds": ROUNDS,
            "seed": 3,
        }
    )


def baselines_of(experiment: Experiment, events: list[Event] | None = None) -> Baselines:
    population = experiment.federation.load(experiment.key)
    return Baselines(experiment, load(experiment.task), population, (events if events is not None else []).append)


def textbook(experiment: Experiment, clients: list[str], *, lr: float, times: int) -> float:
    """One torch loop over rounds x steps, one optimiser: the mean token loss on all held-out records."""
    model: LoadedModel = load(experiment.task)
    population, key = experiment.federation.load(experiment.key), experiment.key
    examples = [model.encode(record, 200) for client in clients for record in population.train[client]]
    leaves = {name: leaf[None].clone().requires_grad_() for name, leaf in model.initial_params(key).items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=lr, weight_decay=0.0)
    work = replace(experiment.work, accumulation=times)
    for round in range(ROUNDS):
        name = clients[0] if len(clients) == 1 else "pooled"
        ctx = RoundContext(round, key, 1, 2, ROUNDS, client=name)
        for step in work.plan(len(examples), ctx):
            chosen = [examples[index] for micro in step for index in micro]
            optimizer.zero_grad()
            model.losses(leaves, collate([chosen])).sum().backward()
            optimizer.step()
    held = [model.encode(record, 200) for records in population.heldout.values() for record in records]
    losses = torch.cat(model.sequence_nll({n: leaf.detach()[0] for n, leaf in leaves.items()}, held))
    return float(losses.mean())


def test_local_only_is_each_client_alone_with_its_optimiser_kept(experiment: Experiment) -> None:
    events: list[Event] = []
    made = baselines_of(experiment, events).local_only()
    for client in ("a", "b"):
        expected = textbook(experiment, [client], lr=1e-2, times=1)
        assert made.clients[client]["nll"] == pytest.approx(expected, rel=1e-9)
    assert made.metrics["nll"] == pytest.approx((made.clients["a"]["nll"] + made.clients["b"]["nll"]) / 2)
    assert made.clients["a"]["own/nll"] < made.clients["a"]["nll"]  # it knows its own records better
    assert made.note == "lr 0.01"
    assert [event.done for event in events if isinstance(event, Progress)] == [0, 1, 2]


@pytest.mark.parametrize("lacking", ["a", "b"])
def test_a_client_without_a_figure_is_left_out_of_its_mean(experiment: Experiment, lacking: str) -> None:
    """The first client in order, or the last, has no held-out records of its own."""
    whole = experiment.federation.load(experiment.key)
    other = "b" if lacking == "a" else "a"
    part = replace(whole, heldout={**whole.heldout, lacking: ()})
    made = Baselines(experiment, load(experiment.task), part, lambda event: None).local_only()
    assert "own/nll" not in made.clients[lacking]
    assert made.metrics["own/nll"] == made.clients[other]["own/nll"]
    assert made.metrics["nll"] == pytest.approx((made.clients["a"]["nll"] + made.clients["b"]["nll"]) / 2)
    assert made.note == "lr 0.01; of 1 of 2 clients: own/nll"


def test_a_client_that_cannot_be_trained_is_left_out(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """With groups of records that some clients have none of."""
    scores = {"a": {"nll": 3.0, "own/nll": 2.0, "own/nll/x": 1.0}, "b": {"nll": 5.0, "own/nll": 4.0}}

    def trained(self: Baselines, what: str, work: object, clients: list[str]) -> dict[str, float]:
        if clients == ["c"] or what.startswith("centralised"):
            raise RunError("its loss is nan")
        return {**scores[clients[0]], CHOICE: 0.0}

    monkeypatch.setattr(Baselines, "_cached", trained)
    monkeypatch.setattr(Population, "clients", ("a", "b", "c"))
    made = baselines_of(experiment).local_only()
    assert made.metrics == {"nll": 4.0, "own/nll": 3.0, "own/nll/x": 1.0}
    assert made.note == "lr 0.01; of 2 of 3 clients: nll, own/nll; of 1 of 3 clients: own/nll/x"
    with pytest.raises(RunError, match="its loss is nan"):
        baselines_of(experiment).centralised()


def test_centralised_is_the_pooled_data_with_batches_of_a_whole_cohort(experiment: Experiment) -> None:
    made = baselines_of(experiment).centralised()
    assert made.metrics["nll"] == pytest.approx(textbook(experiment, ["a", "b"], lr=1e-2, times=2), rel=1e-9)
    assert made.metrics["nll"] != pytest.approx(textbook(experiment, ["a", "b"], lr=1e-2, times=1), rel=1e-6)


def test_the_best_of_the_rates_is_chosen_and_named(experiment: Experiment) -> None:
    rates = (1e-5, 1e-2)
    tuned = replace(experiment, evaluation=replace(experiment.evaluation, compare_lr=rates))
    made = baselines_of(tuned).centralised()
    losses = {lr: textbook(experiment, ["a", "b"], lr=lr, times=2) for lr in rates}
    best = min(losses, key=lambda lr: losses[lr])
    assert made.note == f"lr {best:g}"
    assert made.metrics["nll"] == pytest.approx(losses[best], rel=1e-9)


def test_a_baseline_is_computed_once(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    first = baselines_of(experiment).local_only()
    monkeypatch.setattr(Baselines, "_train", lambda *_: pytest.fail("trained again"))
    other_method = replace(experiment, evaluation=replace(experiment.evaluation, every=1))
    assert baselines_of(other_method).local_only() == first  # how often a run evaluates does not matter to it
    changed = replace(experiment, work=replace(experiment.work, lr=3e-3))
    with pytest.raises(pytest.fail.Exception):
        baselines_of(changed).local_only()
    monkeypatch.setattr(LoadedModel, "backend", {"kernels": "others"})
    with pytest.raises(pytest.fail.Exception):
        baselines_of(experiment).local_only()


def test_another_content_under_the_same_name_is_made_anew(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the base model, and of what the adapter begins with."""
    baselines_of(experiment).centralised()
    monkeypatch.setattr(Baselines, "_train", lambda *_: pytest.fail("trained again"))
    baselines_of(experiment).centralised()
    model, population = load(experiment.task), experiment.federation.load(experiment.key)
    other = copy.deepcopy(model.base.model)
    with torch.no_grad():
        other.get_parameter("model.layers.1.mlp.up_proj.weight")[3, 5] += 2.0**-20
    changed = replace(model, base=replace(model.base, model=other))
    with pytest.raises(pytest.fail.Exception):
        Baselines(experiment, changed, population, lambda event: None).centralised()
    fresh = type(model.adapter).initial_params
    monkeypatch.setattr(
        type(model.adapter), "initial_params", lambda self, key: {n: leaf + 1 for n, leaf in fresh(self, key).items()}
    )
    with pytest.raises(pytest.fail.Exception):
        baselines_of(experiment).centralised()


def test_a_damaged_cache_costs_time_alone(experiment: Experiment) -> None:
    first = baselines_of(experiment).centralised()
    for path in (cache_dir() / "compare").glob("*.json"):
        path.write_text("{")
    assert baselines_of(experiment).centralised() == first


def test_base_scores_are_those_of_the_model_without_an_adapter(experiment: Experiment) -> None:
    made = baselines_of(experiment).base()
    model, population = load(experiment.task), experiment.federation.load(experiment.key)
    for client, records in population.heldout.items():
        losses = torch.cat(model.sequence_nll({}, [model.encode(record, 200) for record in records]))
        assert made.clients[client]["nll"] == pytest.approx(float(losses.mean()))
