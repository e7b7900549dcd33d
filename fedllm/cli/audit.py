"""`fedllm audit`: could somebody with the model tell which records it was trained on?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fedllm.cli import tables
from fedllm.errors import counted
from fedllm.evaluation.audits.intervals import Interval
from fedllm.files import to_json_text
from fedllm.runs.audit import Audit, as_json, audit, write


def audit_run(folder: Path, *, records: int, as_text: bool) -> None:
    """Attack a run's model, print what that reaches, and keep it in `audit.json`."""
    quiet, console = Console(stderr=True), Console()
    found = audit(folder, records=records, note=lambda text: quiet.print(text, highlight=False, markup=False))
    path = write(folder, found)
    if as_text:
        print(to_json_text(as_json(found)))
        return
    rows = [[one.attack, _interval(one.auc), _interval(one.at_one_percent)] for one in found.findings]
    tables.show(console, ["attack", "AUC", "found at 1 % false alarms"], rows)
    for line in sentences(found):
        console.print(line, highlight=False, markup=False)
    console.print(f"kept in {path}", highlight=False, markup=False)


def sentences(found: Audit) -> list[str]:
    """What the figures mean."""
    lines = [f"{found.members} records that were trained on, {found.others} that were held out"]
    if found.duplicates:
        lines[0] += f" ({counted(found.duplicates, 'text')} of both left out)"
    best = max((one for one in found.findings if one.attack != "blind"), key=lambda one: one.auc.value)
    if found.biased:
        lines.append(
            "The words alone tell both sides apart (blind), without any model: the sides differ, and the figures above "
            "say nothing about the model. Hold out a random part of the records (federation.shards.heldout: 0.1)."
        )
    elif best.auc.low > 0.5:
        lines.append(
            f"Somebody who has the model can tell that a record was used: of a record that was and one that was not, "
            f"'{best.attack}' picks the right one in {best.auc.value:.0%} of cases (by chance in 50 %)."
        )
    else:
        lines.append("None of these attacks tells the records apart. That is no proof: others might.")
    if found.claimed is not None:
        lines.append(f"The run promises an epsilon of {found.claimed:.3g}.")
    return lines


def _interval(found: Interval | None) -> str:
    return "too few records" if found is None else f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
