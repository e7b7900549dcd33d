"""Devices that differ: which profile a client has, what is refused, and that it reaches the client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedllm
from fedllm.data.partitioners import By
from fedllm.data.shards import Shards
from fedllm.errors import CheckError, ConfigError
from fedllm.experiment.config_file import dump, experiment_hash
from fedllm.messages.context import Profile
from fedllm.rng import Key
from tests.runs.small import Spy, small, write_records

SLOW, FAST = Profile(steps=1, batch_size=1), Profile(steps=4, lr=0.5)


def handbook(**profiles: Profile) -> Shards:
    return Shards("quickstart", heldout=0.0, partition=By("organisation"), profiles=profiles)


def test_the_longest_pattern_that_fits_counts_whatever_the_order() -> None:
    entries = {"*": SLOW, "c*": FAST, "clinic": Profile(rank=4), "[ab]ank": Profile(device="phone")}
    for profiles in (entries, dict(reversed(entries.items()))):
        shards = handbook(**profiles)
        shards.load(Key(0))
        found = {client: shards.profile(client) for client in ("clinic", "cargo", "library", "bank")}
        assert found == {"clinic": Profile(rank=4), "cargo": FAST, "library": SLOW, "bank": Profile(device="phone")}
    assert handbook(clinic=SLOW).profile("bank") == handbook().profile("clinic") == Profile()
    assert handbook(clinic=SLOW).profile("Clinic") == Profile()


def classed(profiles: dict[str, Profile], **devices: Profile) -> Shards:
    return Shards("quickstart", heldout=0.0, partition=By("organisation"), profiles=profiles, devices=devices)


def test_a_class_of_devices_says_what_a_profile_leaves_open() -> None:
    phone = Profile(rank=4, steps=2, lr=0.1, bandwidth=9_000)
    shards = classed({"c*": Profile(device="phone"), "clinic": Profile(device="phone", rank=2, steps=0)}, phone=phone)
    assert shards.profile("cargo") == Profile(4, "phone", 2, None, 0.1, 9_000)
    assert shards.profile("clinic") == Profile(2, "phone", 0, None, 0.1, 9_000), "what it says itself counts"
    assert shards.profile("bank") == Profile()
    everybody = classed({"clinic": Profile(device="phone")}, phone=phone, default=Profile(rank=8, lr=0.2))
    assert everybody.profile("bank") == Profile(rank=8, lr=0.2)
    assert everybody.profile("clinic") == Profile(4, "phone", 2, None, 0.1, 9_000), "the class, not that of all others"


def test_an_unknown_class_of_devices_names_the_nearest() -> None:
    where = r"federation\.shards\.profiles\.clinic\.device: unknown device 'fone'; did you mean 'phone'\?"
    with pytest.raises(ConfigError, match=where):
        classed({"clinic": Profile(device="fone")}, phone=Profile(rank=4), laptop=Profile())
    classed({"clinic": Profile(device="fone")})  # a name for reports, where no class is known
    with pytest.raises(
        ConfigError, match=r"shards\.devices\.phone\.device: a class is of no other class; leave it out"
    ):
        classed({}, phone=Profile(device="laptop"), laptop=Profile())


def test_a_pattern_that_fits_nobody_names_the_nearest_client() -> None:
    with pytest.raises(ConfigError, match=r"profiles: 'clinc' fits no client; did you mean 'clinic'\?"):
        handbook(bank=SLOW, clinc=FAST).load(Key(0))
    with pytest.raises(ConfigError, match=r"'x\*' fits no client; known: bank, cargo, clinic, library$"):
        handbook(**{"x*": FAST}).load(Key(0))


def test_two_patterns_of_one_length_that_fit_one_client_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"profiles: '\*c' and 'c\*' both fit client 'clinic'; name it in full"):
        handbook(**{"c*": SLOW, "*c": FAST}).load(Key(0))
    handbook(**{"c*": SLOW, "*c": FAST, "clinic": SLOW}).load(Key(0))


def test_the_nearest_of_many_clients_is_not_a_list_of_all(tmp_path: Path) -> None:
    rows = [f'{{"text": "a", "who": "user-{who:04}"}}' for who in range(300)]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    shards = Shards(str(tmp_path / "t.jsonl"), heldout=0.0, partition=By("who"), profiles={"x*": FAST})
    with pytest.raises(ConfigError, match=r"known: user-0000, .*user-0049 and 250 more$"):
        shards.load(Key(0))


@pytest.mark.parametrize(
    "setting",
    [
        {"rank": 0},
        {"steps": -1},
        {"batch_size": 0},
        {"lr": -0.1},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"bandwidth": 0},
    ],
)
def test_ranges(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"profile\.{next(iter(setting))} is .*; it must be"):
        Profile(**setting)


PEOPLE = {"ann": {"steps": 1, "lr": 0.5}, "b*": {"batch_size": 1, "device": "phone"}}
DEVICES = {"phone": {"steps": 2, "batch_size": 3}}


def test_profiles_are_part_of_the_experiment(tmp_path: Path) -> None:
    data = write_records(tmp_path / "people.jsonl")
    plain, made = small(data), small(data, federation__shards__profiles=PEOPLE)
    turned = small(data, federation__shards__profiles=dict(reversed(PEOPLE.items())))
    assert experiment_hash(plain) != experiment_hash(made) == experiment_hash(turned)
    written = dump(made)
    assert written["federation"]["shards"]["profiles"]["b*"]["batch_size"] == 1
    assert fedllm.build(written) == made
    classed = small(data, federation__shards__profiles=PEOPLE, federation__shards__devices=DEVICES)
    assert fedllm.build(dump(classed)) == classed and experiment_hash(classed) != experiment_hash(made)


def test_a_profile_crosses_the_wire_with_the_request(tmp_path: Path, cache_folder: Path) -> None:
    data = write_records(tmp_path / "people.jsonl")
    spy = Spy()
    shards = {"federation__shards__profiles": PEOPLE, "federation__shards__devices": DEVICES}
    fedllm.run(small(data, **shards, rounds=1), engine=spy, out=tmp_path / "run")
    found = {str(request.ctx.client): request.ctx.profile for name, request in spy.asked if name == "work"}
    assert found == {"ann": Profile(steps=1, lr=0.5), "ben": Profile(None, "phone", 2, 1), "cid": Profile()}


def test_a_rank_of_a_profile_is_checked_against_the_stages(tmp_path: Path, cache_folder: Path) -> None:
    data = write_records(tmp_path / "people.jsonl")
    with pytest.raises(CheckError, match=r"client ann has rank 1 and the adapter rank 2"):
        fedllm.run(small(data, federation__shards__profiles={"ann": {"rank": 1}}), out=tmp_path / "run")
