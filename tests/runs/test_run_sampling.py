"""Who takes part in a round, and who is lost in it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

import fedllm
from fedllm.data.sampling import All, PoissonSampling, UniformSampling
from fedllm.data.shards import ClientOutage, Shards
from fedllm.errors import ConfigError, RunError
from fedllm.events import ClientFailed, RoundFinished, RoundStarted
from fedllm.rng import Key
from fedllm.runs.checkpoints import Checkpoints
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from tests.runs.small import SIZES, Spy, events, figures, small, write_records

CLIENTS = [f"client-{number}" for number in range(10)]
DRAWS = 3000


def cohorts(sampling: UniformSampling | PoissonSampling) -> torch.Tensor:
    """(DRAWS, clients): who was drawn."""
    drawn = [set(sampling.draw(CLIENTS, Key(5), round)) for round in range(DRAWS)]
    return torch.tensor([[client in cohort for client in CLIENTS] for cohort in drawn], dtype=torch.float64)


def near(frequency: torch.Tensor, probability: float) -> bool:
    """Within 4.5 standard deviations of a binomial."""
    deviation = math.sqrt(probability * (1 - probability) / DRAWS)
    return bool(((frequency - probability).abs() < 4.5 * deviation).all())


def test_all_is_everyone_every_round() -> None:
    assert All().draw(CLIENTS, Key(0)) == CLIENTS == All().draw(CLIENTS, Key(1))


def test_uniform_draws_so_many_each_as_likely() -> None:
    drawn = cohorts(UniformSampling(3))
    assert set(drawn.sum(1).tolist()) == {3.0}
    assert near(drawn.mean(0), 0.3)
    pairs = torch.stack([drawn[:, i] * drawn[:, j] for i in range(10) for j in range(i)], 1).mean(0)
    assert near(pairs, 3 * 2 / (10 * 9)), "without replacement"


def test_poisson_draws_each_client_on_its_own() -> None:
    drawn = cohorts(PoissonSampling(0.3))
    assert near(drawn.mean(0), 0.3)
    pairs = torch.stack([drawn[:, i] * drawn[:, j] for i in range(10) for j in range(i)], 1).mean(0)
    assert near(pairs, 0.09), "independently"
    sizes = drawn.sum(1)
    assert near((sizes == 0).double().mean()[None], 0.7**10)
    assert float(sizes.var()) == pytest.approx(10 * 0.3 * 0.7, rel=0.15)


def test_cohorts_keep_the_clients_order_and_hang_on_the_key_alone() -> None:
    for sampling in (UniformSampling(4), PoissonSampling(0.5)):
        cohort = list(sampling.draw(CLIENTS, Key(1)))
        assert cohort == sorted(cohort, key=CLIENTS.index)
        assert cohort == list(sampling.draw(CLIENTS, Key(1)))
        assert len({tuple(sampling.draw(CLIENTS, Key(n))) for n in range(20)}) > 10
    assert PoissonSampling(0).draw(CLIENTS, Key(0)) == []
    assert PoissonSampling(1).draw(CLIENTS, Key(0)) == CLIENTS
    assert UniformSampling(10).draw(CLIENTS, Key(0)) == CLIENTS


def test_sampling_refuses_what_cannot_be(data: Path) -> None:
    for make in (lambda: UniformSampling(0), lambda: PoissonSampling(-0.1), lambda: PoissonSampling(1.1)):
        with pytest.raises(ConfigError, match=r"sampling\.(uniform\.cohort|poisson\.rate) is .* it must be"):
            make()
    with pytest.raises(ConfigError, match="cohort is 4, but there are 3 clients"):
        small(data, federation__shards__sampling={"uniform": {"cohort": 4}}).federation.load(Key(0))


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = write_records(tmp_path / "people.jsonl")
    shards = small(path).federation
    before = shards.load(Key(0))
    assert shards.load(Key(0)) is before
    path.write_text(path.read_text().replace("ben", "bob"))
    assert set(shards.load(Key(0)).clients) == {"ann", "bob", "cid"}


def test_listed_losses_happen_once() -> None:
    shards = Shards("x", failures=(ClientOutage("a", 2), ClientOutage("b", 1, "evaluate")))
    for client in "ab":
        for round in range(4):
            for call in ("work", "evaluate"):
                lost = shards.failure(client, round, call, Key(0)) is not None
                assert lost == ((client, round, call) in {("a", 2, "work"), ("b", 1, "evaluate")})


def test_the_failure_rate_is_a_rate_and_hangs_on_nothing_but_the_key() -> None:
    shards = Shards("x", failure_rate=0.2)
    lost = [shards.failure("a", round, "work", Key(3)) is not None for round in range(DRAWS)]
    assert near(torch.tensor([sum(lost) / DRAWS]), 0.2)
    assert lost[:50] == [shards.failure("a", round, "work", Key(3)) is not None for round in range(50)]
    assert lost[:50] != [shards.failure("b", round, "work", Key(3)) is not None for round in range(50)]
    assert not any(shards.failure("a", round, "evaluate", Key(3)) for round in range(50))
    for rate, losses in ((0.0, 0), (1.0, 50)):
        of = Shards("x", failure_rate=rate)
        assert sum(of.failure("a", round, "work", Key(3)) is not None for round in range(50)) == losses


def test_losses_of_clients_that_are_not_there_are_refused(data: Path) -> None:
    lost = [{"client": "benn", "round": 0}]
    with pytest.raises(ConfigError, match="no client 'benn'; did you mean 'ben'"):
        small(data, federation__shards__failures=lost).federation.load(Key(0))


def deltas(spy: Spy) -> dict[str, Tree]:
    """Each client's mean delta of the first round, without its weight."""
    answered = {client: update.parts["delta"] for name, client, update in spy.answered if name == "work"}
    return {client: tree.scale(part.tree, 1 / (part.weight or 1)) for client, part in answered.items()}


