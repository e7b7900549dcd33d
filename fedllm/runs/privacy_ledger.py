"""What a run has released: a journal that is on the disk before the noise is used, and never gets shorter.

    privacy.jsonl   one line a release; appended and flushed to the disk first, then the noise is drawn
    privacy.json    the ledger and its guarantee, from which anybody can compute epsilon again
    privacy.key     32 secret bytes of the operating system, readable by the owner alone, until the run ends

The noise of a release follows from the key, the round and the sum that it hides. A process that dies behind the journal
and is started again repeats the same release, to the bit, and it counts once. Where anything is different the second
time, the noise is fresh and the release counts again. An older checkpoint brings nothing back: what was spent stays.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedllm.engines.client_noise import FILE, forget_key, key_file, seeded_key
from fedllm.errors import PrivacyError, RunError, not_written
from fedllm.events import PrivacySpent
from fedllm.experiment.privacy import PrivacyPlan
from fedllm.files import sync, write_durably
from fedllm.messages.context import ServerNoise
from fedllm.privacy.accountant import Guarantee, epsilon, worst
from fedllm.privacy.noise import NoiseStream, derive
from fedllm.privacy.releases import Kind, Release, ledger_to_json, release_from_json
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree
from fedllm.version import __version__

Record = Mapping[str, Any]  # a line of the journal: round, mark, what, releases (each with its clients)


@dataclass(eq=False)
class PrivacyLedger:
    """The releases of a run, by round and mark."""

    plan: PrivacyPlan
    folder: Path
    records: dict[tuple[int, str], Record] = field(default_factory=dict)
    ratios: dict[int, float] = field(default_factory=dict)  # signal over noise, by round
    clips: dict[int, float] = field(default_factory=dict)  # that clients were given, by round

    def restore(self, saved: Iterable[Record] = ()) -> None:
        """Take over what the journal and a checkpoint know of. What either of them knows was spent."""
        for record in (*saved, *journal(self.folder)):
            self.records[record["round"], record["mark"]] = record

    def told(self, round: int) -> PrivacySpent:
        """What the run has spent, after a round."""
        found = self.guarantee()
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
        """Clients that add their own noise are about to send. `digest`: of what they start from."""
        if not self.plan.by_client:
            return
        clients = defaultdict[Release, list[str]](list)
        for client in cohort:
            clients[self.plan.of_client(client)].append(client)
        releases = [{**release.to_json(), "clients": names} for release, names in clients.items()]
        mark = derive(self.key, "cohort", digest, json.dumps(releases, sort_keys=True)).hex()[:16]
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
        self._refuse_above_budget(round, mark, record)
        path = self.folder / "privacy.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, sort_keys=True) + "\n")
                file.flush()
                os.fsync(file.fileno())
            sync(self.folder)
        except OSError as error:
            raise not_written(path, error, "resume the run") from error
        self.records[round, mark] = record

    def _refuse_above_budget(self, round: int, mark: str, record: Record) -> None:
        """
        Raises:
            BudgetSpentError: with this release epsilon would be above its target, as where a lost round comes out
                otherwise when it is run again.
        """
        demand = self.plan.experiment.demands.privacy
        if demand is None or demand.target_epsilon is None:
            return
        after = replace(self, records={**self.records, (round, mark): record}).guarantee().epsilon
        if after > demand.target_epsilon * (1 + 1e-9):
            raise BudgetSpentError(_above(after, demand.target_epsilon))

    def ledgers(self) -> dict[str, dict[Release, int]]:
        """By client, or all under "" where the server adds the noise."""
        found: dict[str, Counter[tuple[int, Release]]] = defaultdict(Counter)
        for record in self.records.values():
            for entry in record["releases"]:
                given = {name: value for name, value in entry.items() if name != "clients"}
                for client in entry.get("clients", [""]):
                    found[client][record["round"], release_from_json(given)] += 1
        return {client: _composed(rounds) for client, rounds in found.items()}

    def guarantee(self) -> Guarantee:
        """Of what was released so far: the one of the client that has lost most."""
        ledgers = self.ledgers()
        if not self.plan.mechanism.noise_multiplier:  # no release is made, and nothing is hidden
            return replace(epsilon({}, self.plan.delta), epsilon=math.inf)
        return worst(ledgers, self.plan.delta)[1] if ledgers else epsilon({}, self.plan.delta)

    def promise(self, done: int) -> Guarantee:
        """Of what was released and of all rounds to come, where `done` are over."""
        more = self.plan.ledger(self.plan.experiment.rounds - done)
        ledgers = self.ledgers() or {"": {}}
        return worst({client: _with(spent, more) for client, spent in ledgers.items()}, self.plan.delta)[1]

    def passes_budget(self, round: int) -> str:
        """Why this round may not begin; empty if it may. One that is in the journal already was lost behind it: run
        again, it makes the same release, which costs nothing more."""
        demand = self.plan.experiment.demands.privacy
        if demand is None or demand.target_epsilon is None:
            return ""
        known = any(noted == round for noted, _ in self.records)
        ledgers = self.ledgers().values() if known else self._next()
        found = max((epsilon(ledger, self.plan.delta).epsilon for ledger in ledgers), default=0.0)
        if found <= demand.target_epsilon * (1 + 1e-9):
            return ""
        return _above(found, demand.target_epsilon)

    def _next(self) -> list[Mapping[Release, int]]:
        """The ledgers after one more round, of the clients whose ledgers are the largest of their kind."""
        spent = self.ledgers()
        if not self.plan.by_client:
            ledger = spent.get("", {})
            (release,) = self.plan.ledger(1)
            known = release.kind == "correlated" and release in ledger
            return [ledger if known else {**ledger, release: ledger.get(release, 0) + 1}]
        after = {}
        for client in self.plan.sizes:
            ledger, release = spent.get(client, {}), self.plan.of_client(client)
            grown = {**ledger, release: ledger.get(release, 0) + 1}
            after[tuple(sorted((repr(one), count) for one, count in grown.items()))] = grown
        return list(after.values())

    def saved(self) -> list[Record]:
        """For the checkpoint."""
        return list(self.records.values())

    def write(self) -> Guarantee:
        """`privacy.json`; returns what it promises."""
        found = self.guarantee()
        text = json.dumps(self.statement(found), indent=2) + "\n"
        path = self.folder / "privacy.json"
        try:
            part = path.with_suffix(".part")
            write_durably(part, text.encode())
            part.replace(path)
        except OSError as error:
            raise not_written(path, error, "resume the run") from error
        return found

    def statement(self, found: Guarantee) -> dict[str, Any]:
        """The privacy statement of the run, machine-readable."""
        plan, ledgers = self.plan, self.ledgers()
        demand = plan.experiment.demands.privacy
        client = worst(ledgers, plan.delta)[0] if ledgers else ""
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
            "ledger": ledger_to_json(ledgers.get(client, {})),
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
        assert made.kind == kind
        return self.ledger.note_release(self.round, made, stage, digest)

    def measured(self, noised: float, noise: float, clip: float) -> None:
        """Keep the clip, and the ratio of signal to noise: sqrt(max(0, ||y||^2 - E||noise||^2) / E||noise||^2)."""
        self.ledger.clips[self.round] = clip
        if noise > 0:
            self.ledger.ratios[self.round] = max(0.0, noised**2 - noise**2) ** 0.5 / noise


def assumptions(plan: PrivacyPlan) -> list[str]:
    """What the guarantee rests on, in words."""
    who = "the server" if not plan.by_client else "each client's own software"
    found = [
        f"{who} adds the noise and keeps it secret",
        "clients follow the protocol: whoever sends more than the clip has no guarantee, and others keep theirs",
        "settings were not chosen by looking at private data of the same clients",
    ]
    if plan.scheme.name in ("poisson", "fixed_size") and not plan.by_client:
        found.append(
            "nobody who sees the model knows which clients took part: events.jsonl, summary.json, the report and "
            "checkpoints tell of them, so keep these as secret as the data"
        )
    if not plan.by_client:
        found.append("the checkpoints and the clients' memories are private data of the server and the clients")
    return found


class BudgetSpentError(Exception):
    """A release that would pass the budget. Its noise was not drawn, and the run ends with the round before it."""


def _above(found: float, target: float) -> str:
    return f"the next round would bring epsilon to {found:.3f}, above demands.privacy.target_epsilon {target:g}"


def finite(epsilon: float) -> float | None:
    """Epsilon, or None where nothing is promised."""
    return epsilon if math.isfinite(epsilon) else None


def _with(spent: Mapping[Release, int], more: Mapping[Release, int]) -> dict[Release, int]:
    """Both together; a correlated run is one release."""
    found = {**spent}
    for release, count in more.items():
        found[release] = 1 if release.kind == "correlated" else found.get(release, 0) + count
    return found


def _composed(rounds: Mapping[tuple[int, Release], int]) -> dict[Release, int]:
    """A ledger from (round, release) and how often it was made; a correlated run is one release."""
    times = [(release.repeated(count) if count > 1 else release) for (_, release), count in rounds.items()]
    correlated = [release for release in times if release.kind == "correlated"]
    found = Counter(release for release in times if release.kind != "correlated")
    if correlated:
        found[min(correlated, key=lambda release: release.noise_multiplier)] = 1
    return dict(found)


def journal(folder: Path) -> list[Record]:
    """The whole lines of a run's journal. One that was cut off released nothing, and is taken away.

    Raises:
        RunError: a line in the middle is damaged.
    """
    path = folder / "privacy.jsonl"
    if not path.is_file():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(path, len(whole))
    found = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            record = json.loads(line)
            _, _, found_releases = record["round"], record["mark"], record["releases"]
            for release in found_releases:
                release_from_json({name: value for name, value in release.items() if name != "clients"})
            found.append(record)
        except (ValueError, LookupError, TypeError, AttributeError, PrivacyError) as error:
            raise RunError(
                f"{path}, line {number} is damaged, so nobody knows what was spent; bring the file back from a copy"
            ) from error
    return found
