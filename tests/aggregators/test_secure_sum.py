"""Secure sums in whole runs: the plain sum's bits, with clients lost at every call; nothing of one is seen.

The reference is the plain sum of the same integers. The protocol itself is tested in tests/privacy/secure_aggregation.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedllm.aggregators.base import ClientSession
from fedllm.aggregators.masked_sum import MaskedSum
from fedllm.aggregators.secure_sum import SecureSum
from fedllm.aggregators.vector_layout import VectorLayout
from fedllm.data.shards import ClientOutage
from fedllm.engines.base import Engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError, ConfigError, RunError, WireError
from fedllm.events import ClientFailed, Emit, RoundFinished, read
from fedllm.experiment import config_file
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Experiment
from fedllm.messages import serialization
from fedllm.messages.call import Call, Replies
from fedllm.messages.context import Profile
from fedllm.messages.update import Part, Request, Update
from fedllm.models.loaded_model import load
from fedllm.privacy.secure_aggregation.messages import FRONT, PLACE, SIGNATURE, Kind
from fedllm.privacy.secure_aggregation.rings import CHECK
from fedllm.runs.launch import Interrupted, Result, run
from fedllm.tensors import tree
from tests.aggregators.small import lose, outcome, spec

CLIENTS = ("ann", "ben", "cid", "dan")
CALLS = ("advertise", "share", "mask", "agree", "unmask")


@pytest.fixture(autouse=True)
def cache(cache_folder: Path) -> None:
    """A cache of this test's own."""


def stages(**settings: Any) -> list[Any]:
    return ["by_examples", {"fixed_point": {"max_weight": 8, **settings}}]


def experiment(folder: Path, **changes: Any) -> Experiment:
    return config_file.build(spec(folder, CLIENTS, **{"stages": stages(), "rounds": 1, **changes}))


def secure(folder: Path, ring: int = 32, **changes: Any) -> Experiment:
    """With four clients there is room for one that is lost, if none is corrupt."""
    aggregator = {"secure_sum": {"corrupt": 0.0, "ring": ring}}
    more = {"stages": stages(ring=ring), "aggregator": aggregator, "demands": {"secrecy": True}}
    return experiment(folder, **{**more, **changes})


def events(result: Result, kind: type) -> list[Any]:
    return [event for _, event in read(result.folder / "events.jsonl") if isinstance(event, kind)]


@dataclass
class Spy(Engine):
    """The serial engine; `data`: all bytes that reach the server, by call, round and client."""

    data: dict[tuple[str, int, str], bytes] = field(default_factory=dict)

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with Serial().open(experiment, folder, emit) as call:

            def watched(name: str, requests: Mapping[str, Request]) -> Replies:
                for client, reply in call(name, requests):
                    self.data[name, requests[client].ctx.round, client] = serialization.serialize(reply)
                    yield client, reply

            yield watched


TRUE: dict[tuple[str, int], np.ndarray] = {}  # client, entries of its vector -> the vector before the masks


@pytest.fixture
def true(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], np.ndarray]:
    """What clients have sealed."""
    TRUE.clear()
    seal = MaskedSum.seal

    def watched(self: SecureSum, update: Update, session: ClientSession) -> Update:
        sealed = seal(self, update, session)
        vector = session.notes["vector"]
        TRUE[str(session.ctx.client), len(vector)] = vector.copy()
        return sealed

    monkeypatch.setattr(MaskedSum, "seal", watched)
    return TRUE


@pytest.mark.parametrize("ring", [16, 20, 32])
def test_the_secure_sum_is_the_plain_sum_to_the_bit(ring: int, tmp_path: Path) -> None:
    """With evaluations, and one client lost after its vector was due in the second round."""
    lost = ClientOutage("ben", 1, "mask")
    changes = {"stages": stages(ring=ring, bound=0.5), "rounds": 2}
    plain = lose(experiment(tmp_path, **changes), *(replace(lost, call=call) for call in ("work", "evaluate")))
    results = [
        run(made, engine="serial", out=tmp_path / name)
        for name, made in (("plain", plain), ("secure", lose(secure(tmp_path, ring, **changes), lost)))
    ]
    assert outcome(results[0]) == outcome(results[1])
    assert [event.clients for event in events(results[1], RoundFinished)] == [4, 3]
    up = [sum(e.bytes_up for e in events(result, RoundFinished)) for result in results]
    assert up[1] < up[0] + 2 * 4 * 6000, "keys, shares and signatures take some thousand bytes a client"


