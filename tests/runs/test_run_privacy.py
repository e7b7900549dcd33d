"""Private runs: what is spent is counted once, never given back, and can be computed again from privacy.json alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dp_accounting
import dp_accounting.pld
import pytest

import fedllm
from fedllm.engines.base import Engine
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, RunError
from fedllm.events import Evaluated, PrivacyPromised, PrivacySpent, RoundFinished
from fedllm.experiment.checks.privacy import check_privacy
from fedllm.experiment.record import Experiment
from fedllm.files import remove_folder
from fedllm.messages.update import Update
from fedllm.privacy.releases import Release
from fedllm.privacy.schemes import EveryRound
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.privacy_ledger import PrivacyLedger
from fedllm.tensors import tree
from tests.runs.small import SIZES, Spy, adapter_hash, events, small, spec

MEAN: dict[str, Any] = {"uniform": {"denominator": "expected"}}
SILENT: dict[str, Any] = {"metrics": []}


def private(data: Path, stage: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    return small(data, **settings(stage, **changes))


def settings(stage: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    given = stage or {"gaussian_dp": {"clip": 0.1, "noise_multiplier": 2.0}}
    return {"stages": [MEAN, given], "evaluation": SILENT, **changes}


def statement(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "privacy.json").read_text())


def recomputed(folder: Path) -> float:
    """Epsilon by dp-accounting from the statement alone."""
    told, event = statement(folder), dp_accounting
    relation = {"add-remove": "ADD_OR_REMOVE_ONE", "replace-one": "REPLACE_ONE"}[told["relation"]]
    accountant = dp_accounting.pld.PLDAccountant(getattr(dp_accounting.NeighboringRelation, relation))
    for row in told["ledger"]:
        one = event.GaussianDpEvent(row["noise_multiplier"])
        if row["scheme"]["scheme"] == "poisson":
            one = event.PoissonSampledDpEvent(row["scheme"]["rate"], one)
        accountant.compose(event.SelfComposedDpEvent(one, row["count"] * row["steps"]))
    return float(accountant.get_epsilon(told["delta"]))


@contextmanager
def dying_before_checkpoint(number: int) -> Iterator[None]:
    """A run in here stops before this checkpoint is on the disk, behind the releases of its round."""
    save = Checkpoints.save

    def stopping(checkpoints: Checkpoints, run: Any) -> None:
        if run.round == number:
            raise KeyboardInterrupt
        save(checkpoints, run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            yield


RUNS = {
    "gaussian_dp": ({"gaussian_dp": {"clip": 0.1, "noise_multiplier": 2.0}}, {}),
    "poisson": (
        {"gaussian_dp": {"clip": 0.1, "noise_multiplier": 1.0}},
        {"federation__shards__sampling": {"poisson": 0.4}},
    ),
    "dp_ftrl": (
        {"dp_ftrl": {"clip": 0.1, "noise_multiplier": 1.0, "separation": 3}},
        {"federation__shards__sampling": {"rotation": 1}},
    ),
    "local_gaussian": ({"local_gaussian": {"clip": 0.1, "noise_multiplier": 3.0}}, {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_epsilon_follows_from_the_statement_alone(data: Path, tmp_path: Path, name: str) -> None:
    stage, changes = RUNS[name]
    result = fedllm.run(private(data, stage, **changes), engine="serial", out=tmp_path / "run")
    told = statement(result.folder)
    assert result.summary["epsilon"] == told["epsilon"]
    assert recomputed(result.folder) == pytest.approx(told["epsilon"], abs=0.02)
    assert (told["unit"], told["noise"], told["figures_in_the_clear"]) == ("client", "secret", False)
    spent = [event.epsilon for event in events(result.folder) if isinstance(event, PrivacySpent)]
    assert len(spent) == 3 and spent == sorted(spent) and spent[-1] == told["epsilon"]
    assert not list(result.folder.rglob("*.key")), "the keys are gone with the run"
    assert not [event for event in events(result.folder) if isinstance(event, Evaluated)]
    assert all(event.loss is None for event in events(result.folder) if isinstance(event, RoundFinished))


def test_nothing_but_bounded_values_leaves_a_client(data: Path, tmp_path: Path) -> None:
    spy = Spy()
    fedllm.run(private(data), engine=spy, out=tmp_path / "run")
    assert len(spy.answered) == 9
    for _, _, reply in spy.answered:
        assert isinstance(reply, Update) and reply.parts.keys() == {"delta"}
        assert tree.norm(reply.parts["delta"].tree) <= 0.1 * (1 + 1e-6)


def test_with_no_noise_and_a_large_clip_it_is_fedavg_to_the_bit(data: Path, tmp_path: Path) -> None:
    plain = fedllm.run(small(data, stages=[MEAN], evaluation=SILENT), out=tmp_path / "plain")
    clipped = private(data, {"gaussian_dp": {"clip": 1e9, "noise_multiplier": 0.0}})
    result = fedllm.run(clipped, out=tmp_path / "clipped")
    assert tree.equal(plain.params, result.params)
    assert result.summary["epsilon"] is None and statement(result.folder)["epsilon"] is None


def test_engines_release_the_same_where_noise_is_seeded(data: Path, tmp_path: Path) -> None:
    seeded = {"demands": {"privacy": {"seeded_noise": True}}}
    for name, stage in (("gaussian_dp", None), ("local", {"local_gaussian": {"clip": 0.1, "noise_multiplier": 2.0}})):
        hashes = {
            adapter_hash(fedllm.run(private(data, stage, **seeded), engine=engine, out=tmp_path / f"{name}{n}").folder)
            for n, engine in enumerate(("serial", "{batched: {stack: 1}}", "{batched: {stack: 1, workers: 1}}"))
        }
        assert len(hashes) == 1
        assert statement(tmp_path / f"{name}0")["noise"] == "seeded"
    secret = {adapter_hash(fedllm.run(private(data), engine="serial", out=tmp_path / f"s{n}").folder) for n in "12"}
    assert len(secret) == 2, "secret noise is never the same"


@pytest.fixture(scope="module")
def killed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `privacy_kills.py` saw."""
    folder = tmp_path_factory.mktemp("killed")
    (folder / "spec.json").write_text(json.dumps(spec(data, **settings())))
    command = [sys.executable, "-m", "tests.runs.privacy_kills", str(folder / "spec.json"), str(folder)]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_killed_around_a_release_it_is_made_and_counted_once(killed: dict[str, Any]) -> None:
    whole = killed.pop("whole")
    for name, seen in killed.items():
        assert (seen["signal"], seen["resumed"]) == (9, 0), name
        assert [round for round, _ in seen["journal"]] == [0, 1, 2], f"{name}: a release was drawn twice, or lost"
        assert seen["epsilon"] == whole["epsilon"] and not seen["keys"], name


