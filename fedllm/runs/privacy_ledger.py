"""What a run has released: a journal that is on the disk before the noise is used, and never gets shorter.

    privacy.jsonl   one line a release (privacy_journal.py)
    privacy.json    the ledger and its guarantee, from which anybody can compute epsilon again
    privacy.key     32 secret bytes of the operating system, readable by the owner alone, until the run ends

The noise of a release follows from the key, the round and the sum that it hides. A process that dies behind the journal
and is started again repeats the same release, to the bit, and it counts once. Where anything is different the second
time, the noise is fresh and the release counts again. An older checkpoint brings nothing back: what was spent stays.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.engines.client_noise import FILE, forget_key, key_file, seeded_key
from fedllm.errors import PrivacyError, not_written
from fedllm.events import PrivacySpent
from fedllm.experiment.privacy import PrivacyPlan, assumptions
from fedllm.messages.context import ServerNoise
from fedllm.privacy.accountant import Guarantee, epsilon, worst
from fedllm.privacy.noise import NoiseStream, derive
from fedllm.privacy.releases import Kind, Release, ledger_to_json, release_from_json
from fedllm.runs import privacy_journal
from fedllm.runs.folder import write_whole
from fedllm.runs.privacy_journal import Record
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.version import __version__

Made = Counter[tuple[int, Release]]  # how often a release was made in a round


@dataclass(eq=False)
class PrivacyLedger:
    """The releases of a run, by round and mark."""

    plan: PrivacyPlan
    folder: Path
    computed_by: str = ""  # what a client's bits depend on beside the experiment
    records: dict[tuple[int, str], Record] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)  # signal over noise, by round
    clips: dict[int, float] = field(default_factory=dict)  # that clients were given, by round
    made: dict[str, Made] = field(default_factory=dict)  # what the records hold, by client; all under "" on the server
    known: tuple[int, str, Guarantee] | None = None  # of so many records: who has lost most, and how much

    def restore(self, saved: Iterable[Record] = ()) -> None:
        """Take over what the journal and a checkpoint know of. What either of them knows was spent."""
        for record in (*saved, *privacy_journal.read(self.folder)):
            self._take(record)

    def _take(self, record: Record) -> None:
        if (record["round"], record["mark"]) not in self.records:
            self.records[record["round"], record["mark"]] = record
            _add(self.made, record)

    def told(self, round: int) -> PrivacySpent:
        """What the run has spent, after a round."""
        _, found = self.worst()
        mechanism = self.plan.mechanism
        return PrivacySpent(
            round=round,
            mechanism=self.plan.name,
            unit=self.plan.unit,
            epsilon=finite(found.epsilon),
            delta=found.delta,
            noise_multiplier=float(mechanism.noise_multiplier or 0.0),
            clip=self.clips.get(round, mechanism.clip),
            signal_to_noise=self.ratios.get(round),
        )

    @property
    def key(self) -> bytes:
        """The secret key of the server's noise."""
        demand = self.plan.experiment.demands.privacy
        if demand is not None and demand.seeded_noise:
            return seeded_key(self.plan.experiment.key)
        return key_file(self.folder / "privacy.key")

    def at(self, round: int) -> RoundNoise:
        """The noise of a round."""
        return RoundNoise(self, round)

    def note_cohort(self, round: int, cohort: Sequence[str], digest: bytes) -> None:
        """Clients that add their own noise are about to send. `digest`: of what they start from. Asked again, clients
        send the same only where the same computes it: elsewhere their noise is fresh, and counts again."""
        if not self.plan.by_client:
            return
        clients = defaultdict[Release, list[str]](list)
        for client in cohort:
            clients[self.plan.of_client(client)].append(client)
        releases = [{**release.to_json(), "clients": names} for release, names in clients.items()]
        told = json.dumps([releases, self.computed_by], sort_keys=True)
        mark = derive(self.key, "cohort", digest, told).hex()[:16]
        self._write(round, mark, self.plan.name, releases)

    def note_release(self, round: int, release: Release, stage: str, digest: bytes) -> NoiseStream:
        """Account for a noised sum, and then hand out its noise."""
        made = release.to_json()
        told = json.dumps(made, sort_keys=True)  # the same draws at another scale would show the sum
        self._write(round, derive(self.key, "mark", stage, digest, told).hex()[:16], stage, [made])
        return NoiseStream(derive(self.key, "server", round, stage, digest, told))

    def _write(self, round: int, mark: str, stage: str, releases: list[dict[str, Any]]) -> None:
        record = {"round": round, "mark": mark, "stage": stage, "releases": releases}
        if (round, mark) in self.records:
            return
        self._refuse_above_budget(record)
        privacy_journal.append(self.folder, record)
        self._take(record)

    def _refuse_above_budget(self, record: Record) -> None:
        """
        Raises:
            BudgetSpentError: with this release epsilon would be above its target, as where a lost round comes out
                otherwise when it is run again.
        """
        after = {client: Counter(rounds) for client, rounds in self.made.items()}
        _add(after, record)
        if text := self._above(_composed(rounds) for rounds in after.values()):
            raise BudgetSpentError(text)

    def _above(self, ledgers: Iterable[Mapping[Release, int]]) -> str:
        """Why ledgers are above the budget; empty if none is, or if there is no budget."""
        demand = self.plan.experiment.demands.privacy
        if demand is None or demand.target_epsilon is None:
            return ""
        numbered = {str(number): ledger for number, ledger in enumerate(ledgers)}
        found = worst(numbered, self.plan.delta)[1].epsilon if numbered else 0.0
        if found <= demand.target_epsilon * (1 + 1e-9):
            return ""
        return (
            f"the next round would bring epsilon to {found:.3f}, above demands.privacy.target_epsilon "
            f"{demand.target_epsilon:g}"
        )

    def ledgers(self) -> dict[str, dict[Release, int]]:
        """By client, or all under "" where the server adds the noise."""
        return {client: _composed(rounds) for client, rounds in self.made.items()}

    def worst(self) -> tuple[str, Guarantee]:
        """The client that has lost most, and its guarantee; "" where the server adds the noise, or nothing was made."""
        if self.known is None or self.known[0] != len(self.records):
            ledgers, delta = self.ledgers(), self.plan.delta
            found = worst(ledgers, delta) if ledgers else ("", epsilon({}, delta))
            if not self.plan.mechanism.noise_multiplier:  # no release is made, and nothing is hidden
                found = "", replace(epsilon({}, delta), epsilon=math.inf)
            self.known = (len(self.records), *found)
        return self.known[1:]

    def promise(self, done: int) -> Guarantee:
        """Of what was released and of all rounds to come, where `done` are over."""
        more = self.plan.ledger(self.plan.experiment.rounds - done)
        ledgers = self.ledgers() or {"": {}}
        return worst({client: _with(spent, more) for client, spent in ledgers.items()}, self.plan.delta)[1]

    def passes_budget(self, round: int) -> str:
        """Why this round may not begin; empty if it may. One that is in the journal already was lost behind it: run
        again, it makes the same release, which costs nothing more."""
        known = any(noted == round for noted, _ in self.records)
        return self._above(self.ledgers().values() if known else self._next())

    def _next(self) -> list[Mapping[Release, int]]:
        """The ledgers after one more round."""
        spent = self.ledgers()
        if self.plan.by_client:
            return [_with(spent.get(client, {}), {self.plan.of_client(client): 1}) for client in self.plan.sizes]
        return [_with(spent.get("", {}), self.plan.ledger(1))]

    def saved(self) -> list[Record]:
        """For the checkpoint."""
        return list(self.records.values())

    def write(self) -> None:
        """`privacy.json`."""
        path = self.folder / "privacy.json"
        try:
            write_whole(path, json.dumps(self.statement(), indent=2) + "\n")
        except OSError as error:
            raise not_written(path, error, "resume the run") from error

    def statement(self) -> dict[str, Any]:
        """The privacy statement of the run, machine-readable."""
        plan, (client, found) = self.plan, self.worst()
        demand = plan.experiment.demands.privacy
        return {
            "unit": plan.unit,
            "mechanism": plan.name,
            "noised_by": "client" if plan.by_client else "server",
            **{**found.to_json(), "epsilon": finite(found.epsilon)},
            "clip": plan.mechanism.clip,
            "noise_multiplier": plan.mechanism.noise_multiplier,
            "target_epsilon": None if demand is None else demand.target_epsilon,
            "clients": len(plan.sizes),
            "rounds": len({round for round, _ in self.records}),
            "of_client": client or None,
            "ledger": ledger_to_json(self.ledgers().get(client, {})),
            "noise": "seeded" if demand is not None and demand.seeded_noise else "secret",
            "sampling": "simulated: drawn from the run's public seed",
            "figures_in_the_clear": not plan.experiment.evaluation.private,
            "assumptions": assumptions(plan),
            "fedllm": __version__,
        }

    def forget(self, clients: Path) -> None:
        """The run has ended: nobody needs the keys any more. `clients`: the folder of a simulation's clients."""
        forget_key(self.folder / "privacy.key")
        forget_key(clients / FILE)


