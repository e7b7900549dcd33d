"""An audit finds what a model has memorised, and says where its comparison is none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedllm
from fedllm.cli.audit import sentences
from fedllm.errors import RunError
from fedllm.evaluation.audits.intervals import auc
from fedllm.evaluation.audits.membership import blind_scores, model_scores
from fedllm.runs.audit import as_json, audit, write
from fedllm.runs.loaded_run import open_run
from tests.runs.small import spec


def test_scores_by_hand() -> None:
    """nll 1, 2, 9, 0, 3 of a text of which the base has 4 each: mean 3, the largest fifth 9."""
    text = "abc" * 50
    found = model_scores([torch.tensor([1.0, 2, 9, 0, 3])], [torch.full((5,), 4.0)], [text])
    assert {name: float(one[0]) for name, one in found.items() if name != "zlib"} == {
        "loss": -3.0, "min_k": -9.0, "calibrated": 1.0}  # fmt: skip
    assert -15 / float(found["zlib"][0]) < 30, "150 letters that repeat pack well"


def test_words_alone_tell_two_languages_apart_and_not_two_halves() -> None:
    rng = random.Random(0)
    words = [f"w{number}" for number in range(60)]
    texts = [" ".join(rng.choices(words, k=6)) for _ in range(200)]
    halves = auc(*blind_scores(texts[:100], texts[100:]))
    assert halves.low <= 0.5 <= halves.high
    other = [" ".join(rng.choices(words[30:], k=6)) for _ in range(100)]
    assert auc(*blind_scores(texts[:100], other)).low > 0.8


def records(path: Path, biased: bool = False) -> Path:
    """120 sentences of random letters; half of them with a word of their own if the halves are to differ."""
    rng = random.Random(1)
    rows = []
    for number in range(120):
        answer = "".join(rng.choices("abcdefghij", k=8))
        mark = "alpha " if biased and number < 60 else ""
        rows.append({"prompt": f"{mark}{''.join(rng.choices('klmnop', k=3))}?", "response": answer})
    parts = (rows[:60], rows[60:])
    for name, part in zip(("train", "held"), parts, strict=True):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return path


def trained(path: Path, folder: Path, *, steps: int, lr: float, **task: Any) -> Path:
    shards = {"data": str(path / "train.jsonl"), "heldout": str(path / "held.jsonl"), "clients": 2, "partition": "iid"}
    work = {"optimizer": "adamw", "lr": lr, "steps": steps, "batch_size": 15, "max_length": 48}
    adapter = {"full": {}}
    made = spec(
        "", federation__shards=shards, work__sgd=work, task__adapter=adapter, rounds=1, evaluation={"metrics": []}
    )
    made["task"] |= task
    return fedllm.run(fedllm.build(made), engine="serial", out=folder).folder


def test_an_overfitted_model_is_caught_and_one_that_has_hardly_moved_is_not(tmp_path: Path, cache_folder: Path) -> None:
    data = records(tmp_path)
    over = audit(trained(data, tmp_path / "over", steps=25, lr=3e-3))
    found = {one.attack: one for one in over.findings}
    assert (over.members, over.others, over.biased) == (60, 60, False)
    assert found["calibrated"].auc.value >= 0.75 and found["calibrated"].auc.low > 0.5
    assert found["loss"].auc.low > 0.5
    assert "can tell that a record was used" in sentences(over)[1]
    still = audit(trained(data, tmp_path / "still", steps=1, lr=1e-9))
    near = {one.attack: one.auc for one in still.findings}
    assert near["loss"].low <= 0.5 <= near["loss"].high
    path = write(tmp_path / "over", over)
    assert json.loads(path.read_text()) == as_json(over)


def test_sides_that_differ_by_their_words_are_told(tmp_path: Path, cache_folder: Path) -> None:
    found = audit(trained(records(tmp_path, biased=True), tmp_path / "run", steps=1, lr=1e-9))
    assert found.biased and "the figures above say nothing" in " ".join(sentences(found))


def test_each_record_is_asked_of_its_own_clients_model_and_a_text_of_both_sides_of_none(
    tmp_path: Path, cache_folder: Path
) -> None:
    """What each client has learned is in tensors that it keeps: the shared ones with untrained others know nothing.
    Two texts are on both sides."""
    data = records(tmp_path)
    rows = (data / "train.jsonl").read_text().splitlines()[:2]
    with (data / "held.jsonl").open("a") as held:
        held.write("\n".join(rows) + "\n")
    out = tmp_path / "run"
    found = audit(trained(data, out, steps=25, lr=3e-3, scope={"share": ["*layers.0.input_layernorm*"]}))
    assert (found.members, found.others, found.duplicates) == (58, 60, 2)
    opened = open_run(out)
    assert all(opened.own[client] for client in opened.own) and len(opened.own) == 2
    assert next(one.auc for one in found.findings if one.attack == "loss").low > 0.6


def test_too_few_records_and_no_run_are_refused(tmp_path: Path, cache_folder: Path) -> None:
    folder = trained(records(tmp_path), tmp_path / "run", steps=1, lr=1e-9)
    with pytest.raises(RunError, match="has 9 records that were trained on, and an interval needs 20"):
        audit(folder, records=9)
    with pytest.raises(RunError):
        audit(tmp_path / "nowhere")
    assert np.isfinite([one.auc.value for one in audit(folder, records=30).findings]).all()
