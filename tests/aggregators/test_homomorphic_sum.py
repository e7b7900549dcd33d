"""The homomorphic sum is exact; the server holds no key; a client reads no total of too few."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fedllm
from fedllm.errors import CheckError, ClientError, ConfigError, RoundVoid, RunError, WireError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.experiment.record import Demands
from fedllm.messages.context import ClientContext
from fedllm.messages.update import Part, Request, Update
from fedllm.stages.privacy.selective_encryption import SelectiveEncryption
from tests.aggregators.conversation import Conversation, context
from tests.runs.small import adapter_hash, events, small, spec, write_records

tenseal = pytest.importorskip("tenseal", reason="pip install 'fedllm[homomorphic]'")

from fedllm.aggregators import ckks  # noqa: E402
from fedllm.aggregators.homomorphic_layout import HomomorphicLayout, Scale  # noqa: E402
from fedllm.aggregators.homomorphic_sum import SECRET, HomomorphicSum  # noqa: E402
from fedllm.aggregators.keyring import Keyring  # noqa: E402

NAMES = ["ann", "ben", "cid", "dan"]


def updates(seed: int = 0, **more: Part) -> dict[str, Update]:
    """Unequal weights, non-square leaves, more values than one ciphertext holds, figures, and whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for place, name in enumerate(NAMES):
        leaves = {"a": torch.randn(70, 31, generator=generator), "b": torch.randn(3, generator=generator).double()}
        weight = float(place + 1)
        parts = {
            "delta": Part({n: leaf * weight for n, leaf in leaves.items()}, weight),
            "metrics": Part({"loss": torch.tensor(1.5 * weight)}, weight),
            "counts": Part({"tokens": torch.tensor(123_456_789 + place)}, 0.0),
        }
        made[name] = Update({**parts, **more})
    return made


def talked(sent: dict[str, Update], aggregator: HomomorphicSum | None = None, **settings: Any) -> tuple[Update, Any]:
    talk = Conversation(aggregator or HomomorphicSum(), sent, **settings)
    return talk.aggregator.reduce(talk, talk.requests()), talk


def test_the_sum_is_that_of_the_rounded_updates_to_the_bit() -> None:
    """The grid is 64 x 4 x 2^-37, so a sum of four is off by 4 x half of it at most; figures and weights are exact."""
    sent = updates()
    total, talk = talked(sent)
    grid = 64 * 4 * 2.0**-37
    for leaf in ("a", "b"):
        rounded = sum(torch.round(u.parts["delta"].tree[leaf].double() / grid) * grid for u in sent.values())
        found = total.parts["delta"].tree[leaf]
        assert (
            torch.equal(found, rounded.to(found.dtype)) and found.dtype == sent["ann"].parts["delta"].tree[leaf].dtype
        )
        plain = sum(u.parts["delta"].tree[leaf].double() for u in sent.values())
        assert float((rounded - plain).abs().max()) <= 4 * grid / 2
    assert total.parts["delta"].weight == total.parts["metrics"].weight == 10.0
    assert float(total.parts["metrics"].tree["loss"]) == 15.0
    assert int(total.parts["counts"].tree["tokens"]) == 4 * 123_456_789 + 6
    assert [client for name, client in talk.heard if name == "decrypt"] == ["ann"]


def test_nothing_of_one_client_reaches_the_server_and_the_server_has_no_key() -> None:
    """Two seals of one update share no ciphertext; and what the server holds decrypts nothing."""
    sent = updates()
    _, one = talked(sent)
    _, two = talked(sent, keyring=one.keyring)
    for name in NAMES:
        first, second = (talk.heard["work", name].parts for talk in (one, two))
        assert first.keys() == {"cipher", "about"}
        assert all(not torch.equal(first["cipher"].tree[n], second["cipher"].tree[n]) for n in first["cipher"].tree)
    context = ckks.public()
    assert not context.has_secret_key()
    with pytest.raises(ValueError, match=r"(?i)secret"):
        ckks.read(one.heard["work", "ann"].parts["cipher"].tree["000000"].numpy().tobytes()).decrypt()
    other = ckks.secret(ckks.new_secret())  # another key than the clients' reads noise
    data = one.heard["work", "ann"].parts["cipher"].tree["000000"].numpy().tobytes()
    assert abs(ckks.decrypt(other, [data], 10)).max() > 1e3


def test_a_client_that_is_lost_is_not_in_the_sum_and_the_next_one_reads_it() -> None:
    sent = updates()
    total, talk = talked(sent, lost={("work", "ben"), ("decrypt", "ann")})
    assert total.parts["delta"].weight == 8.0
    assert [client for name, client in talk.heard if name == "decrypt"] == ["cid"]
    with pytest.raises(RoundVoid, match="no client has read the total"):
        talked(sent, lost={("decrypt", name) for name in NAMES})
    assert talked(sent, lost={("work", name) for name in NAMES})[0].parts == {}


