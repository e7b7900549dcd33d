"""HAFLQ: which components a client sends, in how many bits, and what the server makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fedllm
from fedllm.errors import CheckError, ClientError, ConfigError
from fedllm.experiment.checks.check import check, check_profiles
from fedllm.messages import serialization
from fedllm.messages.context import Profile
from fedllm.messages.update import Part, Update
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.lora.bandwidth_cap import LoraCap
from fedllm.stages.lora.pad import LoraPad
from fedllm.stages.lora.prune import LoraPrune
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import low_rank, tree
from fedllm.tensors.wire_format import IndexSelection
from tests.experiment.test_check import of
from tests.runs.small import command, small, write_records
from tests.stages.lora.one_round import EXAMPLES, LAYERS, RANKS, Round, drawn, off

MARKS = 4 * 16 * 2 * len(LAYERS)  # bytes of the part "holders", at rank 16
VALUES = {layer: sum(sizes) for layer, sizes in LAYERS.items()}  # of a component
SCALES = {layer: [-(-16 * size // 128) for size in sizes] for layer, sizes in LAYERS.items()}  # of all components
WHOLE = {
    32: 4 * 16 * (768 + 2112),
    8: 16 * (768 + 2112) + 4 * (24 + 72 + 72 + 192),
    4: 16 * (768 + 2112) // 2 + 4 * (24 + 72 + 72 + 192),
}
KEEP, ANY = LoraPad("contributors"), LoraCap()


def capped(*bandwidths: int | None, ranks: Sequence[int] = (16,), cap: LoraCap = ANY) -> Round:
    """Clients that begin where the server is and change every component by another amount."""
    server = drawn(16, 0)
    after = []
    for k, rank in enumerate(ranks):
        change, held = drawn(rank, k + 1), low_rank.sliced(server, rank)
        sizes = torch.rand(rank, generator=torch.Generator().manual_seed(k))
        after.append({n: held[n] + leaf * low_rank.per_component(n, sizes) for n, leaf in change.items()})
    return Round(server, after, KEEP, EXAMPLES[: len(ranks)], (cap,), bandwidths)


def positions(part: Part) -> dict[str, set[int]]:
    """Of each factor the components that are on the wire."""
    windows = part.wire_format.windows
    assert all(
        isinstance(window, IndexSelection) and window.axis == low_rank.component_axis(name)
        for name, window in windows.items()
    )
    return {name: set(window.places) for name, window in windows.items() if isinstance(window, IndexSelection)}


def moved(round: Round, k: int = 0) -> dict[tuple[str, int], float]:
    """||b' a' - b a||_F of each component, from the dense products."""
    start, after = round.server, round.after[k]
    found = {}
    for layer in LAYERS:
        (b, a), (new_b, new_a) = low_rank.pair(start, layer), low_rank.pair(after, layer)
        for j in range(len(new_a)):
            change = torch.outer(new_b[:, j].double(), new_a[j].double()) - torch.outer(b[:, j].double(), a[j].double())
            found[layer, j] = float(change.norm())
    return found


def test_the_numbers_above_are_those_of_the_layers() -> None:
    assert VALUES == {"q": 768, "down": 2112} and SCALES == {"q": [24, 72], "down": [72, 192]} and MARKS == 256


# What is sent.


@pytest.mark.parametrize(
    ("bandwidth", "bits"),
    [
        (10**9, 32),
        *[(WHOLE[32] + MARKS, 32), (WHOLE[32] + MARKS - 1, 8)],
        *[(WHOLE[8] + MARKS, 8), (WHOLE[8] + MARKS - 1, 4), (WHOLE[4] + MARKS, 4)],
    ],
)
def test_the_highest_precision_at_which_all_components_fit(bandwidth: int, bits: int) -> None:
    sent = capped(bandwidth).sent(0)
    assert sent.parts["delta"].wire_format.bits == (None if bits == 32 else bits)
    assert all(found == set(range(16)) for found in positions(sent.parts["delta"]).values())
    assert serialization.part_bytes(sent) == {"delta": WHOLE[bits], "holders": MARKS}


@pytest.mark.parametrize("bandwidth", [WHOLE[4] + MARKS - 1, 12_000, 7_000, 3_000, 1_000])
@pytest.mark.parametrize("bits", [4, 32])
def test_the_components_that_moved_most_and_fit(bandwidth: int, bits: int) -> None:
    """By a loop over the dense products; each count of components by its size on the wire."""
    bandwidth *= 1 if bits == 4 else 7
    round = capped(bandwidth, cap=LoraCap((bits,)))
    expected: dict[str, set[int]] = {layer: set() for layer in LAYERS}

    def size() -> int:
        if bits == 32:
            return sum(4 * len(expected[layer]) * VALUES[layer] for layer in LAYERS)
        leaves = [len(expected[layer]) * side for layer, sides in LAYERS.items() for side in sides]
        return sum(-(-n // 2) + 4 * -(-n // 128) for n in leaves)

    scores = moved(round)
    for layer, j in sorted(scores, key=lambda component: -scores[component]):
        expected[layer].add(j)
        if size() > bandwidth - MARKS:
            expected[layer].remove(j)
    sent = round.sent(0)
    assert positions(sent.parts["delta"]) == {
        f"{layer}.{f}": expected[layer] for layer in LAYERS for f in ("lora_A", "lora_B")
    }
    assert 0 < sum(map(len, expected.values())) < 32
    assert serialization.part_bytes(sent) == {"delta": size(), "holders": MARKS}
    assert size() + MARKS <= bandwidth


@pytest.mark.parametrize("bandwidth", range(900, 60_000, 3_911))
def test_what_goes_over_the_wire_is_within_the_bandwidth(bandwidth: int) -> None:
    round = capped(*[bandwidth] * 3, ranks=RANKS)
    for k, rank in enumerate(RANKS):
        sent = round.sent(k)
        data = serialization.serialize(sent)
        values = len(data) - 8 - int.from_bytes(data[:8], "little")
        assert values == sum(serialization.part_bytes(sent).values()) <= bandwidth
        assert all(found <= set(range(rank)) for found in positions(sent.parts["delta"]).values())
        for name, marks in sent.parts["holders"].tree.items():
            assert set(marks.nonzero().flatten().tolist()) == positions(sent.parts["delta"])[name]
        assert_same_bits(serialization.deserialize(data), sent)


def assert_same_bits(back: serialization.Message, sent: Update) -> None:
    assert isinstance(back, Update)
    assert all(tree.equal(back.parts[name].tree, part.tree) for name, part in sent.parts.items())


@pytest.mark.parametrize("bits", [8, 4, 1])
def test_what_is_sent_is_rounded_by_one_step_at_most(bits: int) -> None:
    plain, few = (capped(10**9, cap=LoraCap((b,))).sent(0).parts["delta"] for b in (32, bits))
    for name, leaf in few.tree.items():
        assert few.wire_format.scales[name].max() > 0
        step = float(few.wire_format.scales[name].max()) * (2 if bits == 1 else 1)
        assert 0 < float((leaf - plain.tree[name]).abs().max()) <= step * (1 + 1e-6)


def test_without_a_bandwidth_nothing_changes() -> None:
    capless = capped(None, None, None, ranks=RANKS)
    assert tree.equal(capless.result(), replace(capless, behind=()).result())
    roomy = capped(*[10**9] * 3, ranks=RANKS)
    assert tree.equal(roomy.result(), capless.result()), "a bandwidth that holds everything changes no bit"


# What the server makes of it.


def test_a_component_that_one_of_four_sends_keeps_its_full_value() -> None:
    """All move component 5 of q little and one moves it much; a mean over all would quarter it."""
    server = drawn(16, 0)
    after = [tree.map_leaves(torch.clone, server) for _ in range(4)]
    for k, leaves in enumerate(after):
        mine = ("q", 5) if k == 2 else ("down", 1)
        for name in (f"{mine[0]}.lora_A", f"{mine[0]}.lora_B"):
            leaves[name].select(low_rank.component_axis(name), mine[1]).mul_(1.5)
    room = MARKS + 4 * VALUES["down"]  # one component of down, or one of q with no room for one of down
    bandwidths = [room, room, MARKS + 4 * VALUES["q"], room]
    cap = LoraCap((32,))
    found = Round(server, after, KEEP, (1, 2, 3, 4), (cap,), bandwidths).result()
    for name in ("q.lora_A", "q.lora_B"):
        axis = low_rank.component_axis(name)
        assert off(found[name].select(axis, 5), 1.5 * server[name].select(axis, 5).double()) < 1e-6
        others = [j for j in range(16) if j != 5]
        assert torch.equal(found[name][tuple(index(axis, others))], server[name][tuple(index(axis, others))])
    quartered = Round(server, after, LoraPad(), (1, 2, 3, 4), (), ()).result()["q.lora_A"][5]
    assert off(quartered, 1.15 * server["q.lora_A"][5].double()) < 1e-6, "weight 3 of 10: a plain mean"


def index(axis: int, listed: list[int]) -> list[Any]:
    return [slice(None)] * axis + [listed]


def test_each_component_is_the_mean_over_those_who_sent_it() -> None:
    round = capped(60_000, 200_000, 30_000, ranks=RANKS, cap=LoraCap((32,)))
    found, sent = round.result(), [positions(round.sent(k).parts["delta"]) for k in range(3)]
    seen = set()
    for name, j in ((name, j) for name in found for j in range(16)):
        having = [k for k in range(3) if j in sent[k][name]]
        seen.add(len(having))
        expected = round.server[name].select(low_rank.component_axis(name), j).double()
        if having:
            total = sum(EXAMPLES[k] for k in having)
            leaves = [
                EXAMPLES[k] / total * round.after[k][name].select(low_rank.component_axis(name), j).double()
                for k in having
            ]
            expected = sum(leaves, torch.zeros_like(expected))
        assert off(found[name].select(low_rank.component_axis(name), j), expected) < 1e-6
    assert seen >= {0, 1, 2}


# What does not fit.


@pytest.mark.parametrize("bits", [(32, 8, 4), (32,), (1,)])
def test_a_bandwidth_below_one_component_says_what_would_do(bits: tuple[int, ...]) -> None:
    with pytest.raises(ClientError, match=r"its bandwidth of 300 bytes a round is below the (\d+) that") as caught:
        capped(300, cap=LoraCap(bits)).sent(0)
    least = int(str(caught.value).split()[-3])
    sizes = [-(-side * min(bits) // 8) + (4 * -(-side // 128) if min(bits) < 32 else 0) for side in LAYERS["q"]]
    assert least == MARKS + sum(sizes)
    assert str(caught.value).endswith(f"set it to {least} or more")
    assert sum(serialization.part_bytes(capped(least, cap=LoraCap(bits)).sent(0)).values()) == least
    with pytest.raises(ClientError):
        capped(least - 1, cap=LoraCap(bits)).sent(0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": ()}, r"lora_cap\.bits is \[\]; it must be one or more of 32, 8, 4 and 1"),
        ({"bits": (32, 16)}, r"lora_cap\.bits is \[32, 16\]; it must be"),
        ({"block": 0}, r"lora_cap\.block is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraCap(**settings)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((KEEP, ByExamples(), LoraCap(), Quantize(8)), "lora_cap fits .*, but quantize behind .* put quantize before"),
        ((ByExamples(), LoraCap()), "lora_cap takes the part 'holders', which nothing before it makes"),
    ],
)
def test_what_cannot_be_is_refused(stages: Any, message: str) -> None:
    with pytest.raises(CheckError, match=message):
        check(of(*stages))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ((KEEP, ByExamples()), "client a has a bandwidth of 9 bytes a round, but no stage fits the update to a"),
        ((Dyn(), KEEP, Uniform(), LoraCap()), "dyn is right only if every .*, but client a has a bandwidth of 9 bytes"),
    ],
)
def test_a_bandwidth_that_does_not_suit_the_stages_is_refused(stages: Any, message: str) -> None:
    check(of(*stages))
    check_profiles(of(*stages), {"a": Profile()})
    with pytest.raises(CheckError, match=message):
        check_profiles(of(*stages), {"a": Profile(bandwidth=9)})


def test_pruning_and_a_bandwidth_go_together() -> None:
    check(of(LoraPrune(), ByExamples(), LoraCap()))
    kept = replace(capped(12_000), stage=LoraPrune(gamma=1))
    assert sum(serialization.part_bytes(kept.sent(0)).values()) <= 12_000


# Whole runs: what cannot be known before the model is loaded is known before the first round.

METHOD = {"stages": [{"lora_pad": {"mean": "contributors"}}, "by_examples", "lora_cap"]}


def test_a_run_whose_client_cannot_send_ends_before_it_starts(tmp_path: Path, cache_folder: Path) -> None:
    data = write_records(tmp_path / "people.jsonl")

    def run(bandwidth: int, out: Path) -> Any:
        profiles = {"b*": {"bandwidth": bandwidth}, "ann": {"bandwidth": 10**6}}
        return fedllm.run(small(data, federation__shards__profiles=profiles, rounds=1, **METHOD), out=out)

    with pytest.raises(
        CheckError, match=r"federation: client ben: its bandwidth of 10 bytes a round is below the"
    ) as caught:
        run(10, tmp_path / "small")
    least = int(str(caught.value).split()[-3])
    with pytest.raises(CheckError):
        run(least - 1, tmp_path / "less")
    assert run(least, tmp_path / "enough").params


RUN = """
task: {model: tiny-llama, adapter: {lora: {rank: 4, alpha: 8}}}
federation: {shards: {data: quickstart, partition: {by: organisation}}}
work: {sgd: {lr: 0.1, steps: 1, batch_size: 2, max_length: 32}}
method: haflq
evaluation: {metrics: []}
rounds: 1
"""
PROFILE = "federation.shards.profiles.clinic"


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (f"{PROFILE}.rank=0", "rank is 0; it must be 1 or more"),
        (f"{PROFILE}.rank=5", "client clinic has rank 5, above the rank 4 of task.adapter"),
        (f"{PROFILE}.bandwidth=0", "bandwidth is 0; it must be 1 or more"),
        (f"{PROFILE}.bandwidth=1e3", "bandwidth"),
        (f"{PROFILE}.bandwidht=9", "did you mean 'bandwidth'?"),
        ("method={hetlora: {gamma: 0}}", "gamma is 0.0; it must be above 0 and at most 1"),
        ("method={hetlora: {gamma: 1.5}}", "gamma is 1.5; it must be above 0 and at most 1"),
        ("method={hetlora: {penalty: -1}}", "penalty is -1.0; it must be at least 0 and finite"),
        ("method={hetlora: {min_rank: 0}}", "min_rank is 0; it must be at least 1"),
        ("method={haflq: {bits: [2]}}", "bits is [2]; it must be one or more of 32, 8, 4 and 1"),
        ("task.adapter=full", "needs the adapter lora"),
    ],
)
@pytest.mark.parametrize("verb", ["check", "run"])
def test_the_command_line_refuses_in_one_sentence(
    verb: str, setting: str, said: str, tmp_path: Path, capsys: Any, cache_folder: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    code, _, err = command(capsys, verb, file, setting, *(["--out", tmp_path / "out"] if verb == "run" else []))
    assert code == 2 and said in err and "Traceback" not in err, err
    assert not (tmp_path / "out").exists()


def test_the_command_line_names_a_client_whose_bandwidth_is_too_small(
    tmp_path: Path, capsys: Any, cache_folder: Path
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    code, _, err = command(capsys, "run", file, f"{PROFILE}.bandwidth=50", "--out", tmp_path / "out")
    assert code == 2 and "Traceback" not in err
    assert "client clinic: its bandwidth of 50 bytes a round is below the" in err