def test_another_sum_in_a_round_that_is_run_again_counts_again(data: Path, tmp_path: Path) -> None:
    """The first time a client is lost in round 2; the process dies; the second time it answers."""
    whole = fedllm.run(private(data), engine="serial", out=tmp_path / "whole")

    @dataclass(frozen=True)
    class Dying(Serial):
        lost: bool = True

        @contextmanager
        def open(self, experiment: Experiment, folder: Path | None, emit: Any) -> Iterator[Any]:
            with Serial.open(self, experiment, folder, emit) as call:

                def dropping(name: str, requests: Any) -> Any:
                    for client, reply in call(name, requests):
                        if requests[client].ctx.round == 1 and client == "ben" and self.lost:
                            continue
                        yield client, reply

                yield dropping

    with dying_before_checkpoint(2):
        fedllm.run(private(data), engine=Dying(), out=tmp_path / "run")
    resumed = fedllm.run(private(data), engine=Dying(lost=False), out=tmp_path / "run", resume=True)
    rounds = [json.loads(line)["round"] for line in (resumed.folder / "privacy.jsonl").read_text().splitlines()]
    assert rounds == [0, 1, 1, 2]
    assert resumed.summary["epsilon"] > whole.summary["epsilon"] + 0.1


def test_an_older_checkpoint_gives_nothing_back(data: Path, tmp_path: Path) -> None:
    """Rounds that are run again from an older checkpoint, after the keys are gone, are spent once more."""
    out = tmp_path / "run"
    first = fedllm.run(private(data), engine="serial", out=out)
    (out / "summary.json").unlink()
    remove_folder(out / "checkpoints" / "round-000003")
    again = fedllm.run(private(data), engine="serial", out=out, resume=True)
    assert again.summary["epsilon"] > first.summary["epsilon"] + 0.1
    (out / "privacy.jsonl").unlink()
    (out / "summary.json").unlink()
    kept = fedllm.run(private(data), engine="serial", out=out, resume=True)
    assert kept.summary["epsilon"] == again.summary["epsilon"], "the checkpoint knows, too"


