"""Every cell of the compatibility table: it works, or it is refused by name with the reason.

Works: at the partner's neutral settings a run is that of the aggregation alone, at others it is another one. For one
partner of each method the batched engine is held against it, too; tests/conformance and tests/papers do that for every
stage and every method. Three clients of unequal sizes train a tiny model in float64 for two rounds, or for three where
the factors take turns.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from fedllm.aggregators.sum import Sum
from fedllm.data.partitioners.by import By
from fedllm.data.shards import Shards
from fedllm.engines.base import Engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.errors import CheckError
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.catalog import name_of
from fedllm.experiment.checks.check import check
from fedllm.experiment.record import Demands, Experiment
from fedllm.messages.context import Profile, RoundContext
from fedllm.messages.traits import OWN_STEP, PER_ENTRY, Fact
from fedllm.messages.update import Update
from fedllm.models.loaded_model import load
from fedllm.runs import server_round
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.dyn import Dyn
from fedllm.stages.compression.quantize import Quantize
from fedllm.stages.privacy.base import PrivateStage
from fedllm.stages.server_optimizers.momentum import Momentum
from fedllm.tensors import low_rank, tree
from fedllm.tensors.tree import Tree
from tests.conformance.table import CASES
from tests.test_docs import ROOT
from tests.test_docs import load as load_module

pages = load_module(ROOT / "docs" / "gen_compatibility.py")

RANK = 4
SHIFT = "added"
SERIAL = Serial()
SIZES = {"a": 5, "b": 3, "c": 2}
MIXED = {"b": Profile(rank=2), "c": Profile(rank=1)}
SAME = {"*": Profile(rank=RANK)}

# By method the columns that it refuses, each with a word of the method's side that the reason names.
ONE_SHAPE = {pages.RANKS: "the adapter rank"}
SHOWN = pages.SECURE  # by a sum in which each client has a block of its own
ONE_BASIS = {name: "lora_stack" for name, case in CASES.items() if PER_ENTRY in case.stage.traits.needs}
MERGED = dict.fromkeys(ONE_BASIS, "lora_merge")
STEERING = {
    name: "lora_residual"
    for name, case in CASES.items()
    if name in pages.columns() and OWN_STEP in case.stage.traits.loses
}
TURNED = dict.fromkeys(ONE_BASIS, "lora_svd")
NOISED = [name_of(stage) for stage in pages.PARTNERS if isinstance(stage, PrivateStage)]


def unbounded(stage: str) -> dict[str, str]:
    """The private stages, which do not bound a part that this stage makes."""
    return dict.fromkeys(NOISED, stage)


REFUSED: Mapping[str, Mapping[str, str]] = {
    "fedit": ONE_SHAPE,
    "ffa_lora": ONE_SHAPE,
    "rolora": {"dp_ftrl": "task.scope.alternate", **ONE_SHAPE},
    "fedsa_lora": ONE_SHAPE,
    "lora_fair": {"dyn": "lora_fair", SHOWN: "lora_fair", **unbounded("lora_fair"), **ONE_SHAPE},
    "zero_padding": unbounded("lora_pad"),
    "rbla": unbounded("lora_pad"),
    "flexlora": {SHOWN: "lora_stack", **ONE_BASIS, **unbounded("lora_stack")},
    "raflora": {SHOWN: "lora_stack", **ONE_BASIS, **unbounded("lora_stack")},
    "hetlora": {"scaffold": "lora_prune", "dyn": "lora_prune", **unbounded("lora_prune")},
    "haflq": {SHOWN: "lora_cap", **unbounded("lora_pad")},
    "federa": ONE_SHAPE,
    "slora": {"dp_ftrl": "sparse_first", **ONE_SHAPE},
    "flora": {SHOWN: "lora_merge", **MERGED, **unbounded("lora_merge")},
    "fedex_lora": {SHOWN: "lora_residual", **STEERING, **unbounded("lora_residual"), **ONE_SHAPE},
    "fedsvd": {**TURNED, "dp_ftrl": "lora_svd", **ONE_SHAPE},
}


@dataclass(frozen=True)
class Summed(Stage):
    """FedDyn as alpha goes to 0, where the clients' losses are their own: Δ_t + Δ_1 + .. + Δ_t, by hand."""

    def decode(self, total: Update, params: Tree, state: Tree, ctx: RoundContext) -> tuple[Update, Tree]:
        part = total.parts["delta"]
        held = {name: state[name] + leaf if name in state else leaf for name, leaf in part.tree.items()}
        return total.having("delta", replace(part, tree=tree.add(part.tree, held))), {**state, **held}


