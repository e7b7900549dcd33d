"""The chapter on privacy: what is promised, to whom, against whom, under which assumptions, and what was spent.

Pictures and tables; the sentences stand in `promise.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.events import PrivacyPromised, PrivacySpent
from fedllm.report.formatting import NOTHING, figure, finite
from fedllm.report.markup import Html, folded, table
from fedllm.report.plot import SHADE, Figure, Trace, colour, level, line, over_rounds
from fedllm.report.promise import in_words, noise, sampling
from fedllm.report.run_history import RunHistory

_CURVES = {
    "signal_to_noise": (
        "Signal to noise",
        "Length of the sum of a round's updates over the length of its noise, estimated from the noised sum. Below 1 "
        "the noise of a single round is the louder one; over many rounds it partly cancels.",
    ),
    "clip": ("Clip", "The longest update that a client may send; what is longer is shortened to it before the noise."),
}


def chapter(histories: Sequence[RunHistory]) -> tuple[list[Figure], Html, list[Html]]:
    """Pictures, the table beside them, and the words of each private run, folded where there are several runs; nothing
    where no run is private."""
    private = [(place, history) for place, history in enumerate(histories) if history.of(PrivacyPromised)]
    if not private:
        return [], Html(""), []
    words = [(history.label, in_words(history)) for _, history in private]
    told = [text if len(histories) == 1 else folded(f"What {label} promises, in words", text) for label, text in words]
    return _pictures(private, len(histories)), _facts([history for _, history in private]), told


def numbers(history: RunHistory) -> Html:
    """Every round in numbers."""
    rows = [
        [
            str(event.round + 1),
            figure(event.epsilon),
            figure(event.noise_multiplier),
            figure(event.clip),
            figure(event.signal_to_noise),
        ]
        for event in history.of(PrivacySpent)
    ]
    head = ["round", "epsilon so far", "noise", "clip", "signal to noise"]
    caption = f"What {history.label} spent, round by round"
    return folded(f"{caption}, in numbers", table(caption, head, rows)) if rows else Html("")


def _pictures(private: Sequence[tuple[int, RunHistory]], count: int) -> list[Figure]:
    """Epsilon by round, below its budget; signal to noise; the clip where it moves."""
    note = "What all rounds so far may have told about any one {}, at most. Smaller is better; it never falls."
    units = dict.fromkeys(promise.unit for _, history in private if (promise := history.last(PrivacyPromised)))
    levels = []
    if count == 1 and (promise := private[0][1].last(PrivacyPromised)) and finite(promise.target_epsilon):
        levels = [level("budget", promise.target_epsilon, shade=SHADE["base"])]
    drawn = []
    if curves := _curves(private, "epsilon", count):
        title = "Epsilon, by round"
        drawn.append(
            over_rounds(title, note.format(" or ".join(units)), curves, levels=levels, from_zero=True, legend=count > 1)
        )
    for name, (title, words) in _CURVES.items():
        shown = private if name != "clip" else [one for one in private if _adapts(one[1])]
        if curves := _curves(shown, name, count):
            drawn.append(over_rounds(title, words, curves, from_zero=True, legend=count > 1))
    return drawn


def _adapts(history: RunHistory) -> bool:
    promise = history.last(PrivacyPromised)
    return promise is not None and promise.adaptive


def _curves(private: Sequence[tuple[int, RunHistory]], name: str, count: int) -> list[Trace]:
    traces = []
    for place, history in private:
        points = {event.round + 1: vars(event)[name] for event in history.of(PrivacySpent)}
        if any(finite(value) for value in points.values()):
            traces.append(line(history.label, points, shade=SHADE["federated"] if count == 1 else colour(place)))
    return traces


def _facts(histories: Sequence[RunHistory]) -> Html:
    """The promise in short, a column for each run."""
    described = [_described(history) for history in histories]
    rows = [[name, *(items[name] for items in described)] for name in described[0]]
    head = ["", *(["this run"] if len(histories) == 1 else [history.label for history in histories])]
    return table("What is promised", head, rows, figures=False)


def _against(promise: PrivacyPromised) -> str:
    if not promise.noise_multiplier:
        return "nobody"
    return "everybody but the server" if promise.noised_by == "server" else "everybody, the server too"


def _described(history: RunHistory) -> dict[str, str]:
    promise, spent = history.last(PrivacyPromised), history.last(PrivacySpent)
    assert promise is not None
    rounds = len(history.of(PrivacySpent))
    counted = f"{rounds} round" + "s" * (rounds != 1)
    clip = figure(promise.clip)
    return {
        "protected": f"each {promise.unit}" if promise.noise_multiplier else "nobody: there is no noise",
        "against": _against(promise),
        "epsilon spent": f"{figure(spent.epsilon)} in {counted}" if spent and finite(spent.epsilon) else NOTHING,
        "epsilon of the whole run": figure(promise.epsilon),
        "budget": figure(promise.target_epsilon),
        "delta": figure(promise.delta),
        "mechanism": promise.mechanism,
        "clip": f"{clip} at first, then it follows the clients" if promise.adaptive else clip,
        "noise on every value": noise(promise),
        "who takes part": sampling(promise.sampling),
        "counted by": f"{promise.accountant}, {promise.relation}" if promise.accountant else NOTHING,
        "noise drawn from": "the run's public seed" if promise.seeded_noise else "the operating system, in secret",
        "scores in the clear": "yes" if promise.in_the_clear else "no",
    }
