"""A run of fedllm in a process of its own: seconds, tokens and page faults of its rounds but the first, as JSON.

    python benchmarks/federated.py EXPERIMENT ENGINE [--meet FOLDER]

With --meet, two such processes wait for each other in FOLDER after the warm-up, so that their rounds overlap.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import fedllm
from fedllm.errors import FedllmError
from fedllm.events import ClientFailed, ClientFinished, Event, RoundFinished, RoundStarted


@dataclass(eq=False)
class Watch:
    """Listens to a run."""

    meet: Path | None
    faults_before: int = 0
    faults: list[int] = field(default_factory=list)
    rounds: list[RoundFinished] = field(default_factory=list)
    failure: str = ""

    def __call__(self, event: Event) -> None:
        """Note the rounds, and the page faults from each one's start to its last client."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if isinstance(event, RoundStarted):
            self.faults_before = now
            self.faults.append(0)
        elif isinstance(event, ClientFinished):
            self.faults[-1] = now - self.faults_before
        elif isinstance(event, ClientFailed):
            self.failure = f"{event.client} failed: {event.reason}"
        elif isinstance(event, RoundFinished):
            self.rounds.append(event)
            if self.meet is not None and event.round == 0:
                wait_for_other(self.meet)


def wait_for_other(folder: Path) -> None:
    """Return when two processes have come here."""
    tempfile.mkstemp(dir=folder)
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)


def figures(watch: Watch, steps: int) -> dict[str, object]:
    """The figures of all rounds but the first, of `steps` client steps each."""
    timed = watch.rounds[1:]
    seconds = [event.seconds for event in timed]
    return {
        "round_s": seconds,
        "client_steps_per_s": steps / min(seconds),
        "mean_client_steps_per_s": steps * len(seconds) / sum(seconds),
        "real_tokens_per_step": sum(event.tokens for event in timed) / len(timed) / steps,
        "page_faults_per_step": sum(watch.faults[1:]) / len(timed) / steps,
    }


def main() -> int:
    """Run the experiment; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("engine")
    parser.add_argument("--meet", type=Path)
    options = parser.parse_args()
    watch = Watch(options.meet)
    try:
        experiment = fedllm.load(options.experiment)
        with tempfile.TemporaryDirectory() as folder:
            fedllm.run(experiment, engine=options.engine, out=Path(folder, "run"), listeners=[watch])
    except FedllmError as error:
        watch.failure = str(error)
    if watch.failure:
        print(watch.failure, file=sys.stderr)
        return 2
    print(json.dumps(figures(watch, experiment.work.steps * watch.rounds[0].clients)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
