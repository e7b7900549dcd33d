"""Keys: what they are folded with decides every draw, and nothing else does."""

from __future__ import annotations

import random

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fedllm.messages.context import RoundContext
from fedllm.rng import Key

NAMES = st.lists(st.one_of(st.text(max_size=4), st.integers()), max_size=4)


@given(NAMES, NAMES)
@example(["a", "b"], ["a\0str:b"])
@example(["a\0", "b"], ["a", "\0b"])
@example(["a\0\0"], ["a", "\0"])
@example([1], ["1"])
@example([], [""])
@example([""], ["", ""])
def test_distinct_folds_give_distinct_keys(one: list[str | int], two: list[str | int]) -> None:
    same = [(type(name), name) for name in one] == [(type(name), name) for name in two]
    assert (Key(7).fold(*one) == Key(7).fold(*two)) == same


def test_folds_of_a_run_never_collide() -> None:
    key = Key(0).fold("run")
    found = {
        key.fold(round, f"client-{client}", purpose).value
        for round in range(40)
        for client in range(50)
        for purpose in ("batches", "dropout", "quantize/delta/a")
    }
    assert len(found) == 40 * 50 * 3
    assert all(0 <= value < 2**64 for value in found)


def test_order_and_nesting_count() -> None:
    key = Key(1)
    folded = [
        key.fold("a", "b"),
        key.fold("b", "a"),
        key.fold("a").fold("b"),
        key.fold("ab"),
        key,
        Key(2).fold("a", "b"),
    ]
    assert len(set(folded)) == len(folded)


def test_values_of_the_scheme() -> None:
    """Two literal values: a change of the scheme changes every run."""
    assert Key(0).fold("run").value == 14655792690153440297
    assert Key(42).fold(3, "clinic", "batches").value == 13060718326271993452
    assert Key(0).fold("run").generator().initial_seed() == 14655792690153440297 - 2**63
    drawn = torch.randint(1000, (4,), generator=Key(0).fold("run").generator())
    assert drawn.tolist() == [420, 711, 733, 156]


def test_generators_do_not_touch_global_state() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before, state = torch.random.get_rng_state(), random.getstate()
    drawn = torch.rand(9, generator=Key(3).generator())
    assert torch.equal(torch.random.get_rng_state(), before) and random.getstate() == state
    torch.manual_seed(6)
    assert torch.equal(torch.rand(9, generator=Key(3).generator()), drawn)
    assert not torch.equal(torch.rand(9, generator=Key(4).generator()), drawn)


@given(st.integers(-(2**70), 2**70))
def test_any_key_has_a_generator_and_a_seed(value: int) -> None:
    assert Key(value).generator().initial_seed() == value % 2**63
    assert Key(value).seed32() == value % 2**32


def test_a_draw_depends_on_run_round_client_and_purpose_alone() -> None:
    def draw(ctx: RoundContext, purpose: str = "batches") -> list[float]:
        return torch.rand(4, generator=ctx.rng(purpose)).tolist()

    ctx = RoundContext(round=2, key=Key(1), cohort=3, population=9, client="a")
    assert draw(ctx) == draw(RoundContext(round=2, key=Key(1), cohort=1, population=1, rounds=7, client="a", slot=5))
    others = [
        draw(RoundContext(round=3, key=Key(1), cohort=3, population=9, client="a")),
        draw(RoundContext(round=2, key=Key(2), cohort=3, population=9, client="a")),
        draw(RoundContext(round=2, key=Key(1), cohort=3, population=9, client="b")),
        draw(RoundContext(round=2, key=Key(1), cohort=3, population=9)),
        draw(ctx, "dropout"),
    ]
    assert draw(ctx) not in others and len({tuple(drawn) for drawn in others}) == len(others)
