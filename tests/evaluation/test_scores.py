"""Held-out scores of a tiny model against plain transformers, chance, and swapped labels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import fedllm.models.loaded_model as models
from fedllm.data.federation import Population
from fedllm.data.shards import Shards
from fedllm.errors import ConfigError, DataError, LocatedRecord
from fedllm.evaluation.record_length import Unfit
from fedllm.evaluation.scores import Scorer, check_metrics
from fedllm.evaluation.settings import Evaluation
from fedllm.experiment.config_file import build
from fedllm.experiment.record import Experiment
from fedllm.models.chat_turns import response_text
from fedllm.models.loaded_model import LoadedModel
from fedllm.models.task import Task
from fedllm.models.templates import prompt_text
from fedllm.stages.weighting.by_examples import ByExamples
from fedllm.training.sgd import Sgd

RECORDS = [
    {"prompt": "What colour is the badge?", "response": "teal", "kind": "private"},
    {"prompt": "Which day?", "response": "Tuesday", "kind": "shared"},
    {"prompt": "Who counts the coins at night?", "response": "the owl", "kind": "private"},
]
CHOICES = [
    {
        "prompt": f"Pick the right one, number {n}.",
        "choices": ["red", "green gold", "blue sky at night"],
        "answer": n % 3,
    }
    for n in range(6)
]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return models._load.__wrapped__(Task("tiny-llama", dtype="float64"), "")


@pytest.fixture(scope="module")
def uniform() -> LoadedModel:
    """A model whose logits are all the same."""
    made = models._load.__wrapped__(Task("tiny-llama", dtype="float64"), "")
    made.base.model.get_output_embeddings().weight.zero_()
    return made


def scorer(*metrics: str, **settings: object) -> Scorer:
    groups = ("private", "shared") if "by" in settings else ()
    return Scorer(Evaluation(metrics=metrics, **settings), 256, groups)


def figures(chosen: Scorer, model: LoadedModel, records: list[dict]) -> dict[str, float]:
    return chosen.figures(chosen.sums(model, {}, records))


def plain_nll(model: LoadedModel, record: dict) -> list[float]:
    """Labelled tokens' losses through transformers alone: the whole sequence, logits of every position."""
    tokenizer = model.base.tokenizer
    prompt = tokenizer(prompt_text(record, tokenizer, "chat"), add_special_tokens=False)["input_ids"]
    answer = tokenizer(response_text(record) + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + answer])
    with torch.no_grad():
        logits = model.base.model(input_ids=ids).logits[0]
    logs = logits.log_softmax(-1)
    return [-float(logs[len(prompt) + place - 1, token]) for place, token in enumerate(answer)]


def test_nll_is_the_mean_over_response_tokens(model: LoadedModel) -> None:
    rows = {index: plain_nll(model, record) for index, record in enumerate(RECORDS)}
    found = figures(scorer("nll", "perplexity", by="kind"), model, RECORDS)
    everything = [value for row in rows.values() for value in row]
    private = rows[0] + rows[2]
    assert found["nll"] == pytest.approx(sum(everything) / len(everything), rel=1e-9)
    assert found["nll/private"] == pytest.approx(sum(private) / len(private), rel=1e-9)
    assert found["nll/shared"] == pytest.approx(sum(rows[1]) / len(rows[1]), rel=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["nll"]))
    assert found["perplexity/shared"] == pytest.approx(math.exp(found["nll/shared"]))


def test_uniform_logits_have_the_nll_of_the_vocabulary_and_score_chance(uniform: LoadedModel) -> None:
    vocabulary = uniform.base.model.config.vocab_size
    assert figures(scorer("nll"), uniform, RECORDS)["nll"] == pytest.approx(math.log(vocabulary))
    assert figures(scorer("accuracy"), uniform, CHOICES)["accuracy"] == pytest.approx(1 / 3)
    for answer in range(3):  # wherever the right option stands
        records = [{**record, "answer": answer} for record in CHOICES]
        assert figures(scorer("accuracy"), uniform, records)["accuracy"] == pytest.approx(1 / 3)