@dataclass(eq=False)
class Bench:
    folder: Path
    ends: dict[tuple[object, ...], Tree] = field(default_factory=dict)

    def ready(
        self, experiment: Experiment, profiles: Mapping[str, Profile] | None = None, clients: Sequence[str] = "abc"
    ) -> Experiment:
        """The experiment on small data, with a small adapter of layers that are not square."""
        data = self.folder / f"{''.join(clients)}.jsonl"
        if not data.exists():
            pairs = [(who, i) for who in clients for i in range(SIZES[who])]
            rows = [{"who": who, "prompt": f"{who} {i}?", "response": f"{i * i}!"} for who, i in pairs]
            data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        adapter = replace(experiment.task.adapter, rank=RANK, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
        return replace(
            experiment,
            task=replace(experiment.task, adapter=adapter),
            federation=Shards(str(data), partition=By("who"), heldout=0.0, profiles=profiles or {}),
            evaluation=Evaluation(metrics=()),
            rounds=3 if experiment.task.scope.alternate else 2,
            seed=3,
        )

    def run(self, experiment: Experiment, engine: Engine = SERIAL) -> Tree:
        """How far a run moves the server's parameters; nothing is checked."""
        key = (repr(experiment), engine)
        if key not in self.ends:
            initial = load(experiment.task).with_constants(experiment.key).initial_params(experiment.key)
            ended, began = course(experiment, initial, engine), server_round.initial_state(experiment, initial).params
            self.ends[key] = {name: leaf - began[name] if name in began else leaf for name, leaf in ended.items()}
        return self.ends[key]


def course(experiment: Experiment, initial: Tree, engine: Engine = SERIAL) -> Tree:
    """The server's parameters after the last round, and what was added to the frozen weights."""
    run = server_round.initial_state(experiment, initial)
    clients = experiment.federation.load(experiment.key).clients
    with engine.open(experiment, None, [].append) as call:
        for _ in range(experiment.rounds):
            run, result = server_round.run_round(run, experiment, clients, call, [].append)
            assert result.clients == len(clients), result.note
    return {**run.params, **{f"{layer}.{SHIFT}": run.base_delta.dense(layer) for layer in run.base_delta.layers()}}


def distance(one: Tree, two: Tree) -> float:
    """Relative to the second."""
    return tree.norm(tree.sub(one, two)) / tree.norm(two)


def with_stage(experiment: Experiment, old: str, new: Stage) -> Experiment:
    """The experiment with another stage in the place of the one that the catalog calls `old`."""
    assert old in map(name_of, experiment.stages)
    return replace(experiment, stages=tuple(new if name_of(stage) == old else stage for stage in experiment.stages))


def without_stage(experiment: Experiment, old: str) -> Experiment:
    return replace(experiment, stages=tuple(stage for stage in experiment.stages if name_of(stage) != old))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("pairs"))


def neutral(bench: Bench, pair: Experiment, column: str) -> tuple[Experiment, Experiment]:
    """Two experiments that must end alike: the pair at neutral settings, and the aggregation alone."""
    if column == pages.RANKS:
        return bench.ready(pair, SAME), bench.ready(pair)
    if column == "scaffold":  # one client's control is the mean of the controls
        return bench.ready(pair, clients="a"), bench.ready(without_stage(pair, column), clients="a")
    if column == "dyn":  # no limit at alpha = 0, but one of its steps
        tiny = Dyn(alpha=1e-15)  # the model's norms round to float32: a pull that is not far below that shows in jumps
        return bench.ready(with_stage(pair, column, tiny)), bench.ready(with_stage(pair, column, Summed()))
    stage = Quantize(8, block=1) if column == "quantize" else CASES[column].neutral
    assert stage is not None
    return bench.ready(with_stage(pair, column, stage)), bench.ready(without_stage(pair, column))


