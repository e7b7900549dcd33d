"""What is settled is left out of garbage collections, and only until the end."""

from __future__ import annotations

import gc
import weakref

import pytest

from fedllm.heap import settled_objects


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_exists_is_left_out_until_the_end() -> None:
    kept, before = Ring(), Ring()
    gone = weakref.ref(before)
    assert not gc.get_freeze_count()
    with settled_objects():
        assert gc.get_freeze_count() > 1000
        assert not any(found is kept for found in gc.get_objects())
        del before
        gc.collect()
        assert gone() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert gone() is None


def test_what_is_garbage_before_or_becomes_it_inside_is_collected() -> None:
    gone = weakref.ref(Ring())
    with settled_objects():
        assert gone() is None
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None


def test_only_the_outermost_ends_it() -> None:
    with settled_objects():
        with settled_objects():
            pass
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_objects_that_another_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        with settled_objects():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_it_ends_with_an_error() -> None:
    with pytest.raises(KeyError), settled_objects():
        raise KeyError
    assert not gc.get_freeze_count()
