"""What an engine keeps when it asks very many clients: neither their sessions nor pages that nobody uses."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedllm.aggregators.secure_sum import SecureSum
from fedllm.engines import loopback
from fedllm.engines.allocator import retain_freed_memory
from fedllm.engines.batched.engine import Batched
from fedllm.engines.client import Site
from fedllm.engines.loopback import TIDY, with_heap_trim
from fedllm.engines.serial import Serial
from fedllm.messages.call import Replies
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Request, Update
from fedllm.runs import server_round
from tests.engines.cohort import CLIENTS, begun, experiment, write_records

MEGA = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def answered(name: str, requests: Mapping[str, Request]) -> Replies:
    """`TIDY` clients; each splits what was one free block, as a word does that a tokenizer remembers."""
    for place in range(TIDY):
        yield str(place), Update({})


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_free_pages_between_blocks_in_use_go_back() -> None:
    with retain_freed_memory():
        blocks = [(torch.ones(MEGA, dtype=torch.uint8), torch.ones(64)) for _ in range(64)]
        words = [small for _, small in blocks]
        del blocks
        before = resident()
        assert len(list(answered("evaluate", {}))) == TIDY
        assert resident() > before - 8 * MEGA  # the control: nothing gives them back
        assert len(list(with_heap_trim(answered)("evaluate", {}))) == TIDY
        assert resident() < before - 48 * MEGA
        assert all(bool((word == 1).all()) for word in words)


@pytest.mark.parametrize("engine", [Serial(), Batched(stack=2, workers=2)])
def test_every_so_many_replies_of_an_engine(
    engine: Serial | Batched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[int] = []
    monkeypatch.setattr(loopback, "TIDY", 2)
    monkeypatch.setattr(loopback, "trim", lambda: times.append(len(replies)))
    made, replies = experiment(write_records(tmp_path / "people.jsonl")), list[str]()
    asked = server_round.requests_for(
        made, server_round.initial_state(made, begun(made)), CLIENTS, RoundContext(0, made.key, 5, 5, 2)
    )
    with engine.open(made, None, lambda event: None) as call:
        for _ in range(2):  # small rounds add up
            for client, _ in call("evaluate", asked):
                replies.append(client)
    assert replies == [*CLIENTS, *CLIENTS] and times == [2, 4, 6, 8, 10]


@pytest.mark.parametrize(("secure", "kept"), [(False, 0), (True, len(CLIENTS))])
def test_sessions_are_kept_where_a_client_is_asked_again(secure: bool, kept: int, tmp_path: Path) -> None:
    made = experiment(write_records(tmp_path / "people.jsonl"))
    made = replace(made, aggregator=SecureSum()) if secure else made
    asked = server_round.requests_for(
        made, server_round.initial_state(made, begun(made)), CLIENTS, RoundContext(0, made.key, 5, 5, 2)
    )
    site = Site.of(made, None)
    for client in CLIENTS:
        first = site.session(asked[client].ctx)
        assert (site.session(asked[client].ctx) is first) == secure
    assert len(site.sessions) == kept
