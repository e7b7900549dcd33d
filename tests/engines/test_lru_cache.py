"""The newest values are kept, as many as their sizes leave room for."""

from __future__ import annotations

from fedllm.engines.lru_cache import SizedLRUCache


def made(room: int) -> tuple[SizedLRUCache[str, str], list[str]]:
    """A cache of texts by their lengths, and what it had to make."""
    asked: list[str] = []
    return SizedLRUCache(lambda name: asked.append(name) or name * 2, len, room), asked  # type: ignore[func-returns-value]


def test_what_is_held_is_not_made_again() -> None:
    recent, asked = made(room=8)
    assert [recent(name) for name in ("a", "bb", "a", "bb")] == ["aa", "bbbb", "aa", "bbbb"]
    assert asked == ["a", "bb"]


def test_what_was_asked_for_longest_ago_goes_first() -> None:
    recent, asked = made(room=8)
    for name in ("a", "bb", "a", "cc", "a", "bb"):  # cc needs the room of bb, which is older than a
        recent(name)
    assert asked == ["a", "bb", "cc", "bb"]


def test_a_value_larger_than_the_room_is_held_until_the_next() -> None:
    recent, asked = made(room=3)
    for name in ("long", "long", "a", "a", "long"):
        recent(name)
    assert asked == ["long", "a", "long"]
