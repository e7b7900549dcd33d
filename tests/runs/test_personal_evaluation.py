"""`evaluation.personal`, and the plain federated model as a baseline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedllm
from fedllm.engines.serial import Serial
from fedllm.evaluation.personal import spread_evenly
from fedllm.events import Evaluated, PersonalEvaluated
from fedllm.experiment.config_file import experiment_hash
from fedllm.models.loaded_model import load
from fedllm.runs.baselines import Baselines
from fedllm.runs.loaded_run import open_run
from tests.runs.small import SIZES, adapter_hash, events, small

KEEP = {"share": ["*lora_A"]}
ASKED = {"evaluation__personal": {}, "evaluation__compare": ["local_only", "fedavg"]}


@pytest.fixture(scope="module")
def plain(data: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> fedllm.Result:
    return made(data, session_cache, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def scored(data: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> fedllm.Result:
    return made(data, session_cache, tmp_path_factory.mktemp("scored"), **ASKED)


def made(data: Path, cache: Path, folder: Path, **changes: object) -> fedllm.Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLLM_CACHE", str(cache))
        experiment = small(data, rounds=2, task__scope=KEEP, evaluation__limit=None, **changes)
        return fedllm.run(experiment, engine=Serial(), out=folder / "run")


def test_it_leaves_the_run_and_the_hash_as_they_were(data: Path, plain: fedllm.Result, scored: fedllm.Result) -> None:
    assert adapter_hash(plain.folder) == adapter_hash(scored.folder)
    assert "personal" not in plain.summary
    off = small(data, evaluation__personal=None)
    assert experiment_hash(off) == experiment_hash(small(data)) != experiment_hash(small(data, evaluation__personal={}))


def test_every_model_meets_every_test_set(scored: fedllm.Result) -> None:
    (found,) = [event for event in events(scored.folder) if isinstance(event, PersonalEvaluated)]
    opened = open_run(scored.folder)
    heldout = opened.experiment.federation.load(opened.experiment.key).heldout
    assert (found.round, found.population, set(found.matrix)) == (2, 3, set(SIZES))
    length = opened.experiment.work.max_length
    for model in SIZES:
        sums, counts = {}, {}
        for who, records in heldout.items():  # a loop over records, one at a time
            rows = [
                opened.model.sequence_nll(opened.params_of(model), [example])[0].double()
                for record in records
                if (example := opened.model.encode(record, length)) is not None
            ]
            sums[who], counts[who] = sum(float(row.sum()) for row in rows), sum(len(row) for row in rows)
            assert found.matrix[model][who]["nll"] == pytest.approx(sums[who] / counts[who], rel=1e-4)
        rest = [who for who in SIZES if who != model]
        assert found.others[model]["nll"] == pytest.approx(
            sum(sums[who] for who in rest) / sum(counts[who] for who in rest), rel=1e-4
        )
        assert found.union[model]["nll"] == pytest.approx(sum(sums.values()) / sum(counts.values()), rel=1e-4)
    assert found.matrix["ann"]["ann"] != found.matrix["ben"]["ann"], "models differ"


def test_the_summary_counts_who_is_better_off(scored: fedllm.Result) -> None:
    told = json.loads((scored.folder / "summary.json").read_text())["personal"]
    by_kind = {event.which: event for event in events(scored.folder) if isinstance(event, Evaluated)}
    own = {client: scores["nll"] for client, scores in by_kind["federated"].clients.items()}
    nll = told["metrics"]["nll"]
    assert nll["own"]["mean"] == pytest.approx(sum(own.values()) / 3)
    assert nll["own"]["worst"] == max(own.values()) and own[nll["own"]["worst_client"]] == max(own.values())
    assert nll["own"]["gap"] == pytest.approx(max(own.values()) - min(own.values()))
    alone = {client: scores["own/nll"] for client, scores in by_kind["local_only"].clients.items()}
    plain = {client: scores["nll"] for client, scores in by_kind["fedavg"].clients.items()}
    assert nll["better_than"] == {
        "local_only": sum(own[client] < alone[client] for client in own) / 3,
        "fedavg": sum(own[client] < plain[client] for client in own) / 3,
    }
    assert told["clients"]["ben"]["own"]["nll"] == pytest.approx(own["ben"], rel=1e-6)


def test_the_baseline_fedavg_is_a_run_that_shares_everything(
    data: Path, scored: fedllm.Result, session_cache: Path, tmp_path: Path
) -> None:
    (found,) = [e for e in events(scored.folder) if isinstance(e, Evaluated) and e.which == "fedavg"]
    experiment = small(data, rounds=2, evaluation__limit=None)
    result = fedllm.run(experiment, engine=Serial(), out=tmp_path / "run")
    shared = [e for e in events(result.folder) if isinstance(e, Evaluated) and e.which == "federated"][-1]
    kept = [e for e in events(scored.folder) if isinstance(e, Evaluated) and e.which == "federated"][-1]
    for client in SIZES:
        assert found.clients[client]["nll"] == pytest.approx(shared.clients[client]["nll"], rel=1e-5)
        assert found.clients[client]["nll"] != pytest.approx(kept.clients[client]["nll"], rel=1e-5)
    population = experiment.federation.load(experiment.key)
    again = Baselines(open_run(scored.folder).experiment, load(experiment.task), population, lambda event: None)
    assert again.fedavg() == found, "from the cache"


def test_of_many_clients_some_spread_evenly_are_looked_at() -> None:
    everyone = [f"c{number}" for number in range(10)]
    assert spread_evenly(everyone, 3) == ("c0", "c3", "c6")
    assert spread_evenly(everyone, 10) == spread_evenly(everyone, 99) == tuple(everyone)


def test_few_of_many_are_scored_and_named_as_such(data: Path, session_cache: Path, tmp_path: Path) -> None:
    result = made(data, session_cache, tmp_path, evaluation__personal={"clients": 2})
    (found,) = [event for event in events(result.folder) if isinstance(event, PersonalEvaluated)]
    assert len(found.matrix) == 2 and all(len(row) == 2 for row in found.matrix.values()) and found.population == 3
