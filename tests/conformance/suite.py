"""What every stage must do. Each check takes a case and the bench, and fails with an AssertionError."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import FrozenInstanceError, fields, replace

import torch
from torch import Tensor

from fedllm.experiment.config_file import dump, experiment_hash
from fedllm.experiment.reader import ConfigReader
from fedllm.messages import serialization
from fedllm.messages.context import ClientContext, RoundContext
from fedllm.messages.traits import Fact
from fedllm.messages.update import Part, Update
from fedllm.rng import Key
from fedllm.stages.round_trip import decode_all, encode_all
from fedllm.stages.weighting.uniform import Uniform
from fedllm.tensors import tree
from tests.conformance.bench import UNEQUAL, Bench, Course, come_to, flat, sent_by
from tests.conformance.books import fedavg, play
from tests.conformance.table import Case

DRAWS = 400


def neutral_is_fedavg(case: Case, bench: Bench) -> None:
    """To the bit, at neutral settings."""
    if case.neutral is None:
        return
    course = bench.run(case.pipeline(case.neutral), sizes=case.sizes)
    for run, expected in zip(course.after[1:], fedavg(bench, case.sizes), strict=True):
        assert torch.equal(flat(run.params), expected), "at its neutral settings a run is not FedAvg to the bit"


def settings_matter(case: Case, bench: Bench) -> None:
    """At other settings a run differs."""
    if case.exact or (case.stage == case.neutral and case.sizes == UNEQUAL):
        return  # FedAvg itself
    moved = apart(come_to(bench.run(case.pipeline()).after[-1]), fedavg(bench)[-1])
    assert moved > 1e-4, f"at other settings a run is FedAvg all the same ({moved:.1e})"


def equals_its_paper(case: Case, bench: Bench) -> None:
    """Round by round, in the last digits of float64; or, of a stage that rounds, to its grid in the first round."""
    course = bench.run(case.pipeline())
    if case.book is None:
        assert case.rounding is not None, "a case needs the paper's loop, or the rounding that the stage declares"
        start, exact = bench.fresh(), fedavg(bench)[0]
        deltas = [n * float(bench.trained(k, 0, start).abs().max()) for k, n in UNEQUAL]
        bound = case.rounding * sum(deltas) / sum(n for _, n in UNEQUAL)
        error = float((flat(course.after[1].params) - exact).abs().max())
        assert 0 < error <= bound, f"the first round is off by {error:.1e}, its declared rounding is {bound:.1e}"
        return
    for run, expected in zip(course.after[1:], play(case.book(case.stage), bench), strict=True):
        error = distance(come_to(run), expected)
        assert error < 1e-10, f"it differs from the paper's loop by {error:.1e} in round {run.round - 1}"


def is_a_value(case: Case, bench: Bench) -> None:
    """Equal, hashable, printable, frozen, of plain values, and the same after a trip through a file."""
    stage = case.stage
    twin = replace(stage)
    assert (twin, hash(twin), repr(twin)) == (stage, hash(stage), repr(stage)), "copies differ"
    assert all(repr(stage.__dict__[item.name]) in repr(stage) for item in fields(stage)), "its settings are not shown"
    if fields(stage):
        try:
            setattr(stage, fields(stage)[0].name, 0)
        except FrozenInstanceError:
            pass
        else:
            raise AssertionError("its settings can be changed")
    (settings,) = dump(bench.experiment([stage]))["stages"][0].values()
    back = ConfigReader().record(type(stage), json.loads(json.dumps(settings)), "stage")
    assert back == stage, "it comes back from a file as something else"
    one, two = (experiment_hash(bench.experiment([same])) for same in (stage, back))
    assert one == two, "its hash is not stable"


def evaluation_passes(case: Case, bench: Bench) -> None:
    """Scores travel as they are; an evaluation changes neither memory nor state."""
    site, prepared = bench.visit(case.pipeline())
    scores = {"sum/nll": torch.tensor(8.0, dtype=torch.float64), "count/nll": torch.tensor(4.0, dtype=torch.float64)}
    local = replace(prepared.local, facts={"examples": 1.0, "steps": 0.0, "lr_sum": 0.0, "tokens": 0.0})
    sent, memories = encode_all(
        site.stages, Update({"metrics": Part(scores, 0.0)}), prepared.arrival, prepared.memories, local
    )
    plain = Fact.INTEGERS not in case.stage.traits.gives
    assert not plain or sent.parts.keys() == {"metrics"}, f"an evaluation sends {sorted(sent.parts)}"
    assert all(map(tree.equal, memories, prepared.memories)), "an evaluation changes what a client remembers"
    run = bench.run(case.pipeline()).after[1]
    total, states = decode_all(site.stages, sent, run.params, run.states, RoundContext(1, Key(0), 2, 2))
    assert total.parts.keys() == {"metrics"} and tree.equal(total.parts["metrics"].tree, scores), "scores are changed"
    assert all(map(tree.equal, states, run.states)), "an evaluation changes the server's state"


def empty_rounds_are_harmless(case: Case, bench: Bench) -> None:
    """Nobody answers: in the first round nothing moves, in a later one nothing becomes NaN."""
    first = bench.run(case.pipeline(), lost=(0,))
    assert tree.equal(first.after[0].params, first.after[1].params), "an empty first round moves the parameters"
    for course in (first, bench.run(case.pipeline(), lost=(1,))):
        assert all(tree.finite(held) for run in course.after for held in (run.params, *run.states)), "not finite"


def resumes_to_the_bit(case: Case, bench: Bench) -> None:
    """From every round: one run, stopped and resumed at each."""
    whole = bench.run(case.pipeline())
    resumed = bench.start(bench.experiment(case.pipeline()), in_pieces=True)
    for one, two in zip(whole.after, resumed.after, strict=True):
        same = torch.equal(come_to(one), come_to(two)) and all(map(tree.equal, one.states, two.states))
        assert same and one.seen == two.seen, f"stopped and resumed, it goes another way before round {two.round}"


def shares_no_storage(case: Case, bench: Bench) -> None:
    """What is sent may be written to: no tensor of it lives in what the client or the server keeps.

    Behind the stage every client weighs 1, which hands tensors on as they are.
    """
    weigher = case.weigher if isinstance(case.weigher, Uniform) else Uniform()
    site, prepared = bench.visit(replace(case, weigher=weigher).pipeline())
    sent, memories = sent_by(site, prepared)
    kept = [*memories, *prepared.memories, *prepared.arrival.scratch, prepared.job.initial, site.fresh]
    shared = storages(part.tree for part in sent.parts.values()) & storages(kept)
    assert not shared, "a tensor is both sent and remembered"


def survives_the_wire(case: Case, bench: Bench) -> None:
    """What is sent arrives with the same bits."""
    sent, _ = sent_by(*bench.visit(case.pipeline()))
    back = serialization.deserialize(serialization.serialize(sent))
    assert isinstance(back, Update) and back.parts.keys() == sent.parts.keys()
    for name, part in sent.parts.items():
        assert tree.equal(back.parts[name].tree, part.tree), f"part '{name}' arrives changed"
        assert (back.parts[name].weight, back.parts[name].wire_format.bits) == (part.weight, part.wire_format.bits)


def takes_out_what_it_makes(case: Case, bench: Bench) -> None:
    """The parts beyond the work's own are those that it declares, and its own decode removes them."""
    site, prepared = bench.visit(case.pipeline())
    sent, _ = sent_by(site, prepared)
    if Fact.INTEGERS in case.stage.traits.gives:  # all parts become integers together, and come back
        sent = decode_all(site.stages[-1:], wire_copy(sent), {}, [{}], RoundContext(0, Key(0), 2, 2))[0]
    makes = {part for stage in site.stages for part in stage.traits.makes}
    made = sent.parts.keys() - site.experiment.work.traits.makes
    assert makes - case.in_some_rounds <= made <= makes, "it makes other parts than it declares"
    run = bench.run(case.pipeline()).after[1]
    total, _ = decode_all(site.stages, wire_copy(sent), run.params, run.states, RoundContext(1, Key(0), 2, 2))
    left = total.parts.keys() - ({"base_delta"} if Fact.WRITABLE_BASE in case.stage.traits.needs else set())
    assert left == site.experiment.work.traits.makes - {"scalars"}, "its decode leaves a part of its own"


