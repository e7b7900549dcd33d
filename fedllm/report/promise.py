"""A promise of differential privacy in sentences, for readers who know no mathematics.

Each number comes with what it means in odds: of (epsilon, delta), odds after all that was given out are at most
e^epsilon times the odds before, but for a chance of about delta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedllm.events import PrivacyPromised, PrivacySpent, RunFinished
from fedllm.report.formatting import figure, finite
from fedllm.report.markup import Html, el, joined
from fedllm.report.run_history import RunHistory

_COMPARED = {
    "add-remove": "the same run without the {unit}",
    "replace-one": "the same run with other data in the place of the {unit}'s",
}
_SCALE = (1.0, 2.0, 4.0, 8.0)  # epsilons that the text compares with


def noise(promise: PrivacyPromised) -> str:
    """Its standard deviation."""
    times = figure(promise.noise_multiplier)
    if promise.mechanism == "dp_ftrl":
        return f"{times} times what one client can change in the whole run"
    return f"{times} times the clip"


def sampling(scheme: Mapping[str, Any]) -> str:
    match scheme:
        case {"scheme": "poisson", "rate": rate}:
            return f"each client by a coin of {100 * rate:.3g} %"
        case {"scheme": "fixed_size", "cohort": cohort, "population": population}:
            return f"{cohort} of {population} clients, by lot"
        case {"scheme": "rotation", "min_separation": apart}:
            return f"in turn, {apart} rounds apart"
    return "no chance is counted on"


def in_words(story: RunHistory) -> Html:
    """The promise in sentences."""
    promise, spent = story.last(PrivacyPromised), story.last(PrivacySpent)
    assert promise is not None
    epsilon = spent.epsilon if spent else promise.epsilon
    said = [("What is protected", _protected(promise)), ("From whom", _against(promise))]
    said.append(("How", _how(promise)))
    if not promise.noise_multiplier:
        said = [("Nothing is promised", "No noise was added, so the model may tell anything about anybody.")]
    elif promise.seeded_noise:
        text = "The noise came from the run's public seed. Whoever has the settings of this run can subtract it."
        said = [("This was a test, and nothing is promised", text), *said]
    if finite(epsilon) and promise.noise_multiplier:
        said.append(("How much", _how_much(promise, epsilon, done=story.last(RunFinished) is not None)))
    said += _outside(promise)
    paragraphs = [el("p", el("b", f"{title}. "), text) for title, text in said]
    if not promise.noise_multiplier:
        return joined(paragraphs)
    rests = el("p", el("b", "What it rests on. "), "The promise holds only if all of this is true:")
    return joined([*paragraphs, rests, el("ul.notes", *(el("li", _sentence(text)) for text in promise.assumptions))])


def _protected(promise: PrivacyPromised) -> str:
    if promise.unit == "client":
        return (
            "All that any one client holds, however many records that is, and whether it took part at all. If a client "
            "is an institution, each person whose records it holds is protected with it, unless other clients hold "
            "records of the same person, too."
        )
    return (
        "Each single record of each client. That a client took part is no secret. A person with several records at one "
        "client is protected less: two records count as twice the epsilon, three as three times."
    )


def _against(promise: PrivacyPromised) -> str:
    seen = "whatever else they know, whatever they compute, now or later"
    if promise.noised_by == "client":
        return (
            f"From everybody who sees what the clients send or what is made of it: the server, the other clients, all "
            f"users of the model, {seen}. Each client added its noise before anything left it."
        )
    return (
        f"From everybody who sees the models that the server gave out, in any round or at the end: other clients and "
        f"all users of the model, {seen}. Not from the server itself, which receives the updates before it adds the "
        "noise: the clients must trust it."
    )


def _how(promise: PrivacyPromised) -> str:
    what = "record" if promise.unit == "example" else "client"
    text = (
        f"What one {what} can change in a {'step' if promise.unit == 'example' else 'round'} is cut to a fixed length, "
        f"the clip. Then random noise is added to every value. The typical size of the noise is {noise(promise)}, so "
        f"that no single {what} can be told from the noise with more certainty than is said below."
    )
    if promise.mechanism == "dp_ftrl":
        text += " The noise of one round is partly taken back in later ones, so that less of it stays in the model; "
        text += "for that, all rounds are paid for with the first one."
    chance = promise.sampling.get("scheme") in ("poisson", "fixed_size") and promise.noised_by == "server"
    if chance and promise.simulated:
        text += (
            " The figure counts on nobody knowing which clients took part in which round. This run was a simulation "
            "and drew them from the seed in its settings; in real use the draw must be secret."
        )
    return text


def _how_much(promise: PrivacyPromised, epsilon: float, *, done: bool) -> str:
    """What epsilon and delta mean in odds."""
    compared = _COMPARED.get(promise.relation, "the same run without the {unit}").format(unit=promise.unit)
    unit = f"one given {promise.unit}"
    scale = ", ".join(f"{_percent(surest(0.5, one))} at epsilon {one:g}" for one in _SCALE)
    return (
        f"{'The run' if done else 'So far the run'} spent an epsilon of {figure(epsilon)} at a delta of "
        f"{figure(promise.delta)}. These two numbers say how much can be learned at most. Think of somebody who knows "
        f"everything else and asks about {unit}: was it this run, or {compared}? If both seemed equally likely before "
        f"(50 %), then whatever was given out can make them at most {_percent(surest(0.5, epsilon))} sure; from 1 % "
        f"they get to at most {_percent(surest(0.01, epsilon))}. In other words, odds grow by a factor of at most "
        f"{_large(epsilon)}. Smaller is better: 50 % becomes at most {scale}. Delta is the room for a failure of this "
        f"bound: about 1 chance in {figure(round(1 / promise.delta))}. It is a bound for the worst case, which no "
        "attack can pass; attacks that are known usually stay far below it."
    )


def surest(prior: float, epsilon: float) -> float:
    """How sure one can be at most who began at `prior`: the odds p / (1 - p) times e^epsilon, as a probability."""
    return prior / (prior + (1 - prior) * math.exp(-epsilon))


def _large(epsilon: float) -> str:
    """e^epsilon in words that can be read."""
    factor = math.exp(min(epsilon, 300.0))
    return f"{factor:,.3g}" if factor < 100 else f"{factor:,.0f}" if factor < 1e9 else "more than a thousand million"


def _percent(share: float) -> str:
    """Never rounded up to 100 %."""
    if share > 0.9999995:
        return "more than 99.9999 %"
    digits = max(0, math.ceil(-math.log10(1 - share)) - 1) if share > 0.9 else 0
    return f"{100 * share:.{digits}f} %"


def _outside(promise: PrivacyPromised) -> list[tuple[str, str]]:
    if promise.in_the_clear:
        text = (
            "Training losses, numbers of records and tokens, and scores on held-out records left the clients without "
            "noise, because the settings ask for it (evaluation.private: false). They stand in this report, and the "
            "promise does not cover them: do not hand out this report, or the run's log, where only the model may go."
        )
        return [("What the promise leaves out", text)]
    return [("What the promise leaves out", "No loss, count or score left a client, so this report has none.")]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."
