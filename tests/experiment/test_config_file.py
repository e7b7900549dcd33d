"""Experiment files: what comes back is what was written, hashes name experiments, and errors name the place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.aggregators.base import Aggregator
from fedllm.data.partitioners.by import By
from fedllm.data.partitioners.iid import Iid
from fedllm.data.sampling import All, UniformSampling
from fedllm.data.shards import ClientOutage, Shards
from fedllm.engines.base import Engine
from fedllm.errors import ConfigError
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment import config_file
from fedllm.experiment.catalog import NOUNS
from fedllm.experiment.config_file import build, difference, dump, experiment_hash, load, override, parse
from fedllm.experiment.overrides import overridden
from fedllm.experiment.record import Demands, Experiment, Limits
from fedllm.experiment.yaml import read_yaml, write_yaml
from fedllm.messages.context import Profile
from fedllm.models.adapters.lora import Lora
from fedllm.models.adapters.lora_xs import LoraXs
from fedllm.models.adapters.soft_prompt import SoftPrompt
from fedllm.models.adapters.weights import Full
from fedllm.models.objectives.language_modeling import Lm
from fedllm.models.objectives.sft import Sft
from fedllm.models.task import Scope, Task
from fedllm.stages.base import Stage
from fedllm.stages.client_drift.prox import Prox
from fedllm.stages.personalization.keep import Keep
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.stages.weighting.uniform import Uniform
from fedllm.training.lr_schedule import LrSchedule
from fedllm.training.sgd import Sgd
from tests.strategies import PLAIN, components, experiments, placed

FILE = """\
task: {model: tiny-llama, adapter: {lora: {rank: 4, alpha: 8}}}
federation: {shards: {data: quickstart, heldout: quickstart-test, partition: {by: organisation}}}
work: {sgd: {optimizer: adamw, lr: 1e-2, steps: 2, batch_size: 4, max_length: 256}}
method: fedprox
evaluation: {metrics: [nll, exact_match], by: kind, compare: [local_only, centralised]}
rounds: 3
"""
BY_HAND = Experiment(
    task=Task("tiny-llama", adapter=Lora(rank=4, alpha=8)),
    federation=Shards("quickstart", heldout="quickstart-test", partition=By("organisation")),
    work=Sgd(optimizer="adamw", lr=0.01, steps=2, batch_size=4, max_length=256),
    stages=(Prox(), ByExamples()),
    evaluation=Evaluation(metrics=("nll", "exact_match"), by="kind", compare=("local_only", "centralised")),
    rounds=3,
)

CLASSES = [(noun, name) for noun, table in NOUNS.items() for name in table if noun is not Engine]  # no part of a file
every_component = pytest.mark.parametrize(("noun", "name"), CLASSES, ids=lambda it: it if isinstance(it, str) else "")
few = settings(max_examples=12)


# There and back


@every_component
@given(data=st.data())
@few
def test_every_component_comes_back_from_a_file_as_it_was(noun, name, data):
    experiment = placed(data.draw(components(NOUNS[noun][name])))
    plain = dump(experiment)
    back = build(plain)
    assert back == experiment
    assert dump(back) == json.loads(json.dumps(plain))
    assert build(parse(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))) == experiment
    assert experiment_hash(back) == experiment_hash(experiment)


@given(experiments)
@few
def test_a_whole_experiment_comes_back(experiment):
    assert build(parse(yaml.safe_dump(dump(experiment)))) == experiment


def test_a_file_equals_the_experiment_made_by_hand(tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    experiment = load(tmp_path / "it.yaml")
    assert experiment == BY_HAND
    assert experiment_hash(experiment) == experiment_hash(BY_HAND)


def test_packaged_recipes_load_by_name():
    for path in (Path(config_file.__file__).parent / "recipes").glob("*.yaml"):
        experiment = load(path.stem, [] if "data:" in path.read_text() else ["federation.shards.data=handbook"])
        assert build(dump(experiment)) == experiment


def test_what_a_run_folder_says_of_itself_is_ignored():
    spec = {"about": {"name": "x", "versions": {"torch": 1}}, **dump(BY_HAND)}
    assert build(spec) == BY_HAND


# The hash


@given(experiments, experiments)
@few
def test_hashes_are_equal_exactly_if_experiments_are(one, two):
    assert (experiment_hash(one) == experiment_hash(two)) == (one == two)


@given(experiments, st.randoms())
@few
def test_the_hash_does_not_see_the_order_of_keys(experiment, random):
    def shuffled(value):
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert experiment_hash(build(shuffled(dump(experiment)))) == experiment_hash(experiment)


def test_the_hash_does_not_see_defaults_written_out():
    short = parse(FILE)
    assert experiment_hash(build(short)) == experiment_hash(build(dump(build(short))))
    assert len(json.dumps(dump(build(short)))) > 2 * len(json.dumps(short))


@pytest.mark.parametrize(
    ("one", "two"), [(Sgd(lr=1, steps=1), Sgd(lr=1.0, steps=1)), (Sgd(steps=1), Sgd(steps=1, eps=1e-8))]
)
def test_equal_numbers_have_equal_hashes(one, two):
    assert experiment_hash(placed(one)) == experiment_hash(placed(two))


def test_the_hash_is_the_same_in_every_process_and_release():
    assert experiment_hash(PLAIN) == experiment_hash(PLAIN)
    assert len(experiment_hash(PLAIN)) == 64


def leaves_of(value, path=()):
    """(path, value) of every scalar and empty container of a plain value."""
    if isinstance(value, dict | list) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves_of(item, (*path, key))
    else:
        yield path, value


def changed(value, path, new):
    if not path:
        return new
    copy = list(value) if isinstance(value, list) else dict(value)
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


OTHERS = [True, False, 1, 2, 7, 0.5, 0.25, "x", "linear", "adamw", "run", "float64", "plain", "nll", "cohort", None]
OTHERS += ["singular", "int8", "local_only", "centralised", ["x"], ["y"], ["x", "y"], [0.5, 0.5], {"x": "y"}]
OTHERS += [{"unit": "example"}, {"clients": 3}, [{"train": ["x"]}]]
FULL = replace(
    BY_HAND,
    work=Sgd(steps=2),
    stages=(Keep(("*.b",)), Prox(), Uniform()),
    federation=replace(
        BY_HAND.federation,
        failures=(ClientOutage("a", 0),),
        sampling=UniformSampling(2),
        profiles={"a*": Profile(rank=3, device="x", steps=3, batch_size=3, lr=0.1, bandwidth=3)},
        devices={device: Profile(rank=3, steps=3, batch_size=3, lr=0.1, bandwidth=3) for device in ("x", "linear")},
    ),
)
ALONE = {"sft", "sum", "synchronous", "epochs"}  # components without settings; and what excludes another setting
SETTINGS = [(path, value) for path, value in leaves_of(dump(FULL)) if path[-1] not in ALONE]


@pytest.mark.parametrize(("path", "value"), SETTINGS, ids=[".".join(map(str, path)) for path, _ in SETTINGS])
def test_every_setting_changes_the_hash(path, value):
    made = []
    for other in OTHERS:
        try:
            made.append(build(changed(dump(FULL), path, other)))
        except ConfigError:
            continue
    hashes = {experiment_hash(experiment) for experiment in made if experiment != FULL}
    assert hashes and experiment_hash(FULL) not in hashes
    assert len(hashes) == len({json.dumps(dump(experiment)) for experiment in made if experiment != FULL})


def test_a_difference_names_the_keys_and_both_values():
    other = replace(BY_HAND, rounds=9, work=replace(BY_HAND.work, lr=0.5))
    assert difference(dump(BY_HAND), dump(other)) == ["work.sgd.lr: 0.01 there, 0.5 here", "rounds: 3 there, 9 here"]
    assert difference(dump(BY_HAND), dump(BY_HAND)) == []


# Short forms


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"stages": [{"keep": "*lora_B"}]}, {"stages": [{"keep": {"patterns": ["*lora_B"]}}]}),
        ({"stages": [{"keep": ["*a", "*b"]}]}, {"stages": [{"keep": {"patterns": ["*a", "*b"]}}]}),
        ({"stages": [{"prox": 0.01}]}, {"stages": [{"prox": {"mu": 0.01}}]}),
        ({"stages": ["prox"]}, {"stages": [{"prox": {}}]}),
        ({"stages": [{"prox": None}]}, {"stages": [{"prox": {}}]}),
        ({"federation": {"shards": "x"}}, {"federation": {"shards": {"data": "x"}}}),
        ({"task": {"model": "m", "adapter": {"lora": 4}}}, {"task": {"model": "m", "adapter": {"lora": {"rank": 4}}}}),
        ({"evaluation": {"metrics": "nll"}}, {"evaluation": {"metrics": ["nll"]}}),
        ({"task": {"model": "m", "scope": {"train": "*A"}}}, {"task": {"model": "m", "scope": {"train": ["*A"]}}}),
    ],
)
def test_short_forms_mean_the_long_ones(short, long):
    assert build({**dump(PLAIN), **short}) == build({**dump(PLAIN), **long})


# Strict types, and errors that name the place


def sgd(**settings):
    return {"work": {"sgd": {"steps": 1, **settings}}}


def shards(**settings):
    return {"federation": {"shards": {"data": "x", **settings}}}


WRONG = [
    ({"rounds": True}, "rounds is True: input should be a valid integer"),
    ({"rounds": "4"}, "rounds is '4': input should be a valid integer"),
    ({"rounds": 2.0}, "rounds is 2.0: input should be a valid integer"),
    ({"rounds": -1}, "rounds is -1; it must be 0 or more"),
    ({"round": 3}, "unknown key 'round'; did you mean 'rounds'?"),
    (sgd(lr="1e-3"), "work.sgd.lr is '1e-3': input should be a valid number"),
    (sgd(lr=True), "work.sgd.lr is True: input should be a valid number"),
    (sgd(optimiser="sgd"), "unknown key 'work.sgd.optimiser'; did you mean 'optimizer'?"),
    (sgd(optimizer="adam"), "work.sgd.optimizer is 'adam': input should be 'sgd' or 'adamw'"),
    (sgd(betas=[0.9]), "work.sgd.betas is [0.9]"),
    (sgd(lr_schedule={"warm": 1}), "unknown key 'work.sgd.lr_schedule.warm'; did you mean 'warmup'?"),
    (sgd(lr_schedule="cosine"), "work.sgd.lr_schedule must be a mapping, not 'cosine'"),
    ({"work": {"sdg": {"steps": 1}}}, "work: unknown work 'sdg'; did you mean 'sgd'?"),
    ({"work": {"sgd": {}, "other": {}}}, "work must be one name with its settings"),
    ({"work": 3}, "work must be one name with its settings, not 3"),
    ({"aggregator": None}, "aggregator must be one name with its settings, not None"),
    ({"aggregator": {"sum": 3}}, "aggregator.sum takes no settings, but 3 is given"),
    ({"task": {}}, "'task.model' is missing; set it"),
    ({"task": "tiny-llama"}, "task must be a mapping, not 'tiny-llama'"),
    ({"task": {"model": "m", "dtype": "fp32"}}, "task.dtype is 'fp32': input should be 'auto', 'float32'"),
    ({"task": {"model": "m", "adapter": {"lora": {"rank": 0}}}}, "task.adapter.lora.rank is 0; it must be 1 or more"),
    (shards(clients="4"), "federation.shards.clients is '4'"),
    (shards(heldout=True), "federation.shards.heldout is True"),
    (shards(failures=[{"client": "a", "round": 0, "cal": "w"}]), "unknown key 'federation.shards.failures[0].cal'"),
    (shards(profiles={"a": {"stps": 2}}), "unknown key 'federation.shards.profiles.a.stps'; did you mean 'steps'?"),
    (shards(profiles={"a*": {"rank": 0}}), "federation.shards.profiles.a*.rank is 0; it must be 1 or more"),
    (shards(profiles={"a": {"steps": -1}}), "federation.shards.profiles.a.steps is -1; it must be 0 or more"),
    (shards(profiles={"a": {"steps": "2"}}), "federation.shards.profiles.a.steps is '2': input should be a valid"),
    (shards(profiles={"a": {"batch_size": 0}}), "federation.shards.profiles.a.batch_size is 0; it must be 1 or more"),
    (shards(profiles={"a": {"lr": float("inf")}}), "federation.shards.profiles.a.lr is inf; it must be 0 or more and"),
    (shards(profiles={"a": 4}), "federation.shards.profiles.a must be a mapping, not 4"),
    (shards(profiles=["a"]), "federation.shards.profiles must be a mapping, not ['a']"),
    (shards(partition={"dirichlet": {"by": "y"}}), "'federation.shards.partition.dirichlet.alpha' is missing; set it"),
    (shards(partition="idd"), "federation.shards.partition: unknown partitioner 'idd'; did you mean 'iid'?"),
    (shards(split="iid"), "unknown key 'federation.shards.split'; did you mean 'partition'?"),
    ({"stages": "prox"}, "stages must be a list, not 'prox'"),
    ({"stages": ["uniform", "proxy"]}, "stages[1]: unknown stage 'proxy'; did you mean 'prox'?"),
    ({"stages": ["uniform", {"top_k": 2}]}, "stages[1].top_k.fraction is 2.0; it must be above 0 and at most 1"),
    ({"stages": [{"prox": {"mu": float("nan")}}]}, "stages[0].prox.mu is nan; it must be at least 0 and finite"),
    ({"stages": [{"keep": []}]}, "stages[0].keep.patterns is (); it must be a list"),
    ({"evaluation": {"metrics": [1]}}, "evaluation.metrics is [1]: input should be a valid string"),
    ({"evaluation": {"every": 0}}, "evaluation.every is 0; it must be 1 or more"),
    ({"evaluation": {"limit": 0}}, "evaluation.limit is 0; it must be 1 or more, or null for all records"),
    ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size is 0; it must be 1 or more"),
    ({"evaluation": {"compare": ["local"]}}, "evaluation.compare is ['local']: input should be 'local_only', 'fedavg'"),
    ({"evaluation": {"compare_lr": [0.0]}}, "evaluation.compare_lr holds 0.0; learning rates must be above 0"),
    ({"evaluation": {"best": "rouge_l"}}, "evaluation.best is rouge_l, which is not among evaluation.metrics"),
    ({"limits": {"quorum": 0}}, "limits.quorum is 0; it must be 1 or more"),
    ({"limits": {"bytes": 0}}, "limits.bytes is 0; it must be above 0, or null for no limit"),
    ({"limits": {"seconds": float("nan")}}, "limits.seconds is nan; it must be above 0"),
    ({"demands": {"secrecy": "yes"}}, "demands.secrecy is 'yes': input should be a valid boolean"),
    ({"demands": {"privacy": True}}, "demands.privacy must be a mapping, not True"),
    ({"demands": {"privacy": {"target_epsilon": 0.0}}}, "demands.privacy.target_epsilon is 0.0; it must be above 0"),
    ({"demands": {"privacy": {"target_delta": 1.0}}}, "demands.privacy.target_delta is 1.0; it must be between 0"),
    ({"demands": {"privacy": {"unit": "user"}}}, "demands.privacy.unit is 'user': input should be 'client' or"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_refused_by_its_dotted_key(change, message):
    with pytest.raises(ConfigError) as caught:
        build({**dump(PLAIN), **change})
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_neither_a_method_nor_stages():
    spec = dump(PLAIN)
    del spec["stages"]
    with pytest.raises(ConfigError, match="an experiment needs 'method'"):
        build(spec)


def test_an_error_names_the_file_and_the_key(tmp_path):
    (tmp_path / "mine.yaml").write_text(FILE.replace("lr: 1e-2", "lr: fast"))
    with pytest.raises(ConfigError, match=r"^mine.yaml: work.sgd.lr is 'fast': input should be a valid number$"):
        load(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match=r"^mine.yaml: unknown key 'work.sgd.stepz'; did you mean 'steps'\?$"):
        load(tmp_path / "mine.yaml", ["work.sgd.stepz=3"])


def test_a_file_that_is_not_there_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(FILE)
    with pytest.raises(ConfigError, match=r"no file or packaged recipe 'mine\.yml'; did you mean 'mine\.yaml'"):
        load("mine.yml")
    with pytest.raises(ConfigError, match="no file or packaged recipe 'quickstrat'; did you mean 'quickstart'"):
        load("quickstrat")


def test_a_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(FILE.encode() + "# caf\xe9".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"^latin.yaml: it is not UTF-8 text"):
        load(tmp_path / "latin.yaml")
    (tmp_path / "bom.yaml").write_bytes(FILE.encode("utf-8-sig"))
    assert load(tmp_path / "bom.yaml") == BY_HAND


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 0.001), ("1E5", 1e5), ("-2.5e+3", -2500.0), ("1.", 1.0), (".5", 0.5), ("1_000", 1000)),
        *(("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("n", "n"), ("true", True), ("False", False)),
        *(("010", "010"), ("0x1f", "0x1f"), ("1:30", "1:30"), ("2024-05-01", "2024-05-01"), ("1.2.3", "1.2.3")),
        *(("null", None), ("~", None), ("", None), ("'1'", "1"), (".inf", float("inf")), ("[a, 1]", ["a", 1])),
    ],
)
def test_yaml_is_read_as_people_mean_it(text, value):
    found = read_yaml(f"x: {text}")["x"]
    assert (found, type(found)) == (value, type(value))


@given(st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.none()))
def test_numbers_that_python_writes_are_read_as_they_are(value):
    for text in (yaml.safe_dump({"x": value}), json.dumps({"x": value})):
        found = read_yaml(text)["x"]
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rounds: 1\nseed: 0\nrounds: 2\n", "line 3: the key 'rounds' is given twice"),
        ("work: {sgd: {lr: 1, lr: 2}}", "line 1: the key 'lr' is given twice"),
        ("work:\n\tsgd: 1\n", "line 2: it is not YAML: found character '\\t' that cannot start any token; indent with"),
        ("a: [1, 2", "line 1: it is not YAML"),
        ("\nshare: *lora_A", "line 2: it is not YAML: found undefined alias 'lora_A'; put text that begins with * in"),
        ("share: !*lora_A", "line 1: it is not YAML"),
        ("share: !lora", "line 1: it is not YAML: could not determine a constructor for the tag '!lora'; put text"),
        ("a: !!python/object/apply:os.system [ls]", "line 1: it is not YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "line 2: it is not YAML"),
        ("[" * 500, "it is not YAML"),
        ("a: !!int x", "it is not YAML"),
        ("- 1", "an experiment is a mapping with the keys"),
        ("", "an experiment is a mapping with the keys"),
    ],
)
def test_yaml_that_is_wrong_is_refused_with_its_line(text, message):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert str(caught.value).startswith(message)


def test_a_value_that_holds_itself_is_refused():
    spec = parse("task: {model: m}\nfederation: {shards: {data: x, fields: {}}}\nwork: sgd\nstages: []")
    fields = spec["federation"]["shards"]["fields"]
    fields["a"] = fields
    with pytest.raises(ConfigError, match=r"federation\.shards\.fields is"):
        build(spec)


# Overrides


@pytest.mark.parametrize(
    ("change", "part", "value"),
    [
        ("rounds=7", lambda e: e.rounds, 7),
        ("work.sgd.lr=1e-4", lambda e: (e.work.lr, e.work.steps), (1e-4, 2)),
        ("work.sgd.lr_schedule.shape=cosine", lambda e: e.work.lr_schedule, LrSchedule("cosine")),
        ("task.adapter.lora.alpha=9", lambda e: e.task.adapter, Lora(rank=4, alpha=9.0)),
        ("task.adapter=full", lambda e: e.task.adapter, Full()),
        ("task.adapter={lora: {rank: 2}}", lambda e: e.task.adapter, Lora(rank=2)),
        ("task.adapter.soft_prompt=5", lambda e: e.task.adapter, SoftPrompt(tokens=5)),
        ("task.adapter.soft_prompt.init=normal", lambda e: e.task.adapter, SoftPrompt(init="normal")),
        ("task.objective=lm", lambda e: e.task.objective, Lm()),
        ("task.scope.freeze=!*lora_A", lambda e: e.task.scope, Scope(freeze=("!*lora_A",))),
        ("task.scope.share=*lora_A", lambda e: e.task.scope, Scope(share=("*lora_A",))),
        ("federation.shards.partition={iid: {}}", lambda e: e.federation.partition, Iid()),
        ("federation.shards.partition.by.min_size=3", lambda e: e.federation.partition, By("organisation", 3)),
        ("federation.shards.sampling.uniform=2", lambda e: e.federation.sampling, UniformSampling(2)),
        ("federation.shards.sampling.uniform.cohort=3", lambda e: e.federation.sampling, UniformSampling(3)),
        ("federation.shards.fields.prompt=q", lambda e: e.federation.fields, {"prompt": "q"}),
        ("federation.shards.profiles={bank: {rank: 2}}", lambda e: e.federation.profile("bank"), Profile(rank=2)),
        ("federation.shards.profiles.bank.lr=0.5", lambda e: e.federation.profile("bank"), Profile(lr=0.5)),
        ("federation.shards.heldout=0.2", lambda e: e.federation.heldout, 0.2),
        ("evaluation.compare=[]", lambda e: (e.evaluation.compare, e.evaluation.by), ((), "kind")),
        ("evaluation.metrics=[nll]", lambda e: e.evaluation.metrics, ("nll",)),
        ("evaluation.every=1", lambda e: e.evaluation.every, 1),
        ("evaluation.by=null", lambda e: e.evaluation.by, None),
        ("limits.quorum=2", lambda e: e.limits, Limits(quorum=2)),
        ("method=fedavg", lambda e: e.stages, (ByExamples(),)),
        ("method={fedprox: {mu: 1}}", lambda e: e.stages[0], Prox(mu=1.0)),
        ("method.fedprox.mu=2", lambda e: e.stages[0], Prox(mu=2.0)),
        ("method.scaffold.denominator=cohort", lambda e: e.stages[1], Uniform("cohort")),
        ("method.fedavgm=null", lambda e: e.stages[0].beta, 0.9),
    ],
)
def test_overrides(change, part, value, tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    assert part(load(tmp_path / "it.yaml", [change])) == value


@pytest.mark.parametrize("change", ["work.sgd.lr=0.01", "task.adapter.lora.rank=4", "method=fedprox", "rounds=3"])
def test_an_override_to_what_is_there_changes_nothing(change, tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    assert load(tmp_path / "it.yaml", [change]) == BY_HAND


@pytest.mark.parametrize(
    ("short", "change", "adapter"),
    [
        ("lora", "task.adapter.lora.rank=2", Lora(rank=2)),
        ("{lora: }", "task.adapter.lora.rank=2", Lora(rank=2)),
        ("{lora: 4}", "task.adapter.lora.alpha=3", Lora(rank=4, alpha=3.0)),
        ("full", "task.adapter.lora.alpha=3", Lora(alpha=3.0)),
        ("{lora: {alpha: 3}}", "task.adapter={lora: {rank: 2}}", Lora(rank=2)),
    ],
)
def test_an_override_goes_into_short_forms(short, change, adapter):
    text = FILE.replace("{lora: {rank: 4, alpha: 8}}", short)
    assert build(overridden(parse(text), change)).task.adapter == adapter


def test_overrides_add_up_in_order(tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    changes = ["task.adapter.lora.rank=2", "task.adapter.lora.alpha=1", "task.adapter.lora.rank=3", "seed=5"]
    experiment = load(tmp_path / "it.yaml", changes)
    assert (experiment.task.adapter, experiment.seed) == (Lora(rank=3, alpha=1.0), 5)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (["method=full"], Full),
        (["method=fed_sb"], LoraXs),
        (["method={fed_sb: }"], LoraXs),
        (["method=fedit"], Lora),
        (["method=fedprox"], Lora),
        (["task.adapter=full", "method=full"], Full),
        (["method=fed_sb", "task.adapter.lora_xs.rank=2"], LoraXs),
        (["task.adapter=full"], Full),
    ],
)
def test_a_method_of_the_command_line_brings_its_adapter(changes, kind, tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    assert type(load(tmp_path / "it.yaml", changes).task.adapter) is kind


def test_an_adapter_that_the_command_line_names_is_not_replaced(tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    with pytest.raises(ConfigError, match=r"method full needs the adapter full, but the file sets task\.adapter to"):
        load(tmp_path / "it.yaml", ["method=full", "task.adapter.lora.rank=2"])


def test_an_override_gives_what_a_file_lacks(tmp_path):
    (tmp_path / "it.yaml").write_text(FILE.replace("data: quickstart, ", "").replace("work:", "#"))
    with pytest.raises(ConfigError, match=r"it\.yaml: '(work|federation\.shards\.data)' is missing"):
        load(tmp_path / "it.yaml")
    experiment = load(tmp_path / "it.yaml", ["federation.shards.data=handbook", "work.sgd.steps=3"])
    assert (experiment.federation.data, experiment.work) == ("handbook", Sgd(steps=3))


def test_an_override_reaches_into_a_list_by_place():
    text = FILE.replace("method: fedprox", "stages: [prox, {top_k: 0.5}, uniform]")
    spec = overridden(parse(text), "stages.0.prox.mu=3")
    spec = overridden(spec, "stages.2=by_examples")
    experiment = build(overridden(spec, "stages.1.top_k.feedback=false"))
    assert (experiment.stages[0], experiment.stages[1].feedback, experiment.stages[2]) == (
        Prox(3.0),
        False,
        ByExamples(),
    )
    assert parse(text) == parse(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("rounds", "'rounds' is not of the form dotted.key=value"),
        ("=3", "'=3' is not of the form"),
        ("work..lr=3", "'work..lr=3' is not of the form"),
        ("rouds=3", "unknown key 'rouds'; did you mean 'rounds'?"),
        ("work.sgd.batchsize=3", "unknown key 'work.sgd.batchsize'; did you mean 'batch_size'?"),
        ("work.sdg.lr=3", "work: unknown work 'sdg'; did you mean 'sgd'?"),
        ("work.lr=3", "work: unknown work 'lr'"),
        ("rounds.x=3", "unknown key 'rounds.x': rounds is one value"),
        ("evaluation.metrics.0=nll", "unknown key 'evaluation.metrics.0': evaluation.metrics is one value"),
        ("task.adapter.lora.inits=3", "unknown key 'task.adapter.lora.inits'; did you mean 'init'?"),
        ("stages.0.prox.mu=3", "'stages.0' cannot be set: the file gives no list 'stages'"),
        ("method.fedprx.mu=3", "unknown method 'fedprx'; did you mean 'fedprox'?"),
        ("method.fedprox.nu=3", "method fedprox has no setting 'nu'"),
        ("method.fedprox.mu.x=3", "method fedprox has no setting 'mu.x'"),
        ("rounds=[1", "the value of 'rounds=[1' cannot be read: line 1: it is not YAML"),
        ("rounds=many", "rounds is 'many': input should be a valid integer"),
        ("stages=[by_examples]", "method fedprox sets stages to"),
    ],
)
def test_overrides_that_are_wrong_are_refused(change, message, tmp_path):
    (tmp_path / "it.yaml").write_text(FILE)
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "it.yaml", [change])
    assert str(caught.value).startswith(f"it.yaml: {message}")


def test_a_place_that_a_list_has_not():
    spec = {"stages": ["prox"]}
    for place in ("1", "x", "-1"):
        with pytest.raises(ConfigError, match=f"'stages.{place}' is no place in the list 'stages', which has 0 to 0"):
            overridden(spec, f"stages.{place}=prox")


def test_an_experiment_can_be_overridden():
    changed = override(BY_HAND, ["work.sgd.lr=0.5", "stages.0.prox.mu=1", "task.adapter.lora.rank=2"])
    expected = replace(BY_HAND, stages=(Prox(1.0), ByExamples()), work=replace(BY_HAND.work, lr=0.5))
    assert changed == replace(expected, task=replace(BY_HAND.task, adapter=Lora(rank=2, alpha=8.0)))
    assert override(BY_HAND, []) == BY_HAND


@given(experiments, st.sampled_from(["rounds=5", "seed=6", "evaluation.every=4", "limits.quorum=3"]))
@few
def test_an_override_changes_one_setting_alone(experiment, change):
    key, _, value = change.partition("=")
    found = difference(dump(experiment), dump(override(experiment, [change])))
    assert all(line.startswith(f"{key}: ") and line.endswith(f"{value} here") for line in found)
    assert len(found) <= 1


# Files beside the experiment's file


def project(folder: Path) -> Path:
    """A project with data, a model and an adapter beside the experiment's file."""
    (folder / "models" / "mine").mkdir(parents=True)
    (folder / "adapter").mkdir()
    (folder / "train.jsonl").write_text("")
    text = FILE.replace("data: quickstart, heldout: quickstart-test", "data: train.jsonl, heldout: quickstart-test")
    text = text.replace("tiny-llama", "models/mine").replace("alpha: 8", "alpha: 8, init_from: adapter")
    (folder / "it.yaml").write_text(text)
    return folder / "it.yaml"


