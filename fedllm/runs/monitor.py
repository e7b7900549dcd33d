"""The monitor of a run: what it sees of each round's updates, and the alarms that it raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedllm.errors import reason
from fedllm.evaluation.diagnostics.alarms import Alarms
from fedllm.evaluation.diagnostics.cohort import CohortStatistics
from fedllm.evaluation.settings import Diagnostics
from fedllm.events import Event, RoundFinished, Warned
from fedllm.experiment.record import Experiment
from fedllm.messages.traits import Fact
from fedllm.messages.update import Request, Update
from fedllm.models.adapters.lora import Lora
from fedllm.models.loaded_model import LoadedModel
from fedllm.tensors import tree
from fedllm.tensors.tree import Tree


@dataclass(eq=False)
class RoundMonitor:
    """One for a process's share of a run.

    Args:
        shown: False where the server sees sums, or integers, so that only alarms about losses and bytes are left.
    """

    settings: Diagnostics
    shown: bool
    alarms: Alarms
    constants: Tree
    scale: float
    smallest: int | None
    fixed: bool
    trouble: str = ""  # of this round's figures

    @staticmethod
    def of(experiment: Experiment, model: LoadedModel, clients: Sequence[str]) -> RoundMonitor | None:
        """None where `evaluation.diagnostics` is."""
        settings, adapter = experiment.evaluation.diagnostics, experiment.task.adapter
        if settings is None:
            return None
        rank, scale = (adapter.rank, adapter.scale) if isinstance(adapter, Lora) else (None, 1.0)
        hidden = experiment.demands.secrecy or Fact.HIDDEN not in experiment.aggregator.traits.loses
        hidden = hidden or (experiment.private and experiment.evaluation.private)
        ranks = [experiment.federation.profile(client).rank for client in clients]
        return RoundMonitor(
            settings=settings,
            shown=not (hidden or any(Fact.INTEGERS in stage.traits.gives for stage in experiment.pipeline)),
            alarms=Alarms(settings),
            constants=tree.to(model.with_constants(experiment.key).constants, "cpu"),
            scale=scale,
            smallest=min((own for own in ranks if own is not None and rank is not None and own < rank), default=None),
            fixed=any(Fact.ANSWERED in stage.traits.loses for stage in experiment.pipeline),
        )

    def cohort(self) -> CohortStatistics | None:
        """What will see the next round's updates."""
        self.trouble = ""
        if not self.shown:
            return None
        return CohortStatistics(self.settings, self.constants, self.scale, self.smallest, self.fixed)

    def seen(self, cohort: CohortStatistics | None, request: Request, reply: Update) -> None:
        """Show the cohort an update. What goes wrong there costs the round its figures, and nothing else."""
        if cohort is None or self.trouble:
            return
        try:
            cohort(request, reply)
        except Exception as error:
            self.trouble = reason(error)

    def end_round(self, cohort: CohortStatistics | None, params: Tree, finished: RoundFinished) -> list[Event]:
        """The events of a round's end: its figures, unless it was empty, `finished` itself, and the alarms that begin.
        Where the figures cannot be had, a warning says why.

        Args:
            params: what the server came to.
        """
        figures: list[Event] = []
        begun: list[Event] = []
        try:
            if cohort is not None and not finished.note and not self.trouble:
                figures += cohort.diagnosed(finished.round, params)
            for event in (*figures, finished):
                self.alarms(event)
            begun += self.alarms.begun()
        except Exception as error:  # they only watch: a run is not lost for them
            self.trouble = reason(error)
        if self.trouble:
            text = f"round {finished.round + 1} has no diagnostics: {self.trouble}"
            begun.append(Warned(text, finished.round))
        return [*figures, finished, *begun]