@pytest.mark.parametrize("call", CALLS)
def test_a_client_may_be_lost_at_every_call(call: str, tmp_path: Path) -> None:
    """Before its vector has come the sum is that of the others, and from then on that of all."""
    gone = call in ("advertise", "share", "mask")
    plain = experiment(tmp_path, evaluation={"metrics": []})
    plain = lose(plain, ClientOutage("cid", 0, "work")) if gone else plain
    made = lose(secure(tmp_path, evaluation={"metrics": []}), ClientOutage("cid", 0, call))
    result = run(made, engine="serial", out=tmp_path / "secure")
    assert outcome(result)[0] == outcome(run(plain, engine="serial", out=tmp_path / "plain"))[0]
    assert [(event.client, event.call) for event in events(result, ClientFailed)] == [("cid", call)]
    assert [event.clients for event in events(result, RoundFinished)] == [3 if gone else 4]


@pytest.mark.parametrize("call", CALLS)
def test_below_the_threshold_a_round_is_void_and_says_why(call: str, tmp_path: Path) -> None:
    """Two of four lost: the first round moves nothing, the second one everything."""
    losses = [ClientOutage(client, 0, call) for client in ("ann", "dan")]
    made = lose(secure(tmp_path, evaluation={"metrics": []}, rounds=2), *losses)
    result = run(made, engine="serial", out=tmp_path / "secure")
    first, second = events(result, RoundFinished)
    assert first.note.startswith("the secure sum was given up: ") and first.note.endswith(": an empty round")
    assert ("1 right shares of client" if call == "unmask" else "2 of 4 clients") in first.note
    assert first.loss is None and not second.note and second.clients == 4


def test_a_void_round_leaves_the_parameters_as_they_are(tmp_path: Path) -> None:
    made = secure(tmp_path, evaluation={"metrics": []}, rounds=2)
    losses = [ClientOutage(client, 1, "mask") for client in ("ann", "dan")]
    one, two = (run(each, out=tmp_path / str(each.rounds)) for each in (replace(made, rounds=1), lose(made, *losses)))
    assert tree.equal(one.params, two.params)


def masked_vector(data: bytes) -> np.ndarray:
    """The ring elements in what a client sent to the call "mask", of 32 bits."""
    reply = serialization.deserialize(data)
    assert isinstance(reply, Update)
    frame = reply.parts["frame"].tree["message"].numpy().tobytes()
    assert frame[4] == Kind.MASKED
    return np.frombuffer(frame[FRONT + PLACE : -SIGNATURE], "<u4")[:-CHECK]  # which follow the vector


def correlation(one: np.ndarray, two: np.ndarray) -> float:
    """Of two vectors of ring elements as signed numbers."""
    return float(np.corrcoef(one.view("<i4").astype(float), two.view("<i4").astype(float))[0, 1])


def test_nothing_of_a_client_reaches_the_server(tmp_path: Path, true: dict[tuple[str, int], np.ndarray]) -> None:
    """All bytes that it gets: no vector, no weight, no loss, no count; masked vectors tell nothing of the true ones."""
    spy = Spy()
    run(secure(tmp_path), engine=spy, out=tmp_path / "secure")
    sizes = {length for _, length in true}
    assert len(sizes) == 2 and len(true) == 8, "of the update and of the scores, of each client"
    for (name, _, client), data in spy.data.items():
        reply = serialization.deserialize(data)
        assert isinstance(reply, Update) and all(part.weight == 0 for part in reply.parts.values())
        assert reply.parts.keys() == {"ready" if name in ("work", "evaluate") else "frame"}
        for (owner, _), vector in true.items():
            for start in range(0, len(vector) - 8, 8):  # no eight entries that are not zeros stand anywhere
                piece = vector[start : start + 8]
                assert np.count_nonzero(piece) < 4 or piece.tobytes() not in data, (name, client, owner)
        if name == "mask":
            masked = masked_vector(data)
            own = true[client, len(masked)]
            chance = 5 / math.sqrt(len(own))  # of standard deviations: one in two million
            assert abs(correlation(masked, own)) < chance
            assert abs(correlation(masked, sum(true[other, len(masked)] for other in CLIENTS))) < chance  # type: ignore[arg-type]
            assert not np.any(masked == own) or np.mean(masked == own) < 1e-3