def test_a_budget_sets_the_noise_and_ends_the_run(data: Path, tmp_path: Path) -> None:
    asked = {"demands": {"privacy": {"target_epsilon": 4.0, "target_delta": 1e-6}}}
    met = fedllm.run(private(data, {"gaussian_dp": 0.1}, **asked), engine="serial", out=tmp_path / "met")
    assert 3.96 <= met.summary["epsilon"] <= 4.0 and met.summary["rounds"] == 3
    given = {"gaussian_dp": {"clip": 0.1, "noise_multiplier": 2.0}}
    short = fedllm.run(private(data, given, **asked), engine="serial", out=tmp_path / "short")
    assert short.summary["rounds"] == 2 and short.summary["epsilon"] <= 4.0
    (ended,) = [event for event in events(short.folder) if type(event).__name__ == "RunFinished"]
    assert "the next round would bring epsilon to" in ended.note and "target_epsilon 4" in ended.note
    more = replace(private(data, given, **asked), rounds=5)
    with pytest.raises(CheckError, match=r"would bring epsilon to .*; raise it, or do not go on from"):
        fedllm.run(more, engine="serial", continues=short.folder, out=tmp_path / "more")


def test_a_damaged_journal_is_told(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fedllm.run(private(data), engine="serial", out=out)
    (out / "summary.json").unlink()
    path = out / "privacy.jsonl"
    path.write_text(path.read_text().replace("{", "", 1))
    with pytest.raises(RunError, match=r"privacy\.jsonl, line 1 is damaged, so nobody knows what was spent"):
        fedllm.run(private(data), engine="serial", out=out, resume=True)


def test_public_draws_are_refused_where_clients_are_real(data: Path, tmp_path: Path) -> None:
    class Deployed(Serial):
        @property
        def simulates(self) -> bool:
            return False

    assert Engine().simulates
    poisson = private(data, federation__shards__sampling={"poisson": 0.5})
    with pytest.raises(CheckError, match=r"drawn from the run's public seed, .* use sampling all or rotation"):
        fedllm.run(poisson, engine=Deployed(), out=tmp_path / "run")
    seeded = private(data, demands={"privacy": {"seeded_noise": True}})
    with pytest.raises(CheckError, match="seeded_noise draws noise that anybody can subtract"):
        fedllm.run(seeded, engine=Deployed(), out=tmp_path / "run")
    assert fedllm.run(private(data), engine=Deployed(), out=tmp_path / "run").summary["epsilon"] > 0


def test_noise_of_clients_is_counted_by_client(data: Path, tmp_path: Path) -> None:
    stage = {"local_gaussian": {"clip": 0.1, "noise_multiplier": 2.0}}
    drawn = private(data, stage, federation__shards__sampling={"uniform": 1}, rounds=4)
    result = fedllm.run(drawn, engine="serial", out=tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / "privacy.jsonl").read_text().splitlines()]
    parts = {who: sum(who in entry["clients"] for line in lines for entry in line["releases"]) for who in SIZES}
    told = statement(result.folder)
    assert told["ledger"][0]["count"] == max(parts.values()) < 4 == sum(parts.values())
    assert parts[told["of_client"]] == max(parts.values())


