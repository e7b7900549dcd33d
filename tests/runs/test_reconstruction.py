"""`fedllm audit --reconstruct`: the first round made once more and attacked, as its server saw it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.cli.audit import leak_sentences
from fedllm.errors import RunError
from fedllm.runs.reconstruction import reconstruct
from tests.runs.small import command, write_records

LORA = {"lora": {"rank": 30, "alpha": 30, "targets": ["q_proj", "k_proj", "v_proj"]}}  # k_proj is 32 x 64


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_records(tmp_path / "people.jsonl")


def run(data: Path, out: Path, **changes: Any) -> Path:
    made = {
        "task": {"model": "tiny-llama", "adapter": LORA, "dtype": "float32", "template": "plain"},
        "federation": {"shards": {"data": str(data), "heldout": 0.0, "partition": {"by": "who"}}},
        "work": {"sgd": {"lr": 0.1, "steps": 1, "batch_size": 1, "max_length": 48}},
        "stages": ["by_examples"],
        "evaluation": {"metrics": []},
        "rounds": 1,
    }
    return fedllm.run(fedllm.build({**made, **changes}), engine="serial", out=out).folder


def test_a_text_is_read_out_of_the_update_of_each_client(data: Path, tmp_path: Path) -> None:
    folder = run(data, tmp_path / "run")
    for client in ("ann", "ben", "cid"):
        found = reconstruct(folder, client)
        assert (found.clients, found.texts, found.exact) == ((client,), 1, 1)
        assert found.reconstructed == found.original and client in found.original
        assert found.recalled == found.tokens == found.bag
    assert "reads 1 of 1 text word for word" in " ".join(leak_sentences(found))


def test_eight_bits_hide_the_rank_and_the_audit_says_that_this_is_no_proof(data: Path, tmp_path: Path) -> None:
    """The rounding fills all directions, so that the exact test has nothing to hold on to."""
    found = reconstruct(run(data, tmp_path / "run", stages=["by_examples", {"quantize": 8}]), "ann")
    assert found.exact == 0 and "as many as the update has directions" in found.reason
    assert "That is no proof" in " ".join(leak_sentences(found))


def test_noise_of_the_clients_stops_it(data: Path, tmp_path: Path) -> None:
    stages = [{"uniform": "cohort"}, {"local_gaussian": {"clip": 1.0, "noise_multiplier": 1.0}}]
    found = reconstruct(run(data, tmp_path / "run", stages=stages), "ann")
    assert found.exact == 0 and found.rouge_2 < 0.2
    assert "word for word" not in " ".join(leak_sentences(found))


def test_of_a_secure_sum_the_sum_is_attacked(data: Path, tmp_path: Path) -> None:
    changes = {
        "stages": ["uniform", "fixed_point"],
        "aggregator": {"secure_sum": {"corrupt": 0.0}},
        "demands": {"secrecy": True},
    }
    found = reconstruct(run(data, tmp_path / "run", **changes))
    assert len(found.clients) == 3 and found.texts == 3
    assert leak_sentences(found)[0].startswith("the sum of 3 clients: 3 texts")


@pytest.mark.parametrize(
    ("changes", "client", "reason"),
    [
        ({"work": {"sgd": {"optimizer": "adamw", "lr": 1e-3, "steps": 1}}}, None, "the local steps are adamw"),
        ({"work": {"sgd": {"lr": 0.0, "steps": 1}}}, None, "work.sgd.lr is 0, so that nothing was sent"),
        (
            {"work": {"zeroth_order": {"lr": 1e-3, "steps": 1}}},
            None,
            "its local work takes no gradients",
        ),
        (
            {"task": {"model": "tiny-llama", "adapter": {"lora": {"rank": 4, "dropout": 0.1}}}},
            None,
            "dropout makes other",
        ),
        (
            {"task": {"model": "tiny-llama", "adapter": {"lora": {"rank": 4, "init": "singular"}}}},
            None,
            "begin with lora_B",
        ),
        (
            {
                "task": {"model": "tiny-llama", "adapter": "full"},
                "work": {"sgd": {"lr": 0.1, "steps": 1, "weight_decay": 0.1}},
            },
            None,
            "weight_decay moves",
        ),
        ({}, "anne", "no client 'anne' took part in the first round; did you mean 'ann'"),
        ({"task": {"model": "tiny-llama", "adapter": "norms"}}, None, "holds neither weights nor lora_B"),
        ({"stages": ["lora_product", "by_examples"]}, None, "in another shape than the weights"),
    ],
)
def test_where_it_would_mislead_it_is_refused(
    changes: dict[str, Any], client: str | None, reason: str, data: Path, tmp_path: Path
) -> None:
    folder = run(data, tmp_path / "run", **changes)
    with pytest.raises(RunError, match=reason):
        reconstruct(folder, client)


def test_the_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(data, tmp_path / "run")
    code, out, _ = command(capsys, "audit", str(folder), "--reconstruct", "--client", "ben", "--json")
    assert code == 0 and json.loads(out)["exact"] == 1
    assert json.loads((folder / "reconstruction.json").read_text())["clients"] == ["ben"]
    code, _, told = command(capsys, "audit", str(folder), "--client", "nobody")
    assert code == 2 and told.count("\n") == 1
