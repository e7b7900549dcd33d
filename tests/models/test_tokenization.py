"""Tokens and labels of whole texts, on tokenizers of the kinds that models have, against `apply_chat_template`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from fedllm.models.base_models.tiny_llama import tiny_tokenizer
from fedllm.models.batch import IGNORE, Example
from fedllm.models.objectives.language_modeling import Lm
from fedllm.models.objectives.sft import Sft
from fedllm.models.templates import ALPACA, Template, prompt_tokens, response_texts
from fedllm.models.tokenization import Text, encoded

LONG = 10_000
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI_3 = PHI + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"  # once, at the end
KINDS = ("tinyllama", "mistral", "llama", "phi", "phi3", "bytes")


def pieces_tokenizer(kind: str) -> Any:
    """SentencePiece's way in a vocabulary of letters, bytes and a few joins: a space before a text that begins."""
    specials = ["<unk>", "<s>", "</s>"]
    letters = [*(f"<0x{value:02X}>" for value in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz<|>[/]?.I"]
    joins = [("\u2581", "a"), ("\u2581", "t"), ("h", "e"), ("\u2581t", "he"), ("\u2581", "y"), ("e", "s")]
    vocab = {token: place for place, token in enumerate([*specials, *letters, *(a + b for a, b in joins)])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=joins, unk_token="<unk>", byte_fallback=True))
    if kind == "mistral":
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="first", split=False)
    else:
        core.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens(specials)
    if kind.startswith("phi"):
        marks = ("<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>")
        core.add_special_tokens([AddedToken(mark, rstrip=True, special=True, normalized=False) for mark in marks])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    chat = {"tinyllama": ZEPHYR, "mistral": LLAMA, "llama": LLAMA, "phi": PHI, "phi3": PHI_3}[kind]
    end = {"phi": "<|end|>", "phi3": "<|endoftext|>"}.get(kind, "</s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end, unk_token="<unk>", chat_template=chat
    )


@pytest.fixture(scope="module")
def tokenizers() -> Mapping[str, Any]:
    """One of each kind."""
    return {"bytes": tiny_tokenizer(), **{kind: pieces_tokenizer(kind) for kind in KINDS[:-1]}}


def turns(*contents: str) -> dict[str, Any]:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]}


CHATS = [
    turns("how are the pears?", "they are ripe."),
    turns("how?", "\U0001f600 yes", "and \u00e9?", "the a", "why", "\u4e2d"),
    turns(" a", "a", "", " the"),
]