def test_without_masks_the_same_capture_shows_each_client(
    tmp_path: Path, true: dict[tuple[str, int], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: with the masks left out, its statistic finds the vectors."""
    from fedllm.privacy.secure_aggregation import client, recovery

    monkeypatch.setattr(client, "apply_masks", lambda *_: None)
    monkeypatch.setattr(recovery, "apply_masks", lambda *_: None)
    spy = Spy()
    run(secure(tmp_path, evaluation={"metrics": []}), engine=spy, out=tmp_path / "secure")
    for (name, _, owner), data in spy.data.items():
        if name == "mask":
            masked = masked_vector(data)
            assert correlation(masked, true[owner, len(masked)]) == pytest.approx(1)


def test_engines_come_to_the_same(tmp_path: Path) -> None:
    """With a lost client. Ray: tests/engines/test_ray.py."""
    made = lose(secure(tmp_path, rounds=2), ClientOutage("dan", 0, "share"))
    serial, batched = (
        run(made, engine=engine, out=tmp_path / name)
        for name, engine in (("serial", Serial()), ("batched", Batched(stack=1, workers=2)))
    )
    assert outcome(serial) == outcome(batched)


@dataclass
class TwoModels(Engine):
    """The serial engine with a server in between that sends one client another model."""

    victim: str = "ben"

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with Serial().open(experiment, folder, emit) as call:

            def lying(name: str, requests: Mapping[str, Request]) -> Replies:
                if name == "work":
                    changed = requests[self.victim]
                    params = tree.map_leaves(lambda leaf: leaf + 0.01, changed.params)
                    requests = {**requests, self.victim: replace(changed, params=params)}
                yield from call(name, requests)

            yield lying


def test_a_client_that_was_sent_another_model_sends_nothing(tmp_path: Path) -> None:
    result = run(secure(tmp_path, evaluation={"metrics": []}), engine=TwoModels(), out=tmp_path / "run")
    (failed,) = events(result, ClientFailed)
    assert (failed.client, failed.call) == ("ben", "advertise") and "another model" in failed.reason
    gone = lose(experiment(tmp_path, evaluation={"metrics": []}), ClientOutage("ben", 0, "work"))
    assert outcome(result)[0] == outcome(run(gone, engine="serial", out=tmp_path / "plain"))[0]


@dataclass
class Dies(Engine):
    """The serial engine of a process that ends when a call of a round has been answered so often."""

    name: str
    round: int

    @contextmanager
    def open(self, experiment: Experiment, folder: Path | None, emit: Emit) -> Iterator[Call]:
        with Serial().open(experiment, folder, emit) as call:

            def ending(name: str, requests: Mapping[str, Request]) -> Replies:
                for number, (client, reply) in enumerate(call(name, requests)):
                    if (name, requests[client].ctx.round, number) == (self.name, self.round, 2):
                        raise KeyboardInterrupt
                    yield client, reply

            yield ending


@pytest.mark.parametrize("call", ["work", "mask", "unmask"])
def test_a_resumed_run_comes_to_the_same(call: str, tmp_path: Path) -> None:
    """Killed in the second round, also behind the masks: the keys are gone, and the sum is asked with a new number."""
    made = secure(tmp_path, evaluation={"metrics": []}, rounds=3)
    with pytest.raises(Interrupted):
        run(made, engine=Dies(call, 1), out=tmp_path / "killed")
    resumed = run(made, engine="serial", out=tmp_path / "killed", resume=True)
    whole = run(made, engine="serial", out=tmp_path / "whole")
    assert tree.equal(resumed.params, whole.params)


def test_a_key_that_others_can_read_ends_the_run(tmp_path: Path) -> None:
    made = secure(tmp_path, evaluation={"metrics": []}, rounds=2)
    with pytest.raises(Interrupted):
        run(made, engine=Dies("work", 1), out=tmp_path / "run")
    (key,) = (tmp_path / "run").rglob("ben.key")
    assert key.stat().st_mode & 0o777 == 0o600
    os.chmod(key, 0o644)
    with pytest.raises(RunError, match=r"ben\.key is not its owner's alone .*chmod 600"):
        run(made, engine="serial", out=tmp_path / "run", resume=True)


def refused(folder: Path, clients: int = 4, **changes: Any) -> str:
    made = secure(folder, **changes)
    with pytest.raises(CheckError) as caught:
        check(made)
        check_profiles(made, {str(k): Profile() for k in range(clients)})
    return str(caught.value)


def test_what_is_refused_before_a_model_loads(tmp_path: Path) -> None:
    point = {"fixed_point": {"max_weight": 8}}
    assert "no stage yields integers; put the stage fixed_point last" in refused(tmp_path, stages=["by_examples"])
    assert "ring 16, but aggregator secure_sum has ring 32" in refused(tmp_path, stages=stages(ring=16))
    assert "quantize before fixed_point" in refused(tmp_path, stages=["by_examples", {"quantize": 4}, point])
    assert "stands twice" in refused(tmp_path, stages=["by_examples", point, point])
    behind = refused(tmp_path, stages=["by_examples", point, {"quantize": 4}])
    assert "quantize behind it would make fractions" in behind
    local = {"local_gaussian": {"clip": 1.0, "noise_multiplier": 1.0}}
    noisy = refused(tmp_path, stages=[{"uniform": {"denominator": "expected"}}, local, point], evaluation={})
    assert "local_gaussian before fixed_point adds noise beyond the bound" in noisy
    assert "no sum of fewer than 3 clients, but a round asks 2" in refused(tmp_path, clients=2)
    assert "4 clients with 60% corrupt" in refused(tmp_path, aggregator={"secure_sum": {"corrupt": 0.6}})
    wide = {"fixed_point": {"max_weight": 10000, "ring": 16}}
    room = refused(tmp_path, ring=16, stages=["by_examples", wide])
    assert "ring 16 has no room for the sum of 4 clients of weight 10000" in room
    with pytest.raises(CheckError, match=r"has \d+ examples, above fixed_point.max_weight 1; set max_weight to \d+"):
        run(secure(tmp_path, stages=["by_examples", "fixed_point"]), engine="serial", out=tmp_path / "run")
    made = secure(tmp_path)
    with pytest.raises(CheckError, match=r"has rank 1 .*secure_sum binds its masks to one model"):
        check_profiles(made, {**{str(k): Profile() for k in range(4)}, "odd": Profile(rank=1)})


@pytest.mark.parametrize(
    "settings", [{"corrupt": 1.0}, {"dropout": -0.1}, {"min_survivors": 1}, {"ring": 8}, {"cipher": "rot13"}]
)
def test_settings(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ConfigError, match=f"secure_sum.{name} is"):
        SecureSum(**settings)


def test_a_layout_comes_back_and_what_is_none_is_refused() -> None:
    update = Update(
        {
            "b": Part({"y": torch.tensor([[1, -2, 3]], dtype=torch.int16)}, 0.0),
            "a": Part({"x": torch.tensor(-5, dtype=torch.int16)}, 0.0),
        }
    )
    layout = VectorLayout.of(update)
    assert VectorLayout.read(layout.to_bytes()) == layout and layout.length == 4
    vector = layout.vector(update, 16)
    assert vector.tolist() == [65531, 1, 65534, 3]
    back = layout.update(vector.view("<i2"))
    assert all(tree.equal(back.parts[name].tree, update.parts[name].tree) for name in ("a", "b"))
    texts: Sequence[bytes] = (
        b"",
        b"{}x",
        b"[1]",
        b'[["a","x","int16",[-1]]]',
        b'[["a","x","float32",[1]]]',
        b"[" * 9999,
    )
    for text in texts:
        with pytest.raises(WireError, match="layout of a vector"):
            VectorLayout.read(text)


UNIFORM = {"fixed_point": {"max_weight": 1}}
PRIVATE = [{"uniform": {"denominator": "expected"}}, {"gaussian_dp": {"clip": 0.5, "noise_multiplier": 1.0}}, UNIFORM]
TOGETHER: Mapping[str, Mapping[str, Any]] = {
    "server optimiser": {"stages": ["adam", *stages()]},
    "prox": {"stages": [{"prox": {"mu": 0.1}}, *stages()]},
    "scaffold": {"stages": ["scaffold", "uniform", UNIFORM]},
    "top_k": {"stages": [{"top_k": {"fraction": 0.3}}, *stages()]},
    "rotation": {"stages": stages(rotate=True, bound=0.1)},
    "products": {"stages": ["lora_product", *stages()]},
    "pruning": {"stages": ["lora_prune", "uniform", {"fixed_point": {"max_weight": 1000}}]},
    "gaussian_dp": {
        "stages": PRIVATE,
        "evaluation": {"metrics": []},
        "demands": {"secrecy": True, "privacy": {"seeded_noise": True}},
    },
}


@pytest.mark.parametrize("name", TOGETHER)
def test_what_goes_together_comes_to_the_plain_sum_and_near_the_run_without_integers(name: str, tmp_path: Path) -> None:
    """Two rounds. The secure sum is the plain sum of the integers to the bit; without integers the run is within their
    rounding, and on the grid of a private stage it is the same to the bit."""
    changes = {"rounds": 2, "evaluation": {"metrics": []}, **TOGETHER[name]}
    hidden = secure(tmp_path, **changes)
    plain = config_file.build({**config_file.dump(hidden), "aggregator": "sum", "demands": shown(changes)})
    without = replace(plain, stages=plain.stages[:-1])
    made = {"hidden": hidden, "plain": plain, "without": without}
    hidden_, plain_, without_ = (run(each, engine="serial", out=tmp_path / key).params for key, each in made.items())
    assert tree.equal(hidden_, plain_)
    start = first_params(hidden)
    moved, off = tree.norm(tree.sub(without_, start)), tree.norm(tree.sub(plain_, without_))
    assert moved > 0 and off <= (0.0 if name == "gaussian_dp" else 1e-3) * moved


def shown(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The demands without secrecy."""
    return {**changes.get("demands", {}), "secrecy": False}


def first_params(made: Experiment) -> dict[str, torch.Tensor]:
    return load(made.task).initial_params(made.key)