def declares_its_shape(case: Case, bench: Bench) -> None:
    """A delta is shaped like the parameters, or the stage says that it is not."""
    site, prepared = bench.visit(case.pipeline())
    sent, _ = sent_by(site, prepared)
    if Fact.INTEGERS in case.stage.traits.gives:  # all parts become integers together, and come back
        sent = decode_all(site.stages[-1:], sent, {}, [{}], RoundContext(0, Key(0), 2, 2))[0]
    delta = sent.parts["delta"].tree
    shapes = {name: leaf.shape for name, leaf in site.fresh.items()}
    shaped = (bool(delta) or "delta" in case.in_some_rounds) and all(
        leaf.shape == shapes.get(name) for name, leaf in delta.items()
    )
    assert shaped == case.keeps_space == (Fact.SHAPE not in case.stage.traits.loses), (
        "the shape of its delta is not what it declares"
    )


def rounds_without_bias(case: Case, bench: Bench) -> None:
    """The mean over many draws is the value itself, within 5 standard errors of a grid step."""
    if case.rounding is None:
        return
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(256, generator=generator, dtype=torch.float64) - 0.5
    total = torch.zeros_like(values)
    for draw in range(DRAWS):
        update = Update({"delta": Part({"w": values.clone()}, 1.0)})
        ctx = RoundContext(draw, Key(2), 1, 1)
        sent, _ = case.stage.encode(update, {}, {}, ClientContext(ctx))
        total += case.stage.decode(sent, {}, {}, ctx)[0].parts["delta"].tree["w"]
    step = case.rounding * 0.5
    worst = float((total / DRAWS - values).abs().max())
    assert worst < 5 * step / 2 / DRAWS**0.5, f"the mean of {DRAWS} draws is off by {worst:.1e}"


CHECKS: dict[str, Callable[[Case, Bench], None]] = {
    check.__name__: check
    for check in (
        neutral_is_fedavg,
        settings_matter,
        equals_its_paper,
        is_a_value,
        evaluation_passes,
        empty_rounds_are_harmless,
        resumes_to_the_bit,
        shares_no_storage,
        survives_the_wire,
        takes_out_what_it_makes,
        declares_its_shape,
        rounds_without_bias,
    )
}

OF_ENGINES = (empty_rounds_are_harmless.__name__, resumes_to_the_bit.__name__)  # those that an engine has a part in


def apart(one: Tensor, two: Tensor) -> float:
    """Relative to the second, which may lack what was added to frozen weights."""
    return distance(one, torch.cat([two, two.new_zeros(len(one) - len(two))]))


def distance(one: Tensor, two: Tensor) -> float:
    """Relative to the second."""
    return float((one - two).norm() / two.norm())


def memories(course: Course) -> dict[str, bytes]:
    """What all clients remember at the end, as files."""
    folder = course.folder / "checkpoints" / "clients"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def storages(trees: Iterable[Mapping[str, Tensor]]) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaves in trees for leaf in leaves.values() if leaf.numel()}


def wire_copy(update: Update) -> Update:
    back = serialization.deserialize(serialization.serialize(update))
    assert isinstance(back, Update)
    return back