def labels(example: Example) -> list[int]:
    """What each token is as a label: its own id, or IGNORE. A first token carries none."""
    return [IGNORE, *example.targets.tolist()[:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_chat_has_the_templates_own_tokens_and_labels_behind_each_generation_prompt(
    tokenizers: Mapping[str, Any], kind: str
) -> None:
    tokenizer = tokenizers[kind]

    def ids(chat: list[dict[str, str]], **more: bool) -> list[int]:
        return list(tokenizer.apply_chat_template(chat, tokenize=True, **more)["input_ids"])

    def ended(chat: list[dict[str, str]]) -> list[int]:
        """Up to its last end token."""
        found = ids(chat)
        return found[: len(found) - found[::-1].index(tokenizer.eos_token_id)]

    together = Sft().encode(CHATS, tokenizer, "chat", LONG)
    for record, example in zip(CHATS, together, strict=True):
        chat, expected, whole = record["messages"], list[int](), ended(record["messages"])
        for place in range(1, len(chat), 2):
            asked = ids(chat[:place], add_generation_prompt=True)
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(whole, ended(chat[: place + 1]), strict=False))
            expected += [IGNORE] * (len(asked) - len(expected)) + [token for token, _ in pairs][len(asked) :]
        assert example is not None and example.tokens.tolist() == whole
        assert labels(example) == expected
        assert prompt_tokens(record, tokenizer, "chat") == asked == whole[: len(asked)]


def whole_chats(records: Sequence[Mapping[str, Any]], tokenizer: Any, template: Template) -> list[list[int]]:
    examples = Sft().encode(records, tokenizer, template, LONG)
    return [example.tokens.tolist() for example in examples if example is not None]


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_that_are_tokenised_apart_are_other_tokens(tokenizers: Mapping[str, Any], kind: str) -> None:
    """The control: the borders of pieces matter, but for bytes and behind marks that take the spaces in."""
    (text,), (example,) = (make(CHATS[1:2], tokenizers[kind], "chat") for make in (response_texts, whole_chats))
    apart = [tokenizers[kind](piece, add_special_tokens=False)["input_ids"] for piece, _ in text.pieces]
    assert ([token for piece in apart for token in piece] == example) == (kind in ("bytes", "phi3"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_a_text_has_the_tokens_that_the_tokenizer_gives_it(
    tokenizers: Mapping[str, Any], kind: str, template: Template
) -> None:
    tokenizer = tokenizers[kind]
    (example,) = Sft().encode([{"prompt": "a pear", "response": "yes"}], tokenizer, template, LONG)
    (text,) = Lm().encode([{"text": "the a"}], tokenizer, template, LONG)
    prompt = prompt_tokens({"prompt": "a pear", "response": "yes"}, tokenizer, template)
    assert example is not None and text is not None
    assert text.tokens.tolist() == tokenizer(f"the a{tokenizer.eos_token}")["input_ids"]
    whole = example.tokens.tolist()
    asked = "a pear\n" if template == "plain" else ALPACA.format(prompt="a pear")
    assert whole == tokenizer(f"{asked}yes{tokenizer.eos_token}")["input_ids"]
    assert whole[: len(prompt)] == prompt
    assert labels(example) == [IGNORE] * len(prompt) + whole[len(prompt) :]


class WithoutOffsets:
    """A tokenizer that is written in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, *args: Any, **more: Any) -> BatchEncoding:
        return BatchEncoding(dict(self.tokenizer(*args, **more)))


def test_a_token_over_the_border_carries_the_label(tokenizers: Mapping[str, Any]) -> None:
    tokenizer = tokenizers["llama"]
    text = Text([("a t", False), ("heyt", True), ("h", True), ("es the", False)])
    for each in (tokenizer, WithoutOffsets(tokenizer)):
        (example,) = encoded([text], each, LONG)
        assert example is not None
        assert tokenizer.convert_ids_to_tokens(example.tokens) == [
            "\u2581a",
            "\u2581the",
            "y",
            "t",
            "he",
            "s",
            "\u2581the",
        ]
        assert labels(example) == [IGNORE, *example.tokens.tolist()[1:5], IGNORE, IGNORE]


def test_spaces_without_offsets_are_on_their_side_of_the_border() -> None:
    """Such tokenizers say that a space is no letter of its token; a token of spaces has no letters at all."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    (example,) = encoded([Text([("a  ", False), ("  b", True), (" ", False), ("", False)])], tokenizer, LONG)
    assert example is not None
    space, b = ord(" "), ord("b")
    assert labels(example)[:6] == [IGNORE, IGNORE, IGNORE, space, space, b]
    assert labels(example)[6:] == [IGNORE]


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_without_offsets_give_the_same(tokenizers: Mapping[str, Any], kind: str) -> None:
    slow: Any = WithoutOffsets(tokenizers[kind])
    assert not slow("a").is_fast
    for record in CHATS:
        (fast,), (found,) = (Sft().encode([record], each, "chat", LONG) for each in (tokenizers[kind], slow))
        assert fast is not None and found is not None
        assert found.tokens.tolist() == fast.tokens.tolist() and found.targets.tolist() == fast.targets.tolist()


def test_a_text_that_is_longer_than_the_models_positions_is_no_reason_to_warn(caplog: pytest.LogCaptureFixture) -> None:
    (example,) = Sft().encode([turns("x" * 2000, "y")], tiny_tokenizer(), "chat", LONG)
    assert example is not None and len(example.tokens) > 2000 and not caplog.records