def set_apart(bench: Bench, pair: Experiment, column: str) -> tuple[Experiment, Experiment]:
    """Two experiments that must end differently: the pair at other settings, and the aggregation alone."""
    if column == pages.RANKS:
        return bench.ready(pair, MIXED), bench.ready(pair)
    if column == pages.SECURE:
        return bench.ready(pair), bench.ready(pair)
    stage = CASES[column].stage
    if isinstance(stage, PrivateStage):  # by its bound alone: noise follows from the last bit of a sum
        stage = replace(stage, clip=1e-3, noise_multiplier=0.0)
    return bench.ready(with_stage(pair, column, stage)), bench.ready(without_stage(pair, column))


def works(bench: Bench, pair: Experiment, column: str) -> None:
    """What a cell promises that is not refused."""
    if column == pages.SECURE:
        hidden, plain = bench.ready(pair), bench.ready(replace(pair, aggregator=Sum(), demands=Demands()))
        assert tree.equal(bench.run(hidden), bench.run(plain)), "it is not the sum of the same integers"
        alone = bench.run(replace(plain, stages=plain.stages[:-1]))
        assert 0 < (gap := distance(bench.run(hidden), alone)) < 1e-3, f"it is off by more than rounding ({gap:.1e})"
        return
    calm, expected = map(bench.run, neutral(bench, pair, column))
    assert (gap := distance(calm, expected)) < 1e-9, f"neutral, it is not the aggregation alone ({gap:.1e})"
    moving, plain = set_apart(bench, pair, column)
    assert (gap := distance(bench.run(moving), bench.run(plain))) > 1e-6, f"it changes nothing ({gap:.1e})"


def test_every_aggregation_has_an_entry() -> None:
    missing = set(pages.aggregations()) - REFUSED.keys()
    assert not missing, f"say in REFUSED of {Path(__file__).name} which columns each of {sorted(missing)} refuses"
    assert REFUSED.keys() == set(pages.aggregations()), "a method of REFUSED is none of the catalog's"
    assert all(columns.keys() <= set(pages.columns()) for columns in REFUSED.values())


@pytest.mark.parametrize("column", pages.columns())
@pytest.mark.parametrize("method", pages.aggregations())
def test_cell(method: str, column: str, bench: Bench) -> None:
    assert method in REFUSED, "no entry, see test_every_aggregation_has_an_entry"
    found = pages.cell(method, column)
    if column not in REFUSED[method]:
        assert found.experiment is not None, found.reason
        works(bench, found.experiment, column)
        return
    assert found.experiment is None, f"{method} with {column} is listed as refused, but passes"
    sides = ({pages.RANKS: "rank 4", pages.SECURE: "but"}.get(column, column), REFUSED[method][column])
    assert all(side in found.reason for side in sides), found.reason
    assert len(found.reason) > 80 and "\n" not in found.reason


@pytest.mark.parametrize(("place", "method"), enumerate(pages.aggregations()))
def test_batched_it_ends_at_the_same(place: int, method: str, bench: Bench) -> None:
    """Beside one partner, another one for each method."""
    partners = [column for column in pages.columns() if column not in REFUSED[method]]
    moving, _ = set_apart(bench, cell_of(method, partners[place % len(partners)]), partners[place % len(partners)])
    assert distance(bench.run(moving, Batched(stack=3)), bench.run(moving)) < 1e-9


def cell_of(method: str, column: str) -> Experiment:
    experiment = pages.cell(method, column).experiment
    assert experiment is not None
    return experiment


def test_the_page_holds_every_cell() -> None:
    page = pages.filled((ROOT / "docs" / "reference" / "compatibility.md").read_text("utf-8"))
    assert pages.PLACE not in page
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    assert rows[0] == ["method", *pages.columns()]
    assert [row[0] for row in rows[2:]] == pages.aggregations()
    for method, *cells in rows[2:]:
        for column, cell in zip(pages.columns(), cells, strict=True):
            expected = r"no \(\d+\)" if column in REFUSED[method] else "yes"
            assert re.fullmatch(expected, cell), (method, column)


# Why what is refused is refused.


@pytest.mark.parametrize("method", pages.aggregations())
def test_a_method_says_whether_it_writes_factors_in_another_basis(method: str, bench: Bench, middle: Tree) -> None:
    """Where it does not, factors that begin with another sign end with another sign, round by round."""
    experiment = bench.ready(pages.alone(method))
    initial = load(experiment.task).with_constants(experiment.key).initial_params(experiment.key)
    start = {**initial, **{name: leaf for name, leaf in middle.items() if name in initial}}
    layers = low_rank.layers(initial)  # those of which a client trains both sides
    one, two = (course(experiment, leaves) for leaves in (start, mirrored(start, layers)))
    declared = any(Fact.FIXED_BASIS in stage.traits.loses for stage in experiment.stages)
    if declared:
        assert distance(products(one), products(two)) < 1e-9, "another sign is another result, whatever the basis"
    turned = distance(mirrored(one, layers), two)
    assert turned > 1e-6 if declared else turned < 1e-9, (
        f"FIXED_BASIS is lost: {declared}, but the factors turn by {turned:.1e}"
    )