def paths_of(experiment: Experiment) -> tuple[str, ...]:
    federation, task = experiment.federation, experiment.task
    return federation.data, federation.heldout, task.model, task.adapter.init_from


def test_relative_paths_are_found_beside_the_file(tmp_path, monkeypatch):
    project(tmp_path / "exp")
    monkeypatch.chdir(tmp_path)
    assert paths_of(load("exp/it.yaml")) == ("exp/train.jsonl", "quickstart-test", "exp/models/mine", "exp/adapter")
    folder = tmp_path / "exp"
    assert paths_of(load(folder / "it.yaml"))[0] == str(folder / "train.jsonl")


def test_the_working_directory_comes_first_and_a_packaged_name_before_both(tmp_path, monkeypatch):
    project(tmp_path / "exp")
    (tmp_path / "exp" / "quickstart-test").mkdir()
    (tmp_path / "train.jsonl").write_text("")
    monkeypatch.chdir(tmp_path)
    assert paths_of(load("exp/it.yaml"))[:2] == ("train.jsonl", "quickstart-test")


def test_what_is_found_nowhere_stays_as_it_was_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = project(tmp_path / "exp")
    file.write_text(file.read_text().replace("train.jsonl", "org/name:train"))
    assert paths_of(load("exp/it.yaml"))[0] == "org/name:train"


