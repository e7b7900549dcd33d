"""Kill private runs with SIGKILL around a release and resume them; noise is secret, so no two folders are alike.

    python -m tests.runs.privacy_kills SPEC.json FOLDER

Prints JSON: for each kill the signal, the journal, epsilon, and how often the noise of each round was drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fedllm
from fedllm.runs.checkpoints import Checkpoints
from fedllm.runs.privacy_ledger import PrivacyLedger
from tests.runs.kill_driver import die, in_child
from tests.runs.small import adapter_hash

Fault = Callable[[Path], None]


def before_journal(out: Path) -> None:
    write = PrivacyLedger._write

    def dying(ledger: PrivacyLedger, round: int, *rest: Any) -> None:
        if round == 1:
            die()
        write(ledger, round, *rest)

    PrivacyLedger._write = dying  # type: ignore[method-assign]


def behind_journal(out: Path) -> None:
    write = PrivacyLedger._write

    def dying(ledger: PrivacyLedger, round: int, *rest: Any) -> None:
        write(ledger, round, *rest)
        if round == 1:
            die()

    PrivacyLedger._write = dying  # type: ignore[method-assign]


def within_journal(out: Path) -> None:
    write = PrivacyLedger._write

    def dying(ledger: PrivacyLedger, round: int, *rest: Any) -> None:
        write(ledger, round, *rest)
        if round == 1:
            path = ledger.folder / "privacy.jsonl"
            path.write_bytes(path.read_bytes()[:-9])
            die()

    PrivacyLedger._write = dying  # type: ignore[method-assign]


def before_checkpoint(out: Path) -> None:
    save = Checkpoints.save

    def dying(checkpoints: Checkpoints, run: Any) -> None:
        if run.round == 2:
            out.with_suffix(".unsaved").write_text(
                repr(sum(leaf.double().sum().item() for leaf in run.params.values()))
            )
            die()
        save(checkpoints, run)

    Checkpoints.save = dying  # type: ignore[method-assign]


def behind_checkpoint(out: Path) -> None:
    write = PrivacyLedger.write

    def dying(ledger: PrivacyLedger) -> Any:
        if len(ledger.records) == 2:
            die()
        return write(ledger)

    PrivacyLedger.write = dying  # type: ignore[method-assign]


FAULTS: tuple[Fault, ...] = (before_journal, behind_journal, within_journal, before_checkpoint, behind_checkpoint)


def main(spec: Path, folder: Path) -> dict[str, Any]:
    """One run that is not killed, and one for each fault."""
    torch.set_num_threads(1)
    settings = json.loads(spec.read_text(encoding="utf-8"))
    fedllm.run(fedllm.build(settings), engine="serial", out=folder / "whole")
    found: dict[str, Any] = {"whole": seen(folder / "whole")}
    for fault in FAULTS:
        out = folder / fault.__name__

        def killed(fault: Fault = fault, out: Path = out) -> None:
            fault(out)
            fedllm.run(fedllm.build(settings), engine="serial", out=out)

        code = in_child(killed)
        resumed = in_child(
            lambda out=out: fedllm.run(fedllm.build(settings), engine="serial", out=out, resume=True)  # type: ignore[misc]
        )
        found[fault.__name__] = {"signal": -code, "resumed": resumed, **seen(out)}
    return found


def seen(out: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (out / "privacy.jsonl").read_text().splitlines()]
    summary = json.loads((out / "summary.json").read_text())
    return {
        "journal": [(line["round"], line["mark"]) for line in lines],
        "epsilon": summary["epsilon"],
        "adapter": adapter_hash(out),
        "keys": [path.name for path in (*out.rglob("*.key"),)],
        "unsaved": out.with_suffix(".unsaved").read_text() if out.with_suffix(".unsaved").exists() else None,
    }


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))))