def test_baselines_of_dp_sgd_are_noised_like_its_clients(data: Path, tmp_path: Path) -> None:
    work = {"dp_sgd": {"lr": 0.1, "steps": 2, "batch_size": 2, "max_length": 48, "clip": 1.0, "noise_multiplier": 1.0}}
    seen = {"metrics": ["nll"], "private": False, "compare": ["local_only", "centralised"], "limit": 2}
    result = fedllm.run(
        small(data, work=work, stages=["uniform"], evaluation=seen), engine="serial", out=tmp_path / "r"
    )
    assert all(result.summary["eval"][which]["nll"] > 0 for which in ("federated", "local_only", "centralised"))
    told = statement(result.folder)
    assert told["unit"] == "example" and told["epsilon"] == pytest.approx(recomputed(result.folder), abs=0.02)


PLAIN: dict[str, Any] = {"stages": [MEAN], "evaluation": SILENT}
NO_NOISE = settings({"gaussian_dp": {"clip": 0.1, "noise_multiplier": 0.0}})
FTRL = settings({"dp_ftrl": {"clip": 0.1, "noise_multiplier": 2.0}})
OPEN = settings(evaluation={"metrics": [], "private": False})
LOUDER = settings({"dp_ftrl": {"clip": 0.1, "noise_multiplier": 3.0}})
EXAMPLES: dict[str, Any] = {
    "stages": ["uniform"],
    "evaluation": SILENT,
    "work": {"dp_sgd": {"lr": 0.1, "steps": 1, "batch_size": 1, "max_length": 48, "noise_multiplier": 1.0}},
}