def test_swapping_the_right_option_flips_accuracy(model: LoadedModel) -> None:
    means = [
        [sum(row) / len(row) for text in r["choices"] for row in [plain_nll(model, {**r, "response": text})]]
        for r in CHOICES
    ]
    best = [{**record, "answer": row.index(min(row))} for record, row in zip(CHOICES, means, strict=True)]
    worst = [{**record, "answer": row.index(max(row))} for record, row in zip(CHOICES, means, strict=True)]
    assert figures(scorer("accuracy"), model, best)["accuracy"] == 1.0
    assert figures(scorer("accuracy"), model, worst)["accuracy"] == 0.0


def test_exact_match_is_that_of_one_by_one_greedy_decoding(model: LoadedModel) -> None:
    tokenizer, answers = model.base.tokenizer, []
    for record in RECORDS:
        ids = tokenizer(prompt_text(record, tokenizer, "chat"), add_special_tokens=False)["input_ids"]
        start = len(ids)
        for _ in range(6):
            with torch.no_grad():
                token = int(model.base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        answers.append(tokenizer.decode(ids[start:], skip_special_tokens=True))
    right = [{**record, "response": text} for record, text in zip(RECORDS, answers, strict=True)]
    chosen = scorer("exact_match", "rouge_l", max_new_tokens=6, batch_size=2)
    assert figures(chosen, model, RECORDS)["exact_match"] == 0.0
    two_of_three = [right[0], RECORDS[1], right[2]]
    expected = sum(bool(text.strip()) for text in (answers[0], answers[2])) / 3
    assert figures(chosen, model, two_of_three)["exact_match"] == pytest.approx(expected)


def test_a_record_held_twice_counts_twice(model: LoadedModel) -> None:
    chosen = scorer("nll", "exact_match", max_new_tokens=2)
    once, twice = chosen.sums(model, {}, RECORDS), chosen.sums(model, {}, [*RECORDS, RECORDS[0]])
    alone = chosen.sums(model, {}, RECORDS[:1])
    for name in once:
        assert float(twice[name]) == pytest.approx(float(once[name]) + float(alone[name]))


def test_sums_of_clients_add_up_and_have_the_same_names(model: LoadedModel) -> None:
    chosen = scorer("nll", by="kind")
    first, second = chosen.sums(model, {}, RECORDS[:1]), chosen.sums(model, {}, RECORDS[1:])
    whole = chosen.sums(model, {}, RECORDS)
    assert first.keys() == second.keys() == whole.keys()  # though the first client has no shared record
    for name in whole:
        assert float(first[name] + second[name]) == pytest.approx(float(whole[name]))
    assert "nll/shared" not in chosen.figures(first)


def test_limit_takes_the_first_records(model: LoadedModel) -> None:
    assert figures(scorer("nll", limit=1), model, RECORDS) == figures(scorer("nll"), model, RECORDS[:1])


def test_unknown_metric_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown metric 'exact_mach'; did you mean 'exact_match'"):
        check_metrics(Evaluation(metrics=("exact_mach",)))


def test_accuracy_needs_choices(model: LoadedModel) -> None:
    for broken in (RECORDS[0], {**CHOICES[0], "answer": "C"}, {**CHOICES[0], "answer": 3}):
        with pytest.raises(DataError, match=r"^own\.csv:2: the metric accuracy needs 'choices', a list"):
            figures(scorer("accuracy"), model, [CHOICES[0], LocatedRecord(broken, "own.csv:2")])


def test_turns_have_choices_for_their_last_answer(model: LoadedModel) -> None:
    turns = [{"role": "user", "content": CHOICES[0]["prompt"]}, {"role": "assistant", "content": "red"}]
    asked = [*turns, {"role": "user", "content": "Again!"}, {"role": "assistant", "content": "?"}]
    means = [
        sum(row) / len(row)
        for text in CHOICES[0]["choices"]
        for row in [plain_nll(model, {"messages": [*asked[:3], {"role": "assistant", "content": text}]})]
    ]
    best, worst = means.index(min(means)), means.index(max(means))
    record = {"messages": asked, "choices": CHOICES[0]["choices"], "text": "of no use here"}
    assert figures(scorer("accuracy"), model, [{**record, "answer": best}])["accuracy"] == 1.0
    assert figures(scorer("accuracy"), model, [{**record, "answer": worst}])["accuracy"] == 0.0


def sized(model: LoadedModel, record: dict) -> int:
    example = model.encode(record, 10_000)
    assert example is not None
    return len(example.tokens)


def test_what_does_not_fit_is_left_out_and_counted(model: LoadedModel) -> None:
    """A token is a byte, so `green` makes a record four tokens longer than `a`."""
    short = {"prompt": "Pick.", "choices": ["red", "a"], "answer": 0}
    long = {"prompt": "Pick one of these.", "choices": ["a", "green"], "answer": 1}
    sizes = {text: sized(model, {**long, "response": text}) for text in long["choices"]}
    assert sizes["green"] == sizes["a"] + 4 and sized(model, {**short, "response": "red"}) < sizes["a"]
    mean = figures(scorer("accuracy"), model, [short])["accuracy"]
    plain = {**short, "response": "red"}
    for length, fits in [(sizes["green"], True), (sizes["green"] - 1, False), (sizes["a"] - 1, False), (20, False)]:
        chosen = Scorer(Evaluation(metrics=("accuracy",)), length)
        sums = chosen.sums(model, {}, [short, long])
        population = Population({"a": [plain]}, {"a": [short, long], "b": [long]})
        unfit = chosen.unfit(model, population)
        short_fits = length > 20
        assert float(sums["count/accuracy"]) == short_fits + fits
        assert unfit == Unfit(choices=2 * (not fits) + (not short_fits))
        if short_fits and not fits:
            assert chosen.figures(sums) == {"accuracy": mean}
    assert chosen.figures(sums) == {}


def test_held_out_records_that_are_cut_or_dropped_are_counted(model: LoadedModel) -> None:
    first = sized(model, RECORDS[1]) - len("Tuesday") - 1  # tokens before its response
    shared = [{**RECORDS[1], "response": text} for text in ("Tu", "Tuesday")]
    population = Population({"a": RECORDS, "b": RECORDS}, {"a": shared, "b": shared})  # one list: counted once
    for length, expected in [(first + 8, (0, 0)), (first + 7, (1, 0)), (first + 2, (2, 0)), (first, (0, 2))]:
        for metric in ("nll", "perplexity"):
            found = Scorer(Evaluation(metrics=(metric,)), length).unfit(model, population)
            assert (found.cut, found.dropped, found.choices) == (*expected, 0)
            told = found.warnings(length)
            assert len(told) == (expected != (0, 0)) and all(f"{length} tokens, the work's" in text for text in told)
    assert Scorer(Evaluation(metrics=("exact_match",)), 1).unfit(model, population) == Unfit()
    assert Scorer(Evaluation(limit=1), first + 7).unfit(model, population) == Unfit()
    assert "2 held-out records have a choice that does not fit" in Unfit(choices=2).warnings(9)[0]


def test_a_record_that_is_no_multiple_choice_is_found_before_a_model_is_loaded() -> None:
    made = Experiment(
        task=Task("tiny-llama"),
        federation=Shards("quickstart"),
        work=Sgd(steps=1),
        stages=(ByExamples(),),
        evaluation=Evaluation(metrics=("accuracy",), limit=6),
    )
    with pytest.raises(DataError, match=r"accuracy needs 'choices', .* which a held-out record of b has not"):
        Scorer.of(
            made.evaluation, made.work.max_length, Population({}, {"a": CHOICES, "b": [*CHOICES[:5], RECORDS[0]]})
        )
    with pytest.raises(DataError, match=r"and 'answer', one of them, which own\.csv:2 has not"):
        Scorer.of(
            made.evaluation,
            made.work.max_length,
            Population({}, {"a": [LocatedRecord({**CHOICES[0], "answer": 3}, "own.csv:2")]}),
        )
    Scorer.of(
        made.evaluation, made.work.max_length, Population({}, {"a": CHOICES, "b": [*CHOICES, RECORDS[0]]})
    )  # behind the limit


def test_by_a_missing_field_is_refused() -> None:
    spec = {
        "task": {"model": "tiny-llama"},
        "federation": {"shards": {"data": "quickstart", "partition": {"by": "organisation"}}},
        "work": {"sgd": {"steps": 1}},
        "method": "fedavg",
        "evaluation": {"by": "kin"},
    }
    population = Population({"a": RECORDS}, {"a": RECORDS})
    with pytest.raises(DataError, match=r"no 'kin'; did you mean 'kind'"):
        Scorer.of(build(spec).evaluation, build(spec).work.max_length, population)
    good = replace(build(spec), evaluation=Evaluation(by="kind"))
    assert Scorer.of(good.evaluation, good.work.max_length, population).groups == ("private", "shared")
