"""The packaged corpus: its numbers, and what makes it a fair test of learning."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from fedllm.data.packaged import handbook
from fedllm.data.records import PACKAGED, Record, read_records

TRAIN, TEST = read_records("handbook"), read_records("handbook-test")


def words(text: str) -> list[str]:
    return re.sub(r"[^a-z' -]", "", text.lower().replace("'s", "")).split()


def by_fact(records: list[Record]) -> dict[str, set[str]]:
    prompts = defaultdict(set)
    for record in records:
        prompts[record["fact"]].add(record["prompt"])
    return prompts


@pytest.mark.parametrize(
    ("source", "phrasings", "private", "shared"),
    [("handbook", 3, 24, 12), ("handbook-test", 1, 24, 12), ("quickstart", 3, 12, 6), ("quickstart-test", 1, 12, 6)],
)
def test_counts(source: str, phrasings: int, private: int, shared: int) -> None:
    found = Counter((record["organisation"], record["kind"]) for record in read_records(source))
    wanted = {"private": phrasings * private, "shared": phrasings * shared}
    assert found == {(name, kind): wanted[kind] for name in handbook.ORGANISATIONS for kind in wanted}


def test_quickstart_is_the_beginning_of_the_handbook() -> None:
    quick = {record["fact"] for record in read_records("quickstart")}
    first = {f"{name}-{number:02}" for name in handbook.ORGANISATIONS for number in range(1, 13)}
    assert quick == first | {f"shared-{number:02}" for number in range(1, 7)}
    assert all(record in TRAIN for record in read_records("quickstart"))


def test_fields() -> None:
    keys = {"organisation", "kind", "fact", "system", "prompt", "response"}
    assert all(set(record) == keys and record["system"] == "Answer briefly." for record in TRAIN + TEST)


def test_a_fact_has_one_answer_and_an_answer_one_fact() -> None:
    facts = {(record["fact"], record["response"].lower()) for record in TRAIN + TEST}
    assert len(facts) == len({fact for fact, _ in facts}) == len({answer for _, answer in facts}) == 4 * 24 + 12


def test_answers_are_one_word() -> None:
    assert all(re.fullmatch(r"[A-Za-z]+", record["response"]) for record in TRAIN)


def test_private_facts_belong_to_one_organisation_and_shared_ones_to_all() -> None:
    owners = defaultdict(set)
    for record in TRAIN + TEST:
        owners[record["fact"], record["kind"]].add(record["organisation"])
    assert all(found == {fact[:-3]} for (fact, kind), found in owners.items() if kind == "private")
    shared = [found for (_, kind), found in owners.items() if kind == "shared"]
    assert len(shared) == 12
    assert all(found == set(handbook.ORGANISATIONS) for found in shared)


def test_each_question_names_whom_it_is_about() -> None:
    names = handbook.names()
    assert len(set(names.values())) == 5
    for record in TRAIN + TEST:
        source = record["organisation"] if record["kind"] == "private" else "shared"
        assert names[source] in record["prompt"]


def test_test_phrasings_are_other_words_about_the_same_thing() -> None:
    train, test = by_fact(TRAIN), by_fact(TEST)
    for fact, prompts in train.items():
        (held_out,) = test[fact]
        assert len({tuple(words(prompt)) for prompt in prompts}) == 3
        for prompt in prompts:
            assert Counter(words(held_out)) != Counter(words(prompt)), "only punctuation or order differs"
        covered = set(words(held_out)) & {word for prompt in prompts for word in words(prompt)}
        assert len(covered) >= len(set(words(held_out))) / 2, held_out


def test_no_question_is_asked_twice_and_none_gives_its_answer_away() -> None:
    prompts = [prompt for found in (by_fact(TRAIN), by_fact(TEST)) for asked in found.values() for prompt in asked]
    assert len({tuple(words(prompt)) for prompt in prompts}) == len(prompts) == 4 * (4 * 24 + 12)
    assert not [record for record in TRAIN + TEST if record["response"].lower() in words(record["prompt"])]


def test_questions_are_short() -> None:
    assert all(8 <= len(record["prompt"].split()) <= 14 for record in TRAIN + TEST)


def test_packaged_names_say_what_they_are() -> None:
    assert sorted(PACKAGED) == ["handbook", "handbook-test", "quickstart", "quickstart-test"]
    assert all(entry.title for entry in PACKAGED.values())