@pytest.mark.parametrize(
    ("first", "then", "reason"),
    [
        (PLAIN, settings(), "its rounds had no noise, so that no epsilon holds for what they came to"),
        (NO_NOISE, settings(), "its rounds had no noise"),
        (EXAMPLES, settings(), "its rounds had the noise of dp_sgd, which is counted otherwise"),
        (FTRL, FTRL, "its noise was made for a run without this change: rounds: 1 there, 2 here"),
        (FTRL, {**LOUDER, "rounds": 2}, "its noise was made for a run without this change"),
        (settings(), settings(federation__shards__heldout=0.5), "a client holds other records after this change"),
        (OPEN, settings(), r"its figures were in the clear \(evaluation.private: false\)"),
    ],
)
def test_rounds_that_a_ledger_cannot_count_are_not_gone_on_from(
    data: Path, tmp_path: Path, first: dict[str, Any], then: dict[str, Any], reason: str
) -> None:
    """Otherwise epsilon would be that of the new rounds alone, or of less noise than the old ones had."""
    old = fedllm.run(small(data, **{"rounds": 1, **first}), engine="serial", out=tmp_path / "old")
    with pytest.raises(RunError, match=f"--continue: .*{reason}"):
        fedllm.run(small(data, **{"rounds": 2, **then}), engine="serial", continues=old.folder, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_who_takes_part_may_change_and_the_old_rounds_stay_spent(data: Path, tmp_path: Path) -> None:
    old = fedllm.run(private(data, rounds=1), engine="serial", out=tmp_path / "old")
    lost = {"round": 0, "mark": "lost with a process", "stage": "gaussian_dp", "releases": [
        {"kind": "gaussian", "noise_multiplier": 2.0, "scheme": {"scheme": "every_round"}, "steps": 1}]}  # fmt: skip
    with (old.folder / "privacy.jsonl").open("a") as journal:
        journal.write(json.dumps(lost) + "\n")
    more = private(data, rounds=2, federation__shards__sampling={"poisson": 0.5})
    new = fedllm.run(more, engine="serial", continues=old.folder, out=tmp_path / "new")
    schemes = [
        (row["scheme"]["scheme"], row["count"], row["noise_multiplier"]) for row in statement(new.folder)["ledger"]
    ]
    (promise,) = [event for event in events(new.folder) if isinstance(event, PrivacyPromised)]
    assert promise.epsilon == pytest.approx(new.summary["epsilon"]), "the promise has the old rounds in it"
    # the first round was made twice with one cohort: one release of noise 2 / sqrt(2) in effect
    assert sorted(schemes) == [("every_round", 1, pytest.approx(2**0.5)), ("poisson", 1, 2.0)]


def test_records_that_are_not_used_do_not_make_the_rate_smaller(tmp_path: Path) -> None:
    """Of four records one has no target token in 48: each step takes each of three with 1/3, not 1/4."""
    rows = [{"prompt": f"{number}?", "response": "yes", "who": "ann"} for number in range(3)]
    rows.append({"prompt": "long " * 60, "response": "yes", "who": "ann"})
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = fedllm.run(small(path, **EXAMPLES), engine="serial", out=tmp_path / "run")
    (row,) = statement(result.folder)["ledger"]
    assert row["scheme"] == {"scheme": "poisson", "rate": pytest.approx(1 / 3)}


def test_nobody_else_reads_the_sums_of_a_private_run_and_keys_end_with_a_run_that_fails(
    data: Path, tmp_path: Path
) -> None:
    failing = private(data, federation__shards__failure_rate=1.0)
    with pytest.raises(RunError, match="no round of 3 had an answer"):
        fedllm.run(failing, engine="serial", out=tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.key"))
    assert (tmp_path / "run" / "checkpoints").stat().st_mode & 0o077 == 0


def test_a_line_of_the_journal_that_is_no_release_is_told(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fedllm.run(private(data, rounds=1), engine="serial", out=out)
    (out / "summary.json").unlink()
    with (out / "privacy.jsonl").open("a") as journal:
        journal.write("{}\n")
    with pytest.raises(RunError, match=r"privacy\.jsonl, line 2 is damaged, so nobody knows what was spent"):
        fedllm.run(private(data, rounds=1), engine="serial", out=out, resume=True)


def test_the_same_sum_with_other_noise_is_another_release_with_draws_of_its_own(data: Path, tmp_path: Path) -> None:
    """The same draws, once times 2 and once times 3, would show the sum."""
    plan = check_privacy(private(data), SIZES)
    assert plan is not None
    ledger = PrivacyLedger(plan, tmp_path)
    draws = [
        ledger.note_release(0, Release("gaussian", z, EveryRound()), "gaussian_dp", b"sum").bytes(8) for z in (2, 3)
    ]
    assert draws[0] != draws[1]
    assert sum(ledger.ledgers()[""].values()) == 2
    again = ledger.note_release(0, Release("gaussian", 2, EveryRound()), "gaussian_dp", b"sum").bytes(8)
    assert again == draws[0] and sum(ledger.ledgers()[""].values()) == 2


@pytest.mark.parametrize(("second", "count"), [("one core", 1), ("another machine", 2)])
def test_clients_that_noise_an_update_with_other_bits_have_sent_twice(
    data: Path, tmp_path: Path, second: str, count: int
) -> None:
    """A client draws fresh noise for an update that is not the same to the bit. Only where the same processor computes
    a round again is it."""
    plan = check_privacy(private(data, {"local_gaussian": {"clip": 0.1, "noise_multiplier": 2.0}}), SIZES)
    assert plan is not None
    for computed_by in ("one core", second):
        ledger = PrivacyLedger(plan, tmp_path, computed_by)
        ledger.restore()
        ledger.note_cohort(0, ["ann"], b"the same start")
    assert sum(release.steps * n for release, n in ledger.ledgers()["ann"].items()) == 1
    assert len(ledger.records) == count
    assert next(iter(ledger.ledgers()["ann"])).noise_multiplier == pytest.approx(2 / count**0.5)


@pytest.mark.parametrize("key", ["there", "gone"])
def test_a_round_that_is_lost_at_the_end_of_the_budget_is_in_the_statement(
    data: Path, tmp_path: Path, key: str
) -> None:
    """The process dies behind the last release. With its key the round is run again and costs nothing; without, its
    noise would be another one, for which no budget is left."""
    asked = private(data, {"gaussian_dp": 0.1}, demands={"privacy": {"target_epsilon": 4.0}})
    with dying_before_checkpoint(3):
        fedllm.run(asked, engine="serial", out=tmp_path / "run")
    if key == "gone":
        (tmp_path / "run" / "privacy.key").unlink()
    result = fedllm.run(asked, engine="serial", out=tmp_path / "run", resume=True)
    assert result.summary["rounds"] == (3 if key == "there" else 2)
    (row,) = statement(result.folder)["ledger"]
    assert row["count"] == 3 and 3.96 <= statement(result.folder)["epsilon"] <= 4.0
    assert result.summary["epsilon"] == statement(result.folder)["epsilon"]
