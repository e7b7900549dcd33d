"""`fedllm audit`: could somebody with the model tell which records it was trained on?"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from fedllm.cli import tables
from fedllm.errors import counted
from fedllm.evaluation.audits.intervals import Interval
from fedllm.files import to_json_text
from fedllm.runs.audit import Audit, as_json, audit, write, write_file
from fedllm.runs.reconstruction import Leak, reconstruct
from fedllm.runs.reconstruction import as_json as leak_json


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


def reconstruct_run(folder: Path, *, client: str | None, as_text: bool) -> None:
    """Try to read texts out of the first round's update, and keep what came of it in `reconstruction.json`."""
    console = Console()
    found = reconstruct(folder, client)
    path = write_file(folder / "reconstruction.json", leak_json(found))
    if as_text:
        print(to_json_text(leak_json(found)))
        return
    for line in leak_sentences(found):
        console.print(line, highlight=False, markup=False)
    console.print(f"kept in {path}", highlight=False, markup=False)


def leak_sentences(found: Leak) -> list[str]:
    """Could the server read a client's text?"""
    who = f"the update of {found.clients[0]}" if len(found.clients) == 1 else f"the sum of {len(found.clients)} clients"
    lines = [
        f"{who}: {counted(found.texts, 'text')} of {found.tokens} different tokens went into it; it has room for "
        f"{found.budget} directions"
    ]
    if found.texts and found.exact:
        lines.append(
            f"Whoever sees it reads {found.exact} of {counted(found.texts, 'text')} word for word (ROUGE-1 "
            f"{found.rouge_1:.2f}, ROUGE-2 {found.rouge_2:.2f} over all)."
        )
    elif found.recalled and found.recalled > 2 * found.chance * found.tokens:
        lines.append(
            f"Whoever sees it finds {found.recalled} of the {found.tokens} tokens among {found.bag} (by chance "
            f"{found.chance * found.tokens:.1f}; ROUGE-1 of the texts {found.rouge_1:.2f})."
        )
    else:
        lines.append("This attack reads nothing out of it. That is no proof: others might.")
    if found.reason:
        lines.append(f"It went no further: {found.reason}.")
    if found.reconstructed:
        lines += [f"original       {found.original!r}", f"reconstructed  {found.reconstructed!r}"]
    if found.exact or found.recalled:
        lines.append(
            "What would change it: sums that hide each client (aggregator: secure_sum), noise of the clients "
            "(local_gaussian, discrete_noise), or more different tokens in a round than the update has directions."
        )
    return lines


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