@dataclass(frozen=True, eq=False)
class RoundNoise(ServerNoise):
    """The noise of one round."""

    ledger: PrivacyLedger
    round: int

    def asks(self, cohort: Sequence[str], params: Tree) -> None:
        """Clients are about to be asked; those that add their own noise will have spent that."""
        self.ledger.note_cohort(self.round, cohort, tree.digest(params).encode())

    def release(self, stage: str, kind: Kind, noise_multiplier: float, digest: bytes) -> NoiseStream:
        """Accounted for as the plan has it, with the scheme of the sampler that runs."""
        (made,) = self.ledger.plan.ledger(1, noise_multiplier)
        if made.kind != kind:
            raise PrivacyError(f"{stage} makes a release of kind {kind}, but the plan accounts for {made.kind}")
        return self.ledger.note_release(self.round, made, stage, digest)

    def measured(self, noised: float, noise: float, clip: float) -> None:
        """Keep the clip, and the ratio of signal to noise: sqrt(max(0, ||y||^2 - E||noise||^2) / E||noise||^2)."""
        self.ledger.clips[self.round] = clip
        if noise > 0:
            self.ledger.ratios[self.round] = max(0.0, noised**2 - noise**2) ** 0.5 / noise


class BudgetSpentError(Exception):
    """A release that would pass the budget. Its noise was not drawn, and the run ends with the round before it."""


def finite(epsilon: float) -> float | None:
    """Epsilon, or None where nothing is promised."""
    return epsilon if math.isfinite(epsilon) else None


def _add(made: dict[str, Made], record: Record) -> None:
    """Count the releases of a record."""
    for entry in record["releases"]:
        release = release_from_json({name: value for name, value in entry.items() if name != "clients"})
        for client in entry.get("clients", [""]):
            made.setdefault(client, Counter())[record["round"], release] += 1


def _with(spent: Mapping[Release, int], more: Mapping[Release, int]) -> dict[Release, int]:
    """Both together; a correlated run is one release."""
    found = {**spent}
    for release, count in more.items():
        found[release] = 1 if release.kind == "correlated" else found.get(release, 0) + count
    return found


def _composed(rounds: Made) -> dict[Release, int]:
    """A ledger from (round, release) and how often it was made; a correlated run is one release."""
    times = [(release.repeated(count) if count > 1 else release) for (_, release), count in rounds.items()]
    correlated = [release for release in times if release.kind == "correlated"]
    found = Counter(release for release in times if release.kind != "correlated")
    if correlated:
        found[min(correlated, key=lambda release: release.noise_multiplier)] = 1
    return dict(found)