def test_a_project_has_the_same_hash_wherever_it_stands(tmp_path, monkeypatch):
    hashes = set()
    for place in ("here", "there/below"):
        project(tmp_path / place / "exp")
        monkeypatch.chdir(tmp_path / place)
        hashes.add(experiment_hash(load("exp/it.yaml")))
        hashes.add(experiment_hash(load("./exp/it.yaml")))
    assert len(hashes) == 1
    other = load("exp/it.yaml", ["rounds=9"])
    assert experiment_hash(other) not in hashes


def test_the_recorded_experiment_finds_its_files_again(tmp_path, monkeypatch):
    project(tmp_path / "exp")
    monkeypatch.chdir(tmp_path)
    experiment = load("exp/it.yaml")
    assert build(dump(experiment)) == experiment
    assert Path(experiment.federation.data).is_file()


# Components of one's own, in Python


@dataclass(frozen=True)
class Half(Stage):
    """A stage that no catalog knows."""

    share: float = 0.5


@dataclass(frozen=True)
class Odd(Stage):
    thing: Any = None


@dataclass(frozen=True)
class Nested(Stage):
    inner: LrSchedule = LrSchedule()
    table: Mapping[str, Any] = field(default_factory=dict)


def test_a_class_of_ones_own_is_recorded_by_its_place():
    (entry,) = dump(replace(PLAIN, stages=(Half(0.25),)))["stages"]
    assert entry == {f"{__name__}:Half": {"share": 0.25}}
    assert experiment_hash(replace(PLAIN, stages=(Half(0.25),))) != experiment_hash(replace(PLAIN, stages=(Half(),)))
    (entry,) = dump(replace(PLAIN, stages=(Nested(),)))["stages"]
    assert entry[f"{__name__}:Nested"]["inner"]["shape"] == "constant"


