"""Client steps per second of a round: the batched engine against the serial one and against what people use today.

    python benchmarks/round.py --json [--records FILE] [--template alpaca] [--clients 16] [--pair]
    python benchmarks/round.py --json --rows plain,serial,batched --clients 16 --batch 1 --max-length 64 --fill
    python benchmarks/round.py --json --rows plain,serial,batched --clients 32 --fill --device cuda --shape llama-1b

All rows (rows.py) take the same batches of the same records for the same number of steps: LoRA on every linear layer,
AdamW at a constant rate, and compute in --dtype: by default in what the processor is fast in (peer_shipped always in
float32, as it is shipped). Each runs in a process of its own, one at a time; its best round after a warm-up counts. A
row is run again until its two best runs are within 10 % of each other, at most --runs times; `not_steady` names those
that were not. `share_of_peak` is 4 x parameters x useful tokens/s of the batched row over the peak of products of that
type on all cores, or on the GPU: 2 forward, 2 backward, and no gradient of the frozen base. Tokens and page faults are
per client and step.
With --shape the weights are random: where no model can be downloaded, it takes just as long.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from peak import cores, gemm_peak
from prepare import Facts, prepare
from rows import NEED_PEERS, ROWS, Figures, Prepared, check_peers, is_steady, measure, pair
from shapes import SHAPES

from fedllm.errors import ConfigError, FedllmError, RunError, nearest
from fedllm.models.base_models.load import resolve_device, resolve_dtype
from fedllm.models.kernels.build import library

QUICK = {"clients": 2, "steps": 2, "rounds": 1, "runs": 1}
DTYPES = ("auto", "float32", "bfloat16")
NUMBERS = {  # default and meaning
    "clients": (8, "clients of a round"),
    "steps": (8, "local steps of a client in a round"),
    "batch": (2, "sequences of a step"),
    "max-length": (256, "tokens of a sequence; what is longer is cut"),
    "rounds": (2, "rounds after the warm-up; the best counts"),
    "runs": (4, "runs of a row, at most"),
}


def options_of(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, `dtype` as it is on the device.

    Raises:
        ConfigError: an unknown row, shape or device, or a number below 1.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--shape", help=f"a model of random weights in place of --model: {', '.join(SHAPES)}")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; the peers run on the CPU alone")
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="what all rows compute in; default: %(default)s"
    )
    parser.add_argument("--records", type=Path, help="a file of records instead of those made from the handbook")
    parser.add_argument(
        "--template", choices=("plain", "alpaca"), default="plain", help="alpaca: as FlowerTune; default: %(default)s"
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="separated by commas; default: %(default)s")
    for name, (default, meaning) in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{meaning}; default: %(default)s")
    parser.add_argument("--fill", action="store_true", help="take only sequences of exactly --max-length tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pair", action="store_true", help="measure two batched runs at once against one alone, too")
    parser.add_argument("--quick", action="store_true", help=" ".join(f"--{k} {v}" for k, v in QUICK.items()))
    parser.add_argument("--json", action="store_true", help="print nothing but the line of JSON")
    options = parser.parse_args(arguments)
    vars(options).update(QUICK if options.quick else {})
    options.rows = options.rows.split(",")
    for row in options.rows:
        if row not in ROWS:
            raise ConfigError(f"--rows: there is no row '{row}'{nearest(row, ROWS)}")
        if row in NEED_PEERS and options.device != "cpu":
            raise ConfigError(f"--device {options.device}: {row} runs on the CPU alone; leave it out of --rows")
    if options.shape is not None and options.shape not in SHAPES:
        raise ConfigError(f"--shape: there is no shape '{options.shape}'{nearest(options.shape, SHAPES)}")
    options.dtype = dtype_name(options.dtype, resolve_device(options.device))
    for name in NUMBERS:
        if (value := vars(options)[name.replace("-", "_")]) < 1:
            raise ConfigError(f"--{name} is {value}; it must be 1 or more")
    return options


def dtype_name(dtype: str, device: str = "cpu") -> str:
    """A type's name; of "auto", that of what the device is fast in."""
    return str(resolve_dtype(dtype, device=device)).removeprefix("torch.")


def measured(options: argparse.Namespace, prepared: Prepared) -> tuple[dict[str, Figures], dict[str, str]]:
    """The figures of each row, and why a row has none."""
    found: dict[str, Figures] = {}
    failed: dict[str, str] = {}
    for row in [row for row in ROWS if row in options.rows]:
        try:
            found[row] = measure(row, prepared)
            print(f"{row}: {described(found[row])}, {options.dtype}", file=sys.stderr)
        except RunError as error:
            failed[row] = str(error)
            print(f"{row}: none, since {error}", file=sys.stderr)
    return found, failed


def described(figures: Figures) -> str:
    """A row's speed, and how sure it is."""
    runs, spread = len(figures["runs"]), figures["spread"]
    sure = "one run" if spread is None else f"the best two of {runs} runs {100 * spread:.0f} % apart"
    steady = "" if is_steady(figures["runs"]) else ", not steady"
    return f"{figures['client_steps_per_s']:.2f} client-steps/s ({figures['way']}; {sure}{steady})"


def summary(found: dict[str, Figures], facts: Facts, peak: float) -> dict[str, Any]:
    """The figures that rows give together; None where a row is missing."""
    speeds = {row: found[row]["client_steps_per_s"] if row in found else None for row in ROWS}
    batched, ours = speeds["batched"], found.get("batched", {})
    others = [row for row in ROWS if row != "batched"]
    useful = batched and 4 * facts.parameters * ours["real_tokens_per_step"] * batched
    return {
        **speeds,
        **{f"batched_over_{row}": batched and speeds[row] and batched / speeds[row] for row in others},
        "gemm_peak_gflops": peak,
        "share_of_peak": useful and useful / (peak * 1e9),
        "real_tokens_per_step": facts.tokens,
        "page_faults_per_step": ours.get("page_faults_per_step"),
        "real_tokens_per_step_by_row": {row: figures["real_tokens_per_step"] for row, figures in found.items()},
        "kernels": library().about,
        "ways": {row: figures["way"] for row, figures in found.items()},
        "runs_by_row": {row: figures["runs"] for row, figures in found.items()},
        "not_steady": [row for row, figures in found.items() if not is_steady(figures["runs"])],
    }


def benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of a run.

    Raises:
        FedllmError: the peers, the records or the model cannot be had.
    """
    check_peers(options.rows)
    with tempfile.TemporaryDirectory() as folder:
        prepared, facts = prepare(options, Path(folder))
        rows = max(1, round(4 * facts.tokens))  # of a stack of four clients
        peak_of = partial(gemm_peak, facts.shapes, rows, resolve_dtype(options.dtype), options.device)
        before = peak_of()
        found, failed = measured(options, prepared)
        peak = max(before, peak_of())
        together = pair(prepared) if options.pair and "batched" not in failed else None
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "quick", "pair")}
    settings["records"] = str(options.records or "handbook")
    figures = summary(found, facts, peak)
    return {"benchmark": "round", **settings, "cores": cores(), **figures, "pair_over_one": together, "failed": failed}


def main(arguments: list[str] | None = None) -> int:
    """Print the figures; the last line is JSON. 2 for what the user can mend, 1 if a row failed."""
    try:
        options = options_of(arguments)
        figures = benchmark(options)
    except FedllmError as error:
        print(error, file=sys.stderr)
        return 2
    if not options.json:
        for name, value in figures.items():
            print(f"{name:28} {value:.3f}" if isinstance(value, float) else f"{name:28} {value}")
    print(json.dumps(figures))
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