def test_a_client_reads_no_total_of_fewer_clients_than_it_insists_on() -> None:
    """A single ciphertext, or a sum of two; without the check it is read."""
    lost = {("work", "cid"), ("work", "dan")}
    sent = updates()
    aggregator = HomomorphicSum(min_clients=3)
    talk = Conversation(aggregator, sent, lost)
    with pytest.raises(ClientError, match="it reads no total of 2 clients"):
        aggregator.reduce(talk, talk.requests())
    assert talked(sent, HomomorphicSum(min_clients=2), lost=lost)[0].parts["delta"].weight == 3.0
    alone = dict(talk.heard["work", "ann"].parts["cipher"].tree)
    length = HomomorphicLayout.of(sent["ann"]).length(Scale(64.0, 4))
    request = Request({**alone, "length": torch.tensor(length)}, (), context("ben", 1, 4))
    with pytest.raises(ClientError, match="it reads no total of 1 clients"):
        aggregator.handlers()["decrypt"](request, talk.sessions["ben"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.parts["cipher"].tree.pop("000000"), "0 ciphertexts|1 ciphertexts"),
        (lambda t: t.parts["cipher"].tree.update({"000000": torch.zeros(500, dtype=torch.uint8)}), "no ciphertext"),
        (lambda t: t.parts["cipher"].tree.update({"000000": torch.zeros(80_000, dtype=torch.uint8)}), "at most 70,000"),
        (lambda t: t.parts["cipher"].tree.update({"000000": torch.zeros(3)}), "no bytes"),
        (lambda t: t.parts["about"].tree.update({"layout": torch.zeros(9, dtype=torch.uint8)}), "not those|layout"),
        (lambda t: t.parts.update({"delta": Part({}, 1.0)}), "other parts"),
    ],
)
def test_what_is_no_ciphertext_is_its_clients_failure(change: Any, reason: str) -> None:
    class Cheats(Conversation):
        def __call__(self, name: str, requests: Any) -> Any:
            for client, reply in super().__call__(name, requests):
                if (name, client) == ("work", "ben"):
                    reply = Update({n: Part(dict(p.tree), p.weight) for n, p in reply.parts.items()})
                    change(reply)
                yield client, reply

    talk = Cheats(HomomorphicSum(), updates())
    total = talk.aggregator.reduce(talk, talk.requests())
    assert total.parts["delta"].weight == 8.0
    ((name, client, told),) = talk.refusals
    assert (name, client) == ("work", "ben") and any(word in told for word in reason.split("|"))


def test_a_value_beyond_the_bound_or_not_finite_is_refused() -> None:
    for value, reason in ((65.0, "above homomorphic_sum.bound 64; raise the bound"), (math.nan, "not finite")):
        update = Update({"delta": Part({"a": torch.tensor([0.0, value])}, 1.0)})
        with pytest.raises(ClientError, match=reason):
            HomomorphicLayout.of(update).values(update, Scale(64.0, 4))
    with pytest.raises(ClientError, match="no room for 10000 clients"):
        _ = Scale(64.0, 10_000).base


def test_values_on_the_grid_of_a_bounded_norm_are_exact() -> None:
    """Digits of b bits: 52 bits of a value on the grid of gaussian_dp, summed."""
    values = torch.tensor([2.0**27 + 1, -(2.0**30), 3.0]).double() * 2.0**-40
    update = Update({"delta": Part({"a": values}, 1.0, grid=2.0**-40)})
    scale, layout = Scale(1.0, 3), HomomorphicLayout.of(update)
    total = layout.update(3 * layout.values(update, scale), scale)
    assert torch.equal(total.parts["delta"].tree["a"], 3 * values)


def test_the_error_of_a_sum_is_far_below_the_grid() -> None:
    """64 clients at full range: below a quarter of 2^-20, where half of it would still be rounded away."""
    key, rng = ckks.secret(ckks.new_secret()), np.random.default_rng(0)
    values = rng.uniform(-(2.0**17) / 64, 2.0**17 / 64, (64, ckks.SLOTS))
    total = None
    for row in values:
        total = ckks.added(total, ckks.encrypt(key, row))
    assert total is not None
    found = ckks.decrypt(key, [bytes(one.serialize()) for one in total], ckks.SLOTS)
    assert float(abs(found - values.sum(0)).max()) < 2.0**-22


def test_the_key_is_a_file_that_its_owner_alone_can_read(tmp_path: Path) -> None:
    sent, keyring = updates(), Keyring(tmp_path / "identities")
    total, _ = talked(sent, keyring=keyring)
    path = tmp_path / "identities" / SECRET
    assert path.stat().st_mode & 0o077 == 0 and total.parts["delta"].weight == 10.0
    path.chmod(0o644)
    with pytest.raises(RunError, match="can read; run: chmod 600"):
        talked(sent, keyring=keyring)


