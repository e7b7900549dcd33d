"""Templates: which tokens carry a label, by hand, on a tokenizer whose tokens are bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.errors import DataError, LocatedRecord, ModelError
from fedllm.models.base_models.tiny_llama import CHAT_TEMPLATE, END, START, tiny_tokenizer
from fedllm.models.batch import IGNORE, Example
from fedllm.models.chat_turns import answered, messages_of, response_text
from fedllm.models.objectives.language_modeling import Lm
from fedllm.models.objectives.sft import Sft
from fedllm.models.templates import Template, prompt_text

TOKENIZER = tiny_tokenizer()
LONG = 10_000
TALK = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4"},
    ]
}
ASKED = {"prompt": "2+2", "response": "4"}


def encode_response(record: Mapping[str, Any], tokenizer: Any, template: Template, max_length: int) -> Example | None:
    (example,) = Sft().encode([record], tokenizer, template, max_length)
    return example


def encode_text(record: Mapping[str, Any], tokenizer: Any, template: Template, max_length: int) -> Example | None:
    (example,) = Lm().encode([record], tokenizer, template, max_length)
    return example


def encoded(record: Mapping[str, Any], template: Template = "chat", max_length: int = LONG) -> Example:
    example = encode_response(record, TOKENIZER, template, max_length)
    assert example is not None
    return example


def text(example: Example) -> str:
    return str(TOKENIZER.decode(example.tokens))


def labelled(example: Example) -> str:
    """What is to be predicted, in order, with | where tokens without a label lie between."""
    out, gap = "", False
    for place, target in enumerate(example.targets.tolist()):
        if target == IGNORE:
            gap = bool(out)
            continue
        assert target == int(example.tokens[place + 1])  # each position predicts its next token
        out += ("|" if gap else "") + str(TOKENIZER.decode([target]))
        gap = False
    return out


def test_a_chat_labels_every_answer_with_its_end() -> None:
    example = encoded(TALK)
    assert labelled(example) == f"Yes?{END}|4{END}"
    assert text(example) == (
        f"{START}system\nBe brief.{END}\n{START}user\nHi{END}\n{START}assistant\nYes?{END}\n"
        f"{START}user\n2+2{END}\n{START}assistant\n4{END}"
    )


def test_prompt_and_response_are_a_chat_of_two_turns() -> None:
    whole = [{"role": "system", "content": "S"}, {"role": "user", "content": "2+2"}]
    answer = {"role": "assistant", "content": "4"}
    assert messages_of(ASKED) == [whole[1], answer]
    assert messages_of({**ASKED, "system": "S"}) == [*whole, answer]
    assert messages_of({**ASKED, "system": ""}) == [whole[1], answer]
    assert torch.equal(encoded(ASKED).tokens, encoded({"messages": [whole[1], answer]}).tokens)


def test_alpaca_and_plain_label_the_response_and_its_end() -> None:
    example = encoded(ASKED, "alpaca")
    assert text(example) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n2+2\n\n### Response:\n4{END}"
    )
    assert labelled(example) == f"4{END}"
    plain = encoded(TALK, "plain")
    assert text(plain) == f"Be brief.\nHi\nYes?{END}2+2\n4{END}"
    assert labelled(plain) == f"Yes?{END}|4{END}"


def test_braces_in_a_prompt_are_text() -> None:
    assert "{x!r} {0}" in text(encoded({"prompt": "{x!r} {0}", "response": "4"}, "alpaca"))


def test_the_end_token_is_labelled_although_it_also_pads() -> None:
    assert TOKENIZER.pad_token_id == TOKENIZER.eos_token_id
    for template in ("chat", "alpaca", "plain"):
        assert encoded(ASKED, template).targets[-2] == TOKENIZER.eos_token_id


def test_the_end_inside_an_answer_does_not_end_it() -> None:
    example = encoded({"prompt": "p", "response": f"a{END}b"})
    assert labelled(example) == f"a{END}b{END}"


@given(st.integers(1, 60), st.sampled_from(["chat", "alpaca", "plain"]))
def test_the_end_of_a_long_record_is_cut_off_and_counted(max_length: int, template: Template) -> None:
    record = {"prompt": "abc", "response": "0123456789"}
    whole, example = encoded(record, template), encode_response(record, TOKENIZER, template, max_length)
    first = (whole.targets != IGNORE).nonzero()[0].item()  # predicts the first token of the response
    if max_length < first + 2:
        assert example is None
        return
    assert example is not None
    kept = min(max_length, len(whole.tokens))
    assert torch.equal(example.tokens, whole.tokens[:kept])
    assert torch.equal(example.targets[:-1], whole.targets[: kept - 1]) and example.targets[-1] == IGNORE
    assert example.cut == len(whole.tokens) - kept


def test_what_follows_the_last_answer_is_left_out() -> None:
    turns = [*TALK["messages"], {"role": "user", "content": "Thanks"}]
    assert torch.equal(encoded({"messages": turns}).tokens, encoded(TALK).tokens)


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_a_record_without_an_answer_gives_no_example(template: Template) -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]}
    assert encode_response(asked, TOKENIZER, template, LONG) is None
    assert encode_text(asked, TOKENIZER, template, LONG) is None
    with pytest.raises(DataError, match="no turn of the role 'assistant'"):
        prompt_text(asked, TOKENIZER, template)
    with pytest.raises(DataError, match="no turn of the role 'assistant'"):
        response_text(asked)


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_generation_begins_where_the_last_answer_began(template: Template) -> None:
    prompt = prompt_text(TALK, TOKENIZER, template)
    assert prompt + f"4{END}" == text(encoded(TALK, template))
    assert response_text(TALK) == "4"


# language modelling


def test_language_modelling_labels_all_but_the_first_token() -> None:
    for record in ({"text": "To be"}, TALK, ASKED):
        example = encode_text(record, TOKENIZER, "chat", LONG)
        assert example is not None
        assert torch.equal(example.targets[:-1], example.tokens[1:]) and example.targets[-1] == IGNORE
        assert example.tokens[-1] == TOKENIZER.eos_token_id
    example = encode_text({"text": "To be"}, TOKENIZER, "chat", LONG)
    assert example is not None and text(example) == f"To be{END}"


def test_records_that_are_encoded_together_are_as_alone() -> None:
    asked = {"messages": [{"role": "user", "content": "Hi"}]}  # without an answer
    records: list[Mapping[str, Any]] = [TALK, asked, ASKED]
    together = Sft().encode(records, TOKENIZER, "chat", 75)
    assert together[1] is None and Sft().encode([], TOKENIZER, "chat", 20) == []
    for record, example in zip(records[::2], together[::2], strict=True):
        alone = encoded(record, "chat", 75)
        assert example is not None and torch.equal(example.tokens, alone.tokens) and example.cut == alone.cut
        assert torch.equal(example.targets, alone.targets)


@pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
def test_texts_and_chats_may_stand_in_one_file(template: Template) -> None:
    records: list[Mapping[str, Any]] = [{"text": "one"}, TALK, {"text": "two"}, ASKED]
    for record, example in zip(records, Lm().encode(records, TOKENIZER, template, LONG), strict=True):
        alone = encode_text(record, TOKENIZER, template, LONG)
        assert example is not None and alone is not None and torch.equal(example.tokens, alone.tokens)


def test_of_several_chats_the_one_that_is_refused_is_named() -> None:
    choosy = chat_of(
        f"{{% if messages | length > 2 %}}{{{{ raise_exception('too long') }}}}{{% endif %}}{CHAT_TEMPLATE}"
    )
    records: list[Mapping[str, Any]] = [ASKED, TALK, ASKED]
    assert all(Sft().encode(records[::2], choosy, "chat", LONG))
    with pytest.raises(DataError, match=r"refuses the roles system, user, assistant, user \(too long"):
        Sft().encode(records, choosy, "chat", LONG)


def test_the_objectives_choose_the_labels() -> None:
    sft, lm = (encode(TALK, TOKENIZER, "chat", LONG) for encode in (encode_response, encode_text))
    assert sft is not None and lm is not None and torch.equal(sft.tokens, lm.tokens)
    assert int((sft.targets != IGNORE).sum()) == len("Yes?4") + 2
    assert int((lm.targets != IGNORE).sum()) == len(lm.tokens) - 1


@pytest.mark.parametrize("template", ["alpaca", "plain"])
def test_a_tokenizer_that_begins_its_texts_begins_ours(template: Template) -> None:
    from tokenizers.processors import TemplateProcessing

    beginning = tiny_tokenizer()
    beginning.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, beginning.bos_token_id)]
    )
    example = encode_response(TALK, beginning, template, LONG)
    assert example is not None
    assert example.tokens.tolist() == [beginning.bos_token_id, *encoded(TALK, template).tokens.tolist()]
    written = encode_text({"text": "a"}, beginning, template, LONG)
    assert written is not None and written.tokens[0] == beginning.bos_token_id
    assert prompt_text(TALK, beginning, template) == START + prompt_text(TALK, TOKENIZER, template)


# refusals


def test_records_of_another_form_are_refused() -> None:
    with pytest.raises(DataError, match=r"it has answer, question\); map its fields"):
        messages_of({"question": "q", "answer": "a"})
    for broken in ("hello", [{"role": "user"}], ["hello"], None):
        with pytest.raises(DataError, match="not a list of turns with 'role' and 'content'"):
            messages_of({"messages": broken})


def chat_of(template: str | None) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "no chat template"),
        # the whole talk so far stands behind a number that changes
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "rewrites earlier turns"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "changes an answer, leaves it out or begins it"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the roles system, user .*roles must alternate"),
    ],
)
def test_chat_templates_that_cannot_be_labelled_are_refused(template: str | None, reason: str) -> None:
    with pytest.raises((DataError, ModelError), match=f"{reason}.*alpaca or plain"):
        encode_response(TALK, chat_of(template), "chat", LONG)


def test_a_chat_that_begins_with_an_answer_is_refused() -> None:
    with pytest.raises(DataError, match="begins with a turn of the role 'assistant'"):
        encode_response({"messages": [{"role": "assistant", "content": "Hi"}]}, TOKENIZER, "chat", LONG)


def test_a_template_without_the_end_token_labels_the_rest_of_the_turn() -> None:
    gemma = chat_of(
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    example = encode_response(TALK, gemma, "chat", LONG)
    assert example is not None and labelled(example) == "Yes?</>\n|4</>\n"


@given(
    st.lists(st.text(max_size=8).filter(lambda s: "<|" not in s), min_size=2, max_size=6),
    st.sampled_from(["chat", "alpaca", "plain"]),
)
def test_every_answer_is_labelled_whatever_its_text(contents: list[str], template: Template) -> None:
    roles = ["user", "assistant"] * 3
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    example = encoded({"messages": turns}, template)
    answers = "".join(turn["content"] + END for turn in turns if turn["role"] == "assistant")
    targets = example.targets[example.targets != IGNORE]
    assert TOKENIZER.decode(targets) == answers


@pytest.mark.model
def test_the_real_models_chat_is_labelled_and_has_its_system_turn(smollm2: str) -> None:
    from fedllm.models.base_models.load import load_base

    tokenizer = load_base(smollm2).tokenizer
    example = encode_response({"prompt": "Name a fruit.", "response": "An apple."}, tokenizer, "chat", LONG)
    assert example is not None
    kept = example.targets[example.targets != IGNORE]
    assert tokenizer.decode(kept) == "An apple.<|im_end|>"
    assert tokenizer.decode(example.tokens).startswith("<|im_start|>system\n")
    assert kept[-1] == tokenizer.pad_token_id


# tools

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Bern"}}}
CALLED = {
    "messages": [
        {"role": "user", "content": "Rain?", "tool_calls": None},  # as a table has it
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "no", "name": "weather"},
        {"role": "assistant", "content": "No.", "tool_calls": []},
    ],
    "tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}],
}
WITH_TOOLS = (
    "{% if tools %}{{ '<tools>' + tools[0]['function']['name'] + '<|im_end|>' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['content'] %}{{ m['content'] }}{% endif %}"
    "{% if 'tool_calls' in m %}{% for c in m['tool_calls'] %}{{ c['function'] | tojson }}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def test_calls_of_tools_are_written_and_learned() -> None:
    tokenizer = chat_of(WITH_TOOLS)
    example, plain = (encode_response(record, tokenizer, "chat", LONG) for record in (CALLED, TALK))
    assert example is not None and plain is not None and torch.equal(plain.tokens, encoded(TALK).tokens)
    assert labelled(example) == f'{{"name": "weather", "arguments": {{"town": "Bern"}}}}{END}|No.{END}'
    assert text(example).startswith(f"<tools>weather{END}{START}user\nRain?{END}")
    described = {**CALLED, "tools": json.dumps(CALLED["tools"])}
    assert torch.equal(Sft().encode([described, TALK], tokenizer, "chat", LONG)[0].tokens, example.tokens)
    assert not text(encode_response({**CALLED, "tools": ["hammer"]}, tokenizer, "chat", LONG)).startswith("<tools>")


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        (WITH_TOOLS.replace("if tools", "if false"), "the tools' descriptions"),
        (WITH_TOOLS.replace("if 'tool_calls' in m", "if false"), "the calls of tools"),
        (
            WITH_TOOLS.replace("if m['content']", "if m['content'] and m['role'] != 'tool'"),
            "the turns of the role 'tool'",
        ),
    ],
)
def test_a_template_that_leaves_tools_out_is_refused(template: str, left_out: str) -> None:
    with pytest.raises(DataError, match=f"template leaves out {left_out}"):
        encode_response(CALLED, chat_of(template), "chat", LONG)


def test_calls_of_tools_without_a_chat_template_are_refused() -> None:
    for template in ("alpaca", "plain"):
        with pytest.raises(DataError, match=f"'{template}' cannot write the calls of tools; set task.template to chat"):
            encode_response(CALLED, TOKENIZER, template, LONG)
    with pytest.raises(DataError, match="calls a tool; exact_match and rouge_l compare texts"):
        response_text({"messages": CALLED["messages"][:2]})
    with pytest.raises(DataError, match="refuses the roles user, assistant"):  # None is no text
        encode_response(CALLED, TOKENIZER, "chat", LONG)


# answers


@pytest.mark.parametrize("messages", [False, True])
def test_another_answer_takes_the_place_of_the_last_one(messages: bool) -> None:
    record: dict[str, Any] = TALK if messages else {"prompt": "2+2", "system": "Be brief."}
    other = answered({**record, "text": "4"}, "5")
    for encode in (encode_response, encode_text):
        example = encode(other, TOKENIZER, "chat", LONG)
        assert example is not None
        assert text(example).endswith(f"2+2{END}\n{START}assistant\n5{END}")
    assert len(messages_of(other)) == (5 if messages else 3) and TALK["messages"][-1]["content"] == "4"


# names


def test_a_generation_prompt_that_answers_do_not_begin_with_is_named() -> None:
    thinking = chat_of(CHAT_TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}"))
    told = r"ends its generation prompt with '<think>\\n' and does not write it before an answer.*alpaca or plain"
    for record in (ASKED, TALK):
        with pytest.raises(DataError, match=told):
            encode_response(record, thinking, "chat", LONG)
    with pytest.raises(DataError, match="begins it in its generation prompt"):
        encode_response({"prompt": "2+2", "response": "<think>\nEasy.</think>4"}, thinking, "chat", LONG)


def test_of_records_that_know_their_place_the_bad_one_is_named() -> None:
    bad = {"messages": [{"role": "assistant", "content": "Hello!"}, *TALK["messages"]]}
    records = [LocatedRecord(record, f"own.jsonl:{line}") for line, record in enumerate([ASKED, TALK, bad, bad], 1)]
    with pytest.raises(DataError, match=r"^own\.jsonl:3: a chat begins with a turn of the role 'assistant'"):
        Sft().encode(records, TOKENIZER, "chat", LONG)
    with pytest.raises(ModelError, match=r"^the model's tokenizer has no chat template"):
        Sft().encode(records, chat_of(None), "chat", LONG)
