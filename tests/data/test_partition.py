"""Partitions: disjoint, complete, seeded, and skewed as asked."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from importlib.util import find_spec

import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from fedllm.data import hub_worker
from fedllm.data.flwr_partitioners import Groups, PartitionJob
from fedllm.data.partition import Partition, column, divergence, partition, report
from fedllm.data.partitioners import By, Dirichlet, Iid, Pathological, Shard, SizeSkew, client_name
from fedllm.data.partitioners.base import Partitioner, numbered
from fedllm.data.record_schema import Record
from fedllm.errors import ConfigError, DataError
from fedllm.rng import Key

pytestmark = [
    pytest.mark.skipif(find_spec("flwr_datasets") is None, reason="flwr-datasets is not installed"),
    pytest.mark.filterwarnings("ignore:::flwr_datasets", "ignore:::pyarrow"),
]

KEY = Key(7)


def here(job: PartitionJob) -> Groups:
    """What the worker does, in this process."""
    try:
        return hub_worker.assign(asdict(job))
    except ValueError as error:
        raise DataError(str(error)) from error


def records(count: int, labels: int = 10) -> list[Record]:
    return [{"text": str(row), "label": f"label {row % labels}"} for row in range(count)]


def spread(rows: list[Record], partitioner: Partitioner, *, clients: int | None = None, key: Key = KEY) -> Partition:
    return partition(rows, partitioner, clients=clients, key=key, run=here)


PARTITIONERS: list[Partitioner] = [
    Iid(),
    By("label"),
    Dirichlet(0.5, "label"),
    SizeSkew("linear"),
    SizeSkew("square"),
    SizeSkew("exponential"),
    Pathological("label", 2),
    Pathological("label", 1, "random"),
    Pathological("label", 2, "deterministic"),
    Shard("label", shards=2),
    Shard("label", size=7),
    Shard("label", shards=2, size=3),
]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(
    partitioner=st.sampled_from(PARTITIONERS),
    labels=st.lists(st.integers(0, 4), min_size=2, max_size=60) | st.lists(st.text(min_size=1, max_size=3), min_size=2),
    clients=st.integers(1, 5),
    seed=st.integers(0, 2**64 - 1),
)
@example(partitioner=Pathological("label", 2), labels=["0", "\0"], clients=1, seed=0)
def test_disjoint_and_complete_or_counted(
    partitioner: Partitioner, labels: list[int | str], clients: int, seed: int
) -> None:
    rows: list[Record] = [{"text": "", "label": label} for label in labels]
    try:
        found = spread(rows, partitioner, clients=None if isinstance(partitioner, By) else clients, key=Key(seed))
    except DataError:
        assume(False)
    taken = sorted(row for held in found.clients.values() for row in held)
    assert len(set(taken)) == len(taken), "a record is held twice"
    assert set(taken) <= set(range(len(rows)))
    assert len(taken) + found.left_out == len(rows)
    assert all(held == tuple(sorted(held)) and held for held in found.clients.values())
    if not isinstance(partitioner, By):
        assert list(found.clients) == [f"client-{number:03}" for number in range(clients)]
    if not isinstance(partitioner, Shard | Pathological):
        assert found.left_out == 0


@pytest.mark.parametrize("partitioner", PARTITIONERS, ids=str)
def test_seeded(partitioner: Partitioner) -> None:
    clients = None if isinstance(partitioner, By) else 4
    first, again, other = (spread(records(200), partitioner, clients=clients, key=Key(seed)) for seed in (1, 1, 2))
    assert first == again
    assert (first == other) == isinstance(partitioner, By), "another key spreads differently, except by a natural field"


def test_iid_is_the_partitioner_of_flwr_datasets_on_shuffled_rows() -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import IidPartitioner

    orders = []

    class Spy(Iid):
        def groups(self, rows, run):  # type: ignore[no-untyped-def]
            orders.append(rows.order())
            return super().groups(rows, run)

    found = spread(records(23), Spy(), clients=5)
    theirs = IidPartitioner(num_partitions=5)
    theirs.dataset = Dataset.from_dict({"row": orders[0]})
    assert list(found.clients.values()) == [tuple(sorted(theirs.load_partition(number)["row"])) for number in range(5)]
    assert [len(rows) for rows in found.clients.values()] == [5, 5, 5, 4, 4]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("values", [[3, 10, 3, 2, 10, 10], ["b", "a", "B c", "a", "b"]])
def test_by_is_the_partitioner_of_flwr_datasets(values: list[int] | list[str]) -> None:
    from datasets import Dataset
    from flwr_datasets.partitioner import NaturalIdPartitioner

    theirs = NaturalIdPartitioner(partition_by="user")
    theirs.dataset = Dataset.from_dict({"row": list(range(len(values))), "user": values})
    wanted = [tuple(theirs.load_partition(number)["row"]) for number in range(theirs.num_partitions)]
    if "b" in values:
        values = [{"B c": "Bc"}.get(str(value), value) for value in values]
    found = spread([{"user": value} for value in values], By("user"))
    assert list(found.clients.values()) == wanted
    assert found.left_out == 0


def test_by_names_clients_after_the_values() -> None:
    rows: list[Record] = [{"user": user} for user in ("First Citizen", "Zoë/../x", "First Citizen", "d", "d", "d")]
    assert spread(rows, By("user")).clients == {"First-Citizen": (0, 2), "Zoë-..-x": (1,), "d": (3, 4, 5)}
    assert spread(rows, By("user"), clients=3).clients.keys() == spread(rows, By("user")).clients.keys()
    few = spread(rows, By("user", min_size=2))
    assert (list(few.clients), few.left_out) == (["First-Citizen", "d"], 1)
    assert list(spread([{"n": n} for n in (10, 9)], By("n")).clients) == ["9", "10"]


@given(st.text())
def test_client_names_are_safe_folder_names(value: str) -> None:
    name = client_name(value)
    assert not set(name) & set('/\\:*?"<>| \0\n\t')
    assert not name.startswith((".", "-"))
    assert len(name) <= 64


@pytest.mark.parametrize(
    ("users", "sentence"),
    [
        (("a b", "a-b"), "values 'a b' and 'a-b' of 'user' both name the client 'a-b'"),
        (("Java", "java"), "values 'Java' and 'java' of 'user' both name the client 'java'"),
        (("...", "a"), r"value '...' of 'user' has no letter or digit"),
        (("a", ""), "field 'user' of record 2 is ''; it must be text or a number"),
        (("a", None), "field 'user' of record 2 is None"),
        (("a", ["b"]), "field 'user' of record 2 is"),
    ],
)
def test_values_that_name_no_client(users: tuple[object, ...], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        spread([{"user": user} for user in users], By("user"))


def test_linear_sizes() -> None:
    sizes = report(records(100), spread(records(100), SizeSkew("linear"), clients=4), None).counts
    assert list(sizes.values()) == [10, 20, 30, 40]
    sizes = report(records(140), spread(records(140), SizeSkew("square"), clients=3), None).counts
    assert list(sizes.values()) == [10, 40, 90]
    sizes = report(records(1000), spread(records(1000), SizeSkew("exponential"), clients=3), None).counts
    assert list(sizes.values()) == [90, 244, 666]  # e^i / (e + e^2 + e^3) = 0.0900, 0.2447, 0.6652; the last: the rest


def test_pathological_gives_each_client_so_many_labels() -> None:
    rows = records(300)
    found = report(rows, spread(rows, Pathological("label", 3), clients=10), "label")
    assert {len(labels) for labels in found.labels.values()} == {3}
    random = spread(rows, Pathological("label", 1, "random"), clients=4)
    assert random.left_out == 30 * (10 - len({row % 10 for held in random.clients.values() for row in held}))
    assert random.left_out >= 6 * 30


def test_shards_are_of_one_label_and_the_rest_is_left_out() -> None:
    rows = records(107, labels=1) + [{"text": "", "label": "zebra"} for _ in range(20)]
    found = spread(rows, Shard("label", shards=2, size=10), clients=3)
    assert [len(held) for held in found.clients.values()] == [20, 20, 20]
    assert found.left_out == 127 - 60
    by_size = spread(rows, Shard("label", size=20), clients=3)
    assert (Counter(len(held) for held in by_size.clients.values()), by_size.left_out) == ({40: 3}, 7)


@pytest.mark.parametrize("seed", range(5))
def test_divergence_grows_as_alpha_falls(seed: int) -> None:
    rows = records(3000)
    found = [
        report(rows, spread(rows, Dirichlet(alpha, "label"), clients=8, key=Key(seed)), "label").divergence
        for alpha in (100.0, 1.0, 0.1)
    ]
    assert 0 < found[0] < found[1] < found[2] < 1
    iid = report(rows, spread(rows, Iid(), clients=8, key=Key(seed)), "label").divergence
    assert iid < found[1]


def test_divergence_by_hand() -> None:
    """p = (1, 0) and (0, 1), q = (1/2, 1/2), m = (3/4, 1/4): JS = H(m) - (0 + 1)/2 = 2 - (3/4) log2 3 - 1/2 each."""
    assert divergence({"a": {"x": 4}, "b": {"y": 4}}) == pytest.approx(1.5 - 0.75 * 1.584962500721156, abs=1e-12)
    assert divergence({"a": {"x": 2, "y": 6}, "b": {"x": 1, "y": 3}}) == pytest.approx(0, abs=1e-12)


def test_divergence_counts_each_client_once() -> None:
    """Client a: x 3, y 1; client b: y 4. q = (3/8, 5/8).

    a: p = (3/4, 1/4), m = (9/16, 7/16). b: p = (0, 1), m = (3/16, 13/16).
    H(k/n) = log2 n - (k log2 k + (n - k) log2 (n - k)) / n.
    """
    log3, log5, log7, log13 = 1.584962500721156, 2.321928094887362, 2.807354922057604, 3.700439718141092
    q = 3 - (3 * log3 + 5 * log5) / 8
    first = 4 - (9 * 2 * log3 + 7 * log7) / 16 - (2 - 3 * log3 / 4 + q) / 2
    second = 4 - (3 * log3 + 13 * log13) / 16 - (0 + q) / 2
    assert divergence({"a": {"x": 3, "y": 1}, "b": {"y": 4}}) == pytest.approx((first + second) / 2, abs=1e-12)


def test_report() -> None:
    rows: list[Record] = [{"kind": kind} for kind in ("x", "y", "x", 3, "z")]
    found = report(rows, Partition({"a": (0, 2), "b": (1, 3)}, 1), "kind")
    assert found.counts == {"a": 2, "b": 2}
    assert found.labels == {"a": {"x": 2}, "b": {"3": 1, "y": 1}}
    assert found.divergence == pytest.approx(divergence(found.labels))
    assert report(rows, Partition({"a": (0,)}, 4), None) == ({"a": 1}, {}, None)


def test_column_keeps_whole_numbers_and_makes_the_rest_text() -> None:
    assert column([{"a": 2}, {"a": 10}], "a") == (2, 10)
    assert column([{"a": 2}, {"a": "x"}], "a") == ("2", "x")
    assert column([{"a": True}, {"a": 0.5}], "a") == ("True", "0.5")


def test_an_unknown_field_names_its_neighbour() -> None:
    with pytest.raises(DataError, match=r"record 1 has no field 'lable'; did you mean 'label'\?"):
        spread(records(9), Dirichlet(1.0, "lable"), clients=3)


@pytest.mark.parametrize(
    ("partitioner", "clients", "sentence"),
    [
        (Iid(), 13, "there are 12 records for 13 clients; ask for fewer"),
        (By("label"), 5, "'label' makes 4 clients, but federation.shards.clients is 5; set it to 4 or leave it out"),
        (By("label", min_size=4), None, "no value of 'label' has 4 records; lower min_size"),
        (Dirichlet(0.01, "label", 4), 3, r"^Dirichlet\(alpha=0.01.* cannot spread 12 records over 3 clients; raise al"),
        (
            SizeSkew("exponential"),
            9,
            r"SizeSkew\(kind='exponential'\) cannot spread 12 records over 9 clients; ask for",
        ),
        (Pathological("label", 5), 3, r"Pathological\(.*over 3 clients; lower classes.* than the number of unique"),
        (Pathological("label", 4), 4, r"Pathological\(.*over 4 clients; lower classes.*Label: label 0 is needed"),
        (Shard("label", shards=3, size=5), 2, r"Shard\(.*over 2 clients; lower shards, size"),
        (Shard("label", shards=4), 4, r"Shard\(.*over 4 clients; lower.*there are fewer records than shards"),
        (Shard("label", size=9), 4, r"Shard\(.*over 4 clients; lower shards, size"),
    ],
)
def test_what_cannot_be_spread(partitioner: Partitioner, clients: int | None, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        spread(records(12, labels=4), partitioner, clients=clients)
    assert ". " not in str(caught.value), "one sentence"


def test_an_empty_client_is_named() -> None:
    with pytest.raises(DataError, match="client 'client-001' of 2 gets no records from Dirichlet"):
        partition(records(4), Dirichlet(1.0, "label"), clients=2, key=Key(0), run=lambda job: [[0, 1, 2, 3], []])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Dirichlet(0.0, "label"), "dirichlet.alpha is 0.0; it must be more than 0"),
        (lambda: Dirichlet(float("nan"), "label"), "dirichlet.alpha is nan"),
        (lambda: Dirichlet(1.0, "label", 0), "dirichlet.min_size is 0; it must be 1 or more"),
        (lambda: By("label", 0), "by.min_size is 0"),
        (lambda: Pathological("label", 0), "pathological.classes is 0"),
        (lambda: Shard("label"), "shard needs shards, size or both"),
        (lambda: Shard("label", shards=0), "shard.shards is 0"),
        (lambda: Shard("label", size=0), "shard.size is 0"),
        (lambda: spread(records(9), Iid()), "federation.shards.clients is missing"),
        (lambda: spread(records(9), SizeSkew()), "federation.shards.clients is missing"),
        (lambda: spread(records(9), Iid(), clients=0), "federation.shards.clients is 0; it must be 1 or more"),
    ],
)
def test_settings_that_cannot_be(make: object, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()  # type: ignore[operator]


def test_names_of_more_than_a_thousand_clients_sort() -> None:
    names = list(numbered([[0]] * 1001))
    assert names == sorted(names)
    assert (names[0], names[-1]) == ("client-0000", "client-1000")
