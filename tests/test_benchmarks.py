"""The benchmark of a round: its records, that all rows take the same batches, its line of JSON, what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

from fedllm.errors import DataError, RunError
from fedllm.models.base_models.tiny_llama import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
PROMISED = {
    *("peer_shipped", "peer", "trl", "plain", "serial", "batched"),
    *("batched_over_peer_shipped", "batched_over_peer", "batched_over_serial"),
    *("gemm_peak_gflops", "share_of_peak", "real_tokens_per_step", "page_faults_per_step"),
}


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of benchmarks/ can be imported, as they are from a script there."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))


@pytest.fixture
def one_core() -> Iterator[None]:
    """Threads of the benchmark's processes that wait for each other on a busy machine take minutes."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cores is not None:
        os.sched_setaffinity(0, {min(cores)})
    yield
    if cores is not None:
        os.sched_setaffinity(0, cores)


@pytest.mark.slow
def test_round_prints_what_it_promises(
    benchmarks: None, one_core: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import round as bench

    records = tmp_path / "records.jsonl.gz"
    with gzip.open(records, "wt", encoding="utf-8") as file:  # 3 + 1 + 4 + 1 = 9 tokens: one a byte, and the end token
        file.writelines(json.dumps({"instruction": "ask", "output": "tell"}) + "\n" for _ in range(8))
    words = ["--json", "--quick", "--rows", "serial,plain", "--model", "tiny-llama", "--records", str(records)]
    code = bench.main(words)
    printed = capfd.readouterr()
    assert code == 0, printed.err
    figures = json.loads(printed.out)
    assert figures.keys() >= PROMISED
    assert figures["records"] == str(records) and figures["failed"] == {}
    assert figures["serial"] > 0 and figures["plain"] > 0 and figures["gemm_peak_gflops"] > 0
    assert figures["real_tokens_per_step"] == 18
    assert figures["real_tokens_per_step_by_row"] == {"plain": 18, "serial": 18}
    assert [figures[row] for row in ("peer_shipped", "peer", "trl", "batched", "batched_over_serial")] == [None] * 5


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rows", "serail"], "there is no row 'serail'; did you mean 'serial'?"),
        (["--rows", "plain", "--records", "no.jsonl"], "there is no file no.jsonl"),
        (["--rows", "plain", "--steps", "0"], "--steps is 0; it must be 1 or more"),
        (["--rows", "plain", "--records", str(ROOT / "LICENSE")], "is not a file that ends in .csv"),
    ],
)
def test_round_refuses_in_one_sentence(
    benchmarks: None, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import round as bench

    assert bench.main(["--model", "tiny-llama", *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said and len(said.splitlines()) == 1


def test_peers_that_are_not_installed(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import round as bench
    import rows

    monkeypatch.setattr(rows, "PEERS", tmp_path)
    assert bench.main(["--rows", "peer,serial"]) == 2
    assert capsys.readouterr().err == "peer: the peers are not installed; install them with scripts/peers\n"


def test_handbook_corpus_is_seeded_and_uneven(benchmarks: None) -> None:
    import corpus

    one, again, other = (list(islice(corpus.handbook_pairs(seed), 200)) for seed in (0, 0, 1))
    assert one == again != other
    lines = [completion.count("\n") + 1 for _, completion in one]
    assert min(lines) == 1 and max(lines) == 12
    assert 2.9 < sum(lines) / len(lines) < 4.9  # 12 / (1 + 1/2 + ... + 1/12) = 3.87, within four standard errors


def test_records_of_three_forms_and_of_none(benchmarks: None, tmp_path: Path) -> None:
    import corpus

    turns = [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")]
    records = [
        {"instruction": "do", "input": "this", "output": "done"},
        {"instruction": "do", "input": "", "output": "done"},
        {"prompt": "ask", "response": " tell\n"},
        {"messages": [{"role": role, "content": content} for role, content in turns]},
    ]
    file = tmp_path / "records.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    expected = {("do\nthis", "done"), ("do", "done"), ("ask", "tell"), ("s\na\nb\nc", "d")}
    assert set(corpus.file_pairs(file, 0)) == expected
    file.write_text('{"title": "x"}')
    with pytest.raises(DataError, match=r"records.jsonl:1 holds title; a record needs instruction and output"):
        list(corpus.file_pairs(file, 0))


def test_records_are_chosen_by_length(benchmarks: None) -> None:
    import corpus

    # one token a byte, the line between prompt and completion, the end token: 4, 9, and 12 cut to 9
    pairs = [("a", "b"), ("abc", "defg"), ("no room for it", "x"), ("empty", ""), ("abcd", "efghij")]
    tokenizer = tiny_tokenizer()
    loose = corpus.chosen(iter(pairs), tokenizer, corpus.Choice(3, 9, fill=False))
    assert loose == [(pairs[0], 4), (pairs[1], 9), (pairs[4], 9)]
    full = corpus.chosen(iter(pairs), tokenizer, corpus.Choice(2, 9, fill=True))
    assert full == [(pairs[1], 9), (pairs[4], 9)]
    with pytest.raises(DataError, match=r"the records hold 3 that can be used with --max-length 9, but 4 are needed"):
        corpus.chosen(iter(pairs), tokenizer, corpus.Choice(4, 9, fill=False))


@pytest.mark.parametrize("template", ["plain", "alpaca"])
def test_peers_take_the_batches_that_fedllm_draws(benchmarks: None, template: str, tmp_path: Path) -> None:
    import batches
    import round as bench
    from prepare import prepare

    import fedllm
    from fedllm.messages.context import RoundContext
    from fedllm.models.loaded_model import load

    numbers = ["--clients", "3", "--steps", "2", "--rounds", "1"]
    options = bench.options_of(["--model", "tiny-llama", "--template", template, *numbers])
    prepared, facts = prepare(options, tmp_path)
    work = batches.read(prepared.batches, options.batch)
    assert (work.rounds, len(work.clients), work.client_steps) == (2, 3, 6)
    experiment = fedllm.load(prepared.experiment)
    model, population = load(experiment.task), experiment.federation.load(experiment.key)
    encode = tiny_tokenizer()
    for place in range(2):
        lengths = 0
        for client, records in population.train.items():
            ctx = RoundContext(place, experiment.key, 3, 3, 2, client=client)
            plan = [i for step in experiment.work.plan(len(records), ctx) for micro in step for i in micro]
            ours = [model.encode(records[i], options.max_length).tokens.tolist() for i in plan]
            rows = work.rows[place][client]
            theirs = [encode(f"{row['prompt']}{row['completion']}{encode.eos_token}")["input_ids"] for row in rows]
            assert ours == [tokens[: options.max_length] for tokens in theirs]
            lengths += sum(map(len, ours))
        assert lengths / work.client_steps == facts.tokens
    orders = [work.rows[place][work.clients[0]] for place in range(2)]
    assert orders[0] != orders[1]  # drawn anew each round


def test_differences_are_measured_on_the_same_files(benchmarks: None, tmp_path: Path) -> None:
    import differences
    from prepare import prepare

    prepared, _ = prepare(
        Namespace(model="tiny-llama", records=None, steps=1, dtype="float32", **differences.SAME), tmp_path
    )
    assert prepared.experiment.exists()


def test_ratios_and_share_of_the_peak_by_hand(benchmarks: None) -> None:
    import round as bench
    from prepare import Facts

    def row(speed: float, faults: float | None = None) -> dict[str, object]:
        extra = {} if faults is None else {"page_faults_per_step": faults}
        return {"client_steps_per_s": speed, "real_tokens_per_step": 100.0, "way": "a", "runs": [speed], **extra}

    facts = Facts(parameters=10**6, shapes=frozenset(), tokens=100.0)
    found = bench.summary({"serial": row(4.0), "peer": row(2.0), "batched": row(10.0, 5.0)}, facts, peak=8.0)
    assert found["batched_over_serial"] == 2.5 and found["batched_over_peer"] == 5
    assert found["share_of_peak"] == 0.5  # 4 x 1e6 x 100 tokens x 10 a second = 4e9, of 8e9
    assert found["page_faults_per_step"] == 5
    assert found["peer_shipped"] is None and found["batched_over_peer_shipped"] is None
    none = bench.summary({"serial": row(4.0)}, facts, peak=8.0)
    assert [none[name] for name in ("batched", "batched_over_serial", "share_of_peak")] == [None] * 3


def printing(speed: float, code: int = 0) -> tuple[str, ...]:
    line = json.dumps({"round_s": [1.0], "client_steps_per_s": speed, "mean_client_steps_per_s": speed})
    text = f"import sys; print('chatter'); print({line!r}); print('why', file=sys.stderr); sys.exit({code})"
    return sys.executable, "-c", text


def test_fastest_way_of_a_row_counts_and_a_failure_is_told(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import rows

    ways = [rows.Command("slow", printing(1)), rows.Command("fast", printing(3)), rows.Command("middle", printing(2))]
    monkeypatch.setattr(rows, "ROWS", {"some": lambda prepared: ways, "bad": lambda prepared: [bad]})
    bad = rows.Command("broken", printing(9, code=4))
    prepared = rows.Prepared(*(Path("nowhere"),) * 3, tail=())
    found = rows.measure("some", prepared)
    assert found == {**found, "way": "fast", "client_steps_per_s": 3, "runs": [3], "spread": None}
    with pytest.raises(RunError, match=r"broken failed \(4\): why"):
        rows.measure("bad", prepared)


@pytest.mark.parametrize(
    ("speeds", "best", "runs", "steady"),
    [
        ([1.0, 0.95, 9.0], 1.0, 2, True),  # the second run confirms the first
        ([0.75, 1.2, 1.19, 9.0], 1.2, 3, True),  # something else ran beside the first
        ([1.0, 2.0, 4.0, 8.0, 16.0], 8.0, 4, False),  # never more than asked for
    ],
)
def test_a_row_is_run_until_two_runs_are_near_each_other(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, speeds: list[float], best: float, runs: int, steady: bool
) -> None:
    import round as bench
    import rows

    given = iter(speeds)
    monkeypatch.setattr(rows, "_started", lambda command: None)
    monkeypatch.setattr(rows, "_finished", lambda process, command: {"client_steps_per_s": next(given)})
    rows._steady.cache_clear()
    found = rows.measure("serial", rows.Prepared(*(Path("nowhere"),) * 3, tail=(), runs=4))
    assert (found["client_steps_per_s"], found["runs"]) == (best, speeds[:runs])
    assert ("not steady" in bench.described(found)) is not steady


def test_all_rows_compute_in_one_type(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import round as bench
    import rows

    monkeypatch.setattr(bench, "resolve_dtype", lambda dtype, device: torch.float32)  # a processor without bfloat16
    options = bench.options_of(["--rows", "serial"])
    assert options.dtype == "float32"
    prepared = rows.Prepared(*(Path("nowhere"),) * 3, tail=(), dtype=options.dtype)
    asked = [command.words for row in ("peer", "trl", "plain") for command in rows.ROWS[row](prepared)]
    assert len(asked) > 3 and {words[words.index("--dtype") + 1] for words in asked} == {"float32"}
    other = rows.Prepared(*(Path("nowhere"),) * 3, tail=(), dtype="bfloat16")
    assert all("bfloat16" in command.title for row in ("trl", "plain") for command in rows.ROWS[row](other))


def test_two_runs_at_once_are_added_up(benchmarks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import rows

    alone = (8.0, 5.0, 10.0)  # then two at once give 2 x 3: ratios 0.75, 1.2, 0.6
    speeds = iter([speed for one in alone for speed in (one, 3.0, 3.0)])
    monkeypatch.setattr(rows, "_started", lambda command: None)
    monkeypatch.setattr(rows, "_finished", lambda process, command: {"mean_client_steps_per_s": next(speeds)})
    prepared = rows.Prepared(*(Path("nowhere"),) * 3, tail=())
    assert rows.pair(prepared) == 0.75


def test_privacy_prints_what_it_promises(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import privacy as bench

    for name, value in {"TABLE": bench.TABLE[:1], "SCHEMES": bench.SCHEMES[:1], "ROUNDS": 20, "DRAWS": 1000}.items():
        monkeypatch.setattr(bench, name, value)
    sections = ["table", "calibration", "accountant", "noise", "noised_sums"]
    monkeypatch.setattr(sys, "argv", ["privacy.py", "--json", "--sections", *sections])
    bench.main()
    figures = json.loads(capsys.readouterr().out)
    assert figures.pop("benchmark") == "privacy"
    assert figures.keys() >= {"epsilon_table_max_error", "calibration_overshoot", "accountant_seconds"}
    assert 0 <= figures["epsilon_table_max_error"] <= 0.02 and 0 <= figures["calibration_overshoot"] <= 0.01
    assert figures["noise_max_error"] < 0.01


@pytest.mark.slow
def test_cells_of_the_price_of_privacy_are_measured_once(
    benchmarks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a small federation; correlated noise needs rounds that are apart, which FedSVD has no use for."""
    import privacy_utility as bench

    for name, value in (("CLIENTS", 8), ("COHORT", 4), ("ROUNDS", 1), ("LENGTH", 128)):
        monkeypatch.setattr(bench, name, value)
    rows = [json.dumps({"text": f"question {n}?", "category": f"intent {n % 5}"}) for n in range(32)]
    for part in ("train", "test"):
        (tmp_path / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    common = ["--data", str(tmp_path), "--out", str(tmp_path / "out"), "--seeds", "0", "--records", "4"]
    levels = ["none", "client, epsilon 2", "client, epsilon 8, correlated noise"]
    chosen = ["--levels", *levels, "--adapters", "FFA-LoRA", "FedSVD", "--set", "task.model=tiny-llama"]
    assert bench.main([*common, *chosen]) == 0
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert [(row["level"], row["adapter"]) for row in found["rows"]] == [
        *((level, adapter) for level in levels[:2] for adapter in ("FFA-LoRA", "FedSVD")),
        (levels[2], "FFA-LoRA"),
    ]
    for row in found["rows"]:
        target = {"none": None, "client, epsilon 2": 2.0}.get(row["level"], 8.0)
        assert row["epsilon"] is None if target is None else 0.98 * target < row["epsilon"] <= target
        assert row["nll"] != row["base"] and row["base"] == found["rows"][0]["base"]
    assert bench.main([*common, *chosen, "--most", "1"]) == 0
    again = capsys.readouterr()
    assert again.err == "" and json.loads(again.out.splitlines()[-1])["rows"] == found["rows"]
    assert bench.shown([1.0, 2.0, 3.0]) == "2.000 ± 1.000" and bench.shown([]) == "-"


def test_secure_sums_print_what_they_promise(benchmarks: None, capsys: pytest.CaptureFixture[str]) -> None:
    import secagg as bench

    words = ["--json", "--quick", "--repeats", "1", "--sections", "masks,setup,rounding,exact,flower", "--peers"]
    assert bench.main([*words, "no-python"]) == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    figures = json.loads(line)
    assert (figures["exact_cases"], figures["wrong_cases"]) == (20, 0)
    assert all(figures[name] > 0 for name in ("mask_u32_s", "mask_u16_s", "mask_kernel_gbps", "setup_100_ms"))
    assert figures["bytes_per_parameter"] == 2.0 and figures["relative_rms_error"] < 0.005
    assert figures["flower_over_ours"] is None and "flower was not measured" in printed.err


def test_homomorphic_sums_print_their_curve(benchmarks: None, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tenseal")
    import homomorphic as bench

    assert bench.main(["--json", "--parameters", "5000", "--clients", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert all(row["error"] < 2.0**-22 for row in rows)
    assert 7 < rows[-1]["bytes_over_float32"] < 14, "three ciphertexts of 64 KB for 5,000 values"


def test_rounding_to_a_ring_is_without_bias(benchmarks: None) -> None:
    """0.3 of a step, 40,000 times: the mean is 0.3 within five standard errors, sqrt(0.21 / 40,000) each."""
    import numpy as np
    import secagg as bench

    for bits in (16, 32):
        for sign in (1, -1):
            found = bench.quantise(np.full(40_000, sign * 0.15, np.float32), 2.0, bits)
            mean = found.view("<i2" if bits == 16 else "<i4").mean()
            assert abs(mean - sign * 0.3) < 5 * (0.21 / 40_000) ** 0.5


def test_personal_measures_a_cell_once_and_counts_who_is_better_off(
    benchmarks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import personal

    small = ["task.model=tiny-llama", "task.adapter.lora.targets=[q_proj]", "work.sgd.max_length=160",
             "evaluation.limit=1"]  # fmt: skip
    words = ["--out", str(tmp_path), "--sets", "handbook", "--methods", "local_only", "fedsa_lora", "--seeds", "0",
             "--rounds", "1", "--set", *small]  # fmt: skip
    assert personal.main([*words, "--most", "1"]) == 0 and personal.main(words) == 0 and personal.main(words) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["local_only", "fedsa_lora"]
    assert all(row["clients"].keys() == {"bank", "cargo", "clinic", "library"} for row in rows)
    assert rows[0]["bytes_up"] == 0 < rows[1]["bytes_up"]
    one = {"data": "handbook", "seed": 0, "method": "local_only", "clients": {"a": 2.0, "b": 1.0}}
    two = {**one, "method": "ditto", "clients": {"a": 1.0, "b": 1.0}}
    assert personal.better([one, two], two, "local_only") == 0.5 and personal.better([two], two, "fedit") is None


def test_personal_refuses_in_one_sentence(benchmarks: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import personal

    for words, sentence in (
        (["--methods", "fedsa_lra"], "there is no 'fedsa_lra'; did you mean 'fedsa_lora'?"),
        (["--sets", "medmcqa"], "need --data, the folder that holds them"),
    ):
        with pytest.raises(SystemExit) as ended:
            personal.parsed(["--out", str(tmp_path), *words])
        assert ended.value.code == 2 and sentence in capsys.readouterr().err


def test_forward_counts_the_bytes_and_both_speeds(benchmarks: None) -> None:
    import forward as bench

    options = Namespace(model="tiny-llama", dtype="float32", clients=2, steps=1, batch_size=1, length=8, repeats=1)
    figures = bench.speeds(options)
    assert figures.keys() == {"stacked_steps_per_s", "serial_steps_per_s", "stacked_over_serial"}
    quotient = figures["stacked_steps_per_s"] / figures["serial_steps_per_s"]
    assert figures["stacked_over_serial"] == pytest.approx(quotient)
    few, many = (
        bench.sent("tiny-llama", "fedkseed", "full", f"{{lr: 1e-4, steps: 1, max_length: 256, pool: {pool}}}")
        for pool in (64, 1088)
    )
    assert abs(many - few - 4 * 1024) < 64, "4 bytes for each seed of the pool"