@pytest.mark.parametrize("name", ["tests.test_config:Half", "os.system", "fedllm.stages.client_drift.prox:Prox"])
def test_a_file_may_not_name_code(name):
    with pytest.raises(ConfigError) as caught:
        build({**dump(PLAIN), "stages": [{name: {}}]})
    assert str(caught.value).startswith(f"stages[0]: '{name}' names Python code, and a file may only name what fedllm")
    assert str(caught.value).endswith("run an experiment with your own stage from Python")


@pytest.mark.parametrize("thing", [Path("x"), {1, 2}, object(), b"x", Half])
def test_a_component_may_hold_plain_values_alone(thing):
    with pytest.raises(ConfigError, match=r"stages.*Odd.thing is .*, of type .*; an experiment holds text, numbers"):
        dump(replace(PLAIN, stages=(Odd(thing),)))


def test_defaults_are_those_of_the_design():
    assert (PLAIN.aggregator, PLAIN.task.objective, PLAIN.federation.sampling) == (
        NOUNS[Aggregator]["sum"](),
        Sft(),
        All(),
    )
    assert (PLAIN.seed, PLAIN.limits, PLAIN.evaluation, PLAIN.demands) == (0, Limits(), Evaluation(), Demands())


@pytest.mark.parametrize(
    "text", ["1e3", "010", "no", "null", "true", "~", "", ".5", "a: b", "# x", "*a", "ü\nb", "2024-05-01"]
)
def test_written_text_is_read_as_text(text: str) -> None:
    value = {"a": [text, 1, 1e-3, None, True, 1.5], "b": {text: text}}
    assert read_yaml(write_yaml(value)) == value