def test_the_aggregate_is_the_mean_over_the_survivors(data: Path, tmp_path: Path) -> None:
    spy = Spy()
    start = fedllm.run(small(data, rounds=0), out=tmp_path / "start").params
    fedllm.run(small(data, rounds=1), out=tmp_path / "all", engine=spy)
    lost = [{"client": "ben", "round": 0}]
    made = fedllm.run(small(data, rounds=1, federation__shards__failures=lost), out=tmp_path / "lost")
    ann, cid = deltas(spy)["ann"], deltas(spy)["cid"]
    share = SIZES["ann"] / (SIZES["ann"] + SIZES["cid"])
    for name, leaf in made.params.items():
        expected = start[name] + share * ann[name] + (1 - share) * cid[name]
        assert torch.allclose(leaf, expected, rtol=0, atol=1e-7)
    assert tree.norm(tree.sub(made.params, start)) > 1e-3
    log = events(tmp_path / "lost")
    assert [(e.round, e.client) for e in log if isinstance(e, ClientFailed)] == [(0, "ben")]
    assert [e.clients for e in log if isinstance(e, RoundFinished)] == [2]


def test_a_run_of_empty_cohorts_ends_where_it_began(data: Path, tmp_path: Path) -> None:
    sampling = {"poisson": {"rate": 0.0}}
    experiment = small(data, federation__shards__sampling=sampling, stages=[{"adam": {}}, "by_examples"], rounds=2)
    with pytest.raises(RunError, match="no round of 2 had an answer, so nothing was trained; round 1: nobody was"):
        fedllm.run(experiment, out=tmp_path / "run")
    ended = Checkpoints(tmp_path / "run" / "checkpoints", 2).load()
    assert ended is not None
    assert tree.equal(ended.params, fedllm.run(small(data, rounds=0), out=tmp_path / "start").params)
    log = events(tmp_path / "run")
    assert [e.cohort for e in log if isinstance(e, RoundStarted)] == [(), ()]
    assert [(e.note, e.loss) for e in log if isinstance(e, RoundFinished)] == [("nobody was drawn", None)] * 2
    summary = figures(tmp_path / "run")
    assert (summary["tokens_trained"], summary["bytes_up"], summary["bytes_down"]) == (0, 0, 0)
    assert summary["eval"]["federated"] == summary["eval"]["base"]


def test_a_run_whose_clients_all_fail_says_so_now_and_later(data: Path, tmp_path: Path) -> None:
    experiment = small(data, federation__shards__failure_rate=1.0, rounds=2)
    for _ in range(2):  # the second time without running
        with pytest.raises(RunError, match=r"round 1: 0 of 3 answered: .*ann was lost: .*failure_rate asks for it"):
            fedllm.run(experiment, out=tmp_path / "run")
    notes = [event.note for event in events(tmp_path / "run") if isinstance(event, RoundFinished)]
    assert notes == ["0 of 3 answered: an empty round"] * 2
    summary = figures(tmp_path / "run")
    assert summary["bytes_up"] == 0 < summary["bytes_down"]
    assert "nothing was trained" in summary["failure"]
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_never_reaches_its_quorum_says_so(data: Path, tmp_path: Path) -> None:
    losses = [{"client": "ann", "round": round} for round in (0, 1)]
    experiment = small(data, federation__shards__failures=losses, rounds=2, limits__quorum=3)
    with pytest.raises(RunError, match=r"no round of 2 had the 3 answers that limits.quorum asks for.*2 of 3 answered"):
        fedllm.run(experiment, out=tmp_path / "run")


def test_uniform_cohorts_are_kept_by_the_run(data: Path, tmp_path: Path) -> None:
    sampling = {"uniform": {"cohort": 2}}
    experiment = small(data, federation__shards__sampling=sampling, rounds=6, evaluation__metrics=[])
    fedllm.run(experiment, out=tmp_path / "run")
    drawn = [event.cohort for event in events(tmp_path / "run") if isinstance(event, RoundStarted)]
    assert {len(cohort) for cohort in drawn} == {2} and len(set(drawn)) > 1