def selected(stage: SelectiveEncryption, sent: dict[str, Update], state: dict[str, torch.Tensor]) -> Any:
    """One round through the stage and the sum; the decoded total, the next state, and what was in the clear."""
    contexts = {name: context(name, place, 4) for place, name in enumerate(NAMES)}
    coded = {n: stage.encode(update, state, {}, ClientContext(contexts[n]))[0] for n, update in sent.items()}
    total, talk = talked(coded)
    decoded, after = stage.decode(total, {}, state, contexts["ann"])
    return decoded, after, talk.heard["work", "ann"].parts.get("clear")


def test_the_largest_sums_of_magnitudes_are_encrypted_and_the_rest_is_as_asked() -> None:
    sent = updates()
    whole = talked(sent)[0].parts["delta"].tree
    for rest in ("clear", "drop"):
        stage = SelectiveEncryption(0.25, rest)  # type: ignore[arg-type]
        first, state, clear = selected(stage, sent, {})
        assert clear is None and torch.equal(first.parts["delta"].tree["a"], whole["a"]), "the first is all encrypted"
        sizes = sum(
            torch.cat([u.parts["delta"].tree[n].abs().reshape(-1).double() for n in "ab"]) for u in sent.values()
        )
        chosen = torch.cat([state[n].reshape(-1) for n in "ab"]).bool()
        assert int(chosen.sum()) == round(0.25 * 2173)
        assert float(sizes[chosen].min()) >= float(sizes[~chosen].max()) - 1e-6
        second, after, clear = selected(stage, sent, state)
        assert after is state
        found, mask = second.parts["delta"].tree["a"], state["a"].bool()
        assert torch.equal(found[mask], whole["a"][mask])
        if rest == "drop":
            assert clear is None and not found[~mask].any()
        else:
            assert clear.tree["a"].dtype == torch.float32, "added up where it came, in the clear"
            assert torch.allclose(clear.tree["a"], whole["a"][~mask], atol=1e-5)
            assert torch.allclose(found[~mask], whole["a"][~mask], atol=1e-5)
    everything, _, clear = selected(SelectiveEncryption(1.0), sent, SelectiveEncryption(1.0)._map(whole))
    assert torch.equal(everything.parts["delta"].tree["a"], whole["a"]), "share 1 is the sum without the stage"


def test_a_run_has_the_scores_of_the_plain_one_and_can_be_repeated(tmp_path: Path, cache_folder: Path) -> None:
    data = write_records(tmp_path / "people.jsonl")
    plain = fedllm.run(small(data, rounds=1), engine="serial", out=tmp_path / "plain")
    made = small(data, rounds=1, aggregator={"homomorphic_sum": {"bound": 8.0}}, demands={"secrecy": True})
    first = fedllm.run(made, engine="serial", out=tmp_path / "first")
    again = fedllm.run(made, engine="serial", out=tmp_path / "again")
    assert adapter_hash(first.folder) == adapter_hash(again.folder), "the error of the encryption leaves no trace"
    for name, leaf in plain.params.items():
        assert torch.allclose(leaf, first.params[name], atol=1e-6)
    assert not any(type(event).__name__ == "ClientFailed" for event in events(first.folder))


def test_a_method_that_adds_up_takes_it_as_it_is(tmp_path: Path) -> None:
    """Where secure_sum brings fixed_point, it brings nothing."""
    settings = {key: value for key, value in spec(tmp_path / "none.jsonl").items() if key != "stages"}
    made = {
        name: fedllm.build({**settings, "method": "fedit", "aggregator": name})
        for name in ("homomorphic_sum", "bucketed")
    }
    assert [type(stage).__name__ for stage in made["homomorphic_sum"].stages] == ["ByExamples"]
    assert [type(stage).__name__ for stage in made["bucketed"].stages] == ["ByExamples", "FixedPoint"]
    check(replace(made["homomorphic_sum"], demands=Demands(secrecy=True)))


def test_what_it_does_not_go_with_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.jsonl"
    picks = ["by_examples", {"selective_encryption": 0.1}]
    with pytest.raises(CheckError, match="selective_encryption says what is encrypted, but aggregator sum encrypts"):
        check(fedllm.build(spec(path, stages=picks)))
    shown = fedllm.build(spec(path, stages=picks, aggregator="homomorphic_sum", demands={"secrecy": True}))
    with pytest.raises(CheckError, match="selective_encryption"):
        check(shown)
    few = fedllm.build(spec(path, aggregator="homomorphic_sum"))
    with pytest.raises(CheckError, match="reads no total of fewer than 3 clients, but a round asks 2 at most"):
        check_profiles(few, {name: few.federation.profile(name) for name in "ab"})
    with pytest.raises(ConfigError, match=r"homomorphic_sum\.bound is 0"):
        HomomorphicSum(bound=0.0)
    with pytest.raises(ConfigError, match=r"selective_encryption\.share is 2"):
        SelectiveEncryption(share=2.0)
    with pytest.raises(WireError, match="could not be read"):
        HomomorphicLayout.read(b"[[1]]")