def behind(experiment: Experiment, stage: Stage) -> Experiment:
    """With the stage behind the aggregation's own, where `check` does not let it stand."""
    *before, weigher = experiment.stages
    return replace(experiment, stages=(*before, stage, weigher))


def in_front(experiment: Experiment, stage: Stage) -> Experiment:
    return replace(experiment, stages=(stage, *experiment.stages))


def mirrored(leaves: Tree, layers: Sequence[str]) -> Tree:
    """The same products B A, the first component of each layer with the other sign on both sides, as far as they are
    among the leaves."""
    found = {name: leaf.clone() for name, leaf in leaves.items()}
    for layer in layers:
        for first in (found[name].T if name.endswith("B") else found[name] for name in sides(layer) if name in found):
            first[0] *= -1
    return found


def sides(layer: str) -> tuple[str, str]:
    return f"{layer}.{low_rank.A}", f"{layer}.{low_rank.B}"


def products(leaves: Tree) -> Tree:
    """As a layer computes with them: what was added to its frozen weight is in it."""
    return {
        layer: torch.matmul(*low_rank.pair(leaves, layer)) + leaves.get(f"{layer}.{SHIFT}", 0)
        for layer in low_rank.layers(leaves)
    }


@pytest.fixture(scope="module")
def middle(bench: Bench) -> Tree:
    """Weights in the middle of a run: no factor is zero."""
    experiment = bench.ready(pages.alone("flexlora"))
    initial = load(experiment.task).with_constants(experiment.key).initial_params(experiment.key)
    return course(experiment, initial)


def apart(experiment: Experiment, middle: Tree) -> float:
    """How far the products end from each other when the same ones are written in two ways at the start."""
    one, two = (products(course(experiment, leaves)) for leaves in (middle, mirrored(middle, low_rank.layers(middle))))
    return distance(one, two)


@pytest.mark.parametrize("name", ["", "prox"])
def test_flexlora_does_not_see_how_its_products_are_written(name: str, bench: Bench, middle: Tree) -> None:
    plain = bench.ready(pages.alone("flexlora"))
    assert apart(in_front(plain, CASES[name].stage) if name else plain, middle) < 1e-9


@pytest.mark.parametrize("method", ["flexlora", "fedsvd"])
@pytest.mark.parametrize("name", ONE_BASIS)
def test_what_is_refused_in_front_would_see_it(name: str, method: str, bench: Bench, middle: Tree) -> None:
    plain = bench.ready(pages.alone(method))
    wrong = in_front(plain, CASES[name].stage)
    assert apart(wrong, middle) > 1e-6


@pytest.mark.parametrize("stage", ["lora_stack", "lora_fair"])
@pytest.mark.parametrize("name", ONE_BASIS)
def test_what_stands_behind_a_stack_is_refused(name: str, stage: str) -> None:
    plain = pages.weighed(pages.alone("flexlora" if stage == "lora_stack" else stage), CASES[name].stage)
    reason = f"{name} keeps something for each entry of lora_A and lora_B, but {stage} before it takes them out of the"
    with pytest.raises(CheckError, match=reason):
        check(behind(plain, CASES[name].stage))


@pytest.mark.parametrize("name", [name for name in ONE_BASIS if name != "dyn"])  # dyn still pulls
def test_what_is_refused_behind_a_stack_would_change_nothing(name: str, bench: Bench) -> None:
    with pytest.raises(AssertionError, match="it changes nothing"):
        works(bench, behind(pages.alone("flexlora"), CASES[name].stage), name)


def test_a_partner_that_is_not_neutral_is_caught(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CASES, "momentum", replace(CASES["momentum"], neutral=Momentum(beta=0.0, server_lr=1.001)))
    with pytest.raises(AssertionError, match="neutral, it is not the aggregation alone"):
        works(bench, behind(pages.alone("fedit"), Momentum()), "momentum")
