"""Which checkpoints a run leaves behind, and which of them is the best."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.errors import RunError
from fedllm.evaluation.model_selection import best_of
from fedllm.evaluation.settings import Evaluation
from fedllm.events import CheckpointSaved, Evaluated, Event, RoundFinished
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.loaded_run import open_run
from fedllm.tensors.tree import equal
from tests.runs.small import events, small


def saved(folder: Path) -> list[int]:
    return Checkpoints(folder / "checkpoints", 1).rounds()


@pytest.mark.parametrize(
    ("every", "keep", "told", "kept"),
    [(1, 1, [0, 1, 2, 3, 4, 5], [5]), (2, 2, [0, 2, 4, 5], [4, 5]), (9, 3, [0, 5], [0, 5])],
)
def test_due_checkpoints_are_saved_and_the_last_kept(
    data: Path, tmp_path: Path, every: int, keep: int, told: list[int], kept: list[int]
) -> None:
    limits = {"checkpoint_every": every, "keep_last": keep}
    fedllm.run(small(data, rounds=5, limits=limits, evaluation__metrics=[]), out=tmp_path / "run")
    assert [event.round for event in events(tmp_path / "run") if isinstance(event, CheckpointSaved)] == told
    assert saved(tmp_path / "run") == kept


def test_a_round_is_told_after_it_is_on_disk(data: Path, tmp_path: Path) -> None:
    def look(event: Event) -> None:
        if isinstance(event, RoundFinished):
            assert saved(tmp_path / "run")[-1] == event.round + 1

    fedllm.run(small(data), out=tmp_path / "run", listeners=[look])


def test_the_best_is_kept_and_opened(data: Path, tmp_path: Path) -> None:
    # a random model answers nothing right, ever: of equal figures the first is the best
    evaluation = {"metrics": ["nll", "exact_match"], "best": "exact_match", "every": 1, "limit": 1, "max_new_tokens": 1}
    result = fedllm.run(small(data, rounds=4, evaluation=evaluation, limits__keep_last=1), out=tmp_path / "run")
    figures = [e.metrics for e in events(tmp_path / "run") if isinstance(e, Evaluated) and e.which == "federated"]
    assert [scores["exact_match"] for scores in figures] == [0.0] * 4, "the case that is tested"
    assert result.summary["best_round"] == 1
    assert saved(tmp_path / "run") == [1, 4]
    chosen, last = open_run(tmp_path / "run", best=True), open_run(tmp_path / "run")
    assert (chosen.state.round, last.state.round) == (1, 4)
    assert not equal(chosen.params, last.params)
    assert equal(last.params, result.params)


def test_without_an_evaluation_there_is_no_best(data: Path, tmp_path: Path) -> None:
    fedllm.run(small(data, rounds=1, evaluation__metrics=[]), out=tmp_path / "run")
    with pytest.raises(RunError, match="never evaluated"):
        open_run(tmp_path / "run", best=True)
    with pytest.raises(RunError, match="is no run folder"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("metrics", "chosen", "scores", "best"),
    [
        (["nll"], None, [{"nll": 3.0}, {"nll": 2.0}, {"nll": 2.0}, {"nll": 2.5}], (2, 2.0)),
        (["exact_match"], None, [{"exact_match": 0.1}, {"exact_match": 0.3}, {"exact_match": 0.2}], (2, 0.3)),
        (["nll", "accuracy"], "accuracy", [{"nll": 1.0, "accuracy": 0.0}, {"nll": 9.0, "accuracy": 0.1}], (2, 0.1)),
        (["nll"], None, [{}, {"nll": 4.0}, {}], (2, 4.0)),
        (["nll"], None, [{}], None),
    ],
)
def test_best_is_the_first_of_the_best_figures(
    metrics: list[str], chosen: str | None, scores: list[dict[str, float]], best: Any
) -> None:
    found: tuple[int, float] | None = None
    for round, figures in enumerate(scores, 1):
        found = best_of(found, Evaluated("federated", round, figures), Evaluation(tuple(metrics), best=chosen))
    assert found == best


def test_a_figure_that_is_no_number_is_never_the_best() -> None:
    nan = Evaluated("federated", 1, {"nll": float("nan")})
    good = Evaluated("federated", 2, {"nll": 2.0})
    assert best_of(best_of(None, nan, Evaluation()), good, Evaluation()) == (2, 2.0)
    assert best_of((2, 2.0), nan, Evaluation()) == (2, 2.0)
