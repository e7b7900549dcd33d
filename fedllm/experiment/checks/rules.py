"""The table of rules: one row for each fact, and the loop that holds every experiment against it.

A party that needs a fact is in conflict with one that loses it, if the row's `where` holds of the two; a fact whose row
has `gives` must be given by a stage, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_

from fedllm.experiment.checks.parties import Party
from fedllm.messages.traits import NONE, Bracket, Fact

Text = str | Callable[[Party, Party], str]  # of the needer and the loser; "{needer}" and "{loser}" are their names
Where = Callable[[int, int, Party, Party], bool]  # places of needer and loser, and the two

APART = "leave out one of the two"
NO_SECRECY = (
    "use the aggregator secure_sum or bucketed and put the stage fixed_point last, or use the aggregator "
    "homomorphic_sum, or set demands.secrecy to false"
)


@dataclass(frozen=True)
class Row:
    """One fact.

    Args:
        where: whether a loser hurts a needer, by their places.
        needs, loses: the two halves of the sentence "A needs, but B loses; mend".
        mend: what to do.
        gives: of a fact that must be given: what a stage that gives it does.
        missing: what to do if no stage does.
    """

    where: Where
    needs: str
    loses: Text
    mend: Text = APART
    gives: str = ""
    missing: str = ""


@dataclass(frozen=True, eq=False)
class Conflict:
    """A party, a fact that it needs, and who loses it; None: nobody gives it."""

    fact: Fact
    needer: Party
    loser: Party | None

    def __str__(self) -> str:
        row, needer, loser = ROWS[self.fact], self.needer, self.loser
        given = self.fact in needer.traits.gives
        start = f"{needer.key}: " if needer.key else ""
        start += f"{needer.name} {needer.words.get(self.fact, row.gives if given else row.needs)}, but "
        if loser is None:
            return f"{start}no stage {row.gives}; {row.missing}"
        loses, mend = (text if isinstance(text, str) else text(needer, loser) for text in (row.loses, row.mend))
        loses = loser.words.get(self.fact, loses)
        return start + f"{loser.name} {loses}; " + mend.format(needer=needer.name, loser=loser.name)


def conflicts(parties: Sequence[Party]) -> Iterator[Conflict]:
    """What parties need and others lose, or nobody gives, in the order of the table."""
    needed, lost, given = (
        reduce(or_, (getattr(party.traits, kind) for party in parties), NONE) for kind in ("needs", "loses", "gives")
    )
    missing = needed & MUST_BE_GIVEN & ~given
    for fact in needed & lost | missing:
        for place, needer in enumerate(parties):
            if fact not in needer.traits.needs:
                continue
            for at, loser in enumerate(parties):
                if fact in loser.traits.loses and at != place and ROWS[fact].where(place, at, needer, loser):
                    yield Conflict(fact, needer, loser)
            if fact in missing:
                yield Conflict(fact, needer, None)


def _anywhere(needer: int, loser: int, one: Party, other: Party) -> bool:
    return True


def _before(needer: int, loser: int, one: Party, other: Party) -> bool:
    return loser < needer


def _behind(needer: int, loser: int, one: Party, other: Party) -> bool:
    return loser > needer


def _in_its_space(needer: int, loser: int, one: Party, other: Party) -> bool:
    """Behind a loser that takes the delta into another shape stands what works on that shape."""
    return needer < loser or Fact.SHAPE not in other.traits.loses


def _at_its_size(needer: int, loser: int, one: Party, other: Party) -> bool:
    """Before a stage that shrinks tensors, others encode them at their size of today; behind it, others receive them at
    the size that they had, unless they know of both."""
    return one.encodes if needer < loser else one.receives and Fact.FIXED_SIZES not in one.traits.keeps


def _put_behind(needer: Party, loser: Party) -> str:
    return APART if Fact.SUM_OF_DELTAS in needer.traits.needs else "put {loser} behind {needer}"


def _or_on_products(needer: Party, loser: Party) -> str:
    if Fact.GRADIENTS in needer.traits.needs:  # its local steps are on factors
        return APART
    if Fact.SHAPE in loser.traits.loses and not loser.traits.makes:
        return APART + ", or put {needer} behind {loser}"
    return APART + ", or list lora_product in place of {loser} and before {needer}"


def _or_behind(needer: Party, loser: Party) -> str:
    return APART if Fact.SHAPE in needer.traits.loses else "put {loser} behind {needer}, or " + APART


def _uniform(needer: Party, loser: Party) -> str:
    return "use uniform" if loser.traits.bracket is Bracket.WEIGH else APART


def _of_one_rank(needer: Party, loser: Party) -> str:
    part = min(loser.traits.makes, default="")
    return f"makes the part '{part}' in the shape of the parameters" if part else "holds tensors at the adapter's rank"


def _same_rank(needer: Party, loser: Party) -> str:
    return "give all clients the adapter's rank, or " + ("leave out" if loser.key else "change") + " {loser}"


def _hidden(needer: Party, loser: Party) -> str:
    if loser.key:
        return "leave out {loser}"
    return NO_SECRECY


ROWS: dict[Fact, Row] = {
    Fact.FACTORS: Row(_anywhere, "works on lora_A and lora_B of each layer", "has none", "use lora"),
    Fact.SHAPE: Row(_before, "works on lora_A and lora_B in the part 'delta'", "takes them out before it"),
    Fact.ENTRIES: Row(_before, "keeps something for each entry of lora_A and lora_B",
                      "before it takes them out of the delta", "put {needer} before {loser}, or " + APART),
    Fact.DIFFERENCE: Row(_before, "works on how far clients have moved", "before it sends what they came to",
                         "set {loser} to send an update (form: update), or " + APART),
    Fact.LOCAL_UNITS: Row(_before, "compares the update with the local steps", "changes the update before it",
                          _put_behind),
    Fact.SUM_OF_DELTAS: Row(_behind, "is right only if the server adds up the updates as their clients remember them",
                            "behind it changes them"),
    Fact.ALL_TENSORS: Row(_anywhere, "works on both factors of every layer", "keeps tensors on the client"),
    Fact.BOTH_TRAIN: Row(_anywhere, "works on both factors of lora", "lets one of them stand still"),
    Fact.FIXED_BASIS: Row(_in_its_space,
                          "is right only while an entry of lora_A or lora_B stands for the same in all rounds",
                          "writes their product in another basis after each", _or_on_products),
    Fact.FIXED_SIZES: Row(_at_its_size, "works on tensors of one size", "shrinks those of a client",
                          "put {needer} on the other side of {loser}, or leave it out"),
    Fact.SAME_TENSORS: Row(_anywhere, "correlates the noise of one round with that of others",
                           "sends other tensors in some rounds", APART + ", or use gaussian_dp"),
    Fact.PLAIN_MEAN: Row(_before, "adds to the frozen weights what the mean of the factors lacks",
                         "before it takes a step of its own in place of this mean", _or_behind),
    Fact.ONLY_STEP: Row(_anywhere, "takes the server's step and is derived as the only stage that does",
                        "takes one, too"),
    Fact.EQUAL_WEIGHTS: Row(_anywhere, "is right only if every client weighs the same", "weighs them differently",
                            _uniform),
    Fact.EQUAL_COMPONENTS: Row(_anywhere, "is right only if every client counts the same in each component",
                               "counts in fewer", "make the clients alike, or leave out {needer}"),
    Fact.FIXED_DENOMINATOR: Row(_anywhere, "bounds what one client can change",
                                "divides by a number that depends on who answered", "set its denominator: cohort"),
    Fact.ANSWERED: Row(_anywhere, "divides by the weights of those who answered",
                       "divides by the number of clients that were drawn",
                       "set the denominator of {loser} to answered"),
    Fact.ANY_RANK: Row(_anywhere, "has another rank than the adapter", _of_one_rank, _same_rank),
    Fact.ONE_SHAPE: Row(_anywhere, "has another rank than the adapter", "undoes it",
                        gives="brings their updates to one shape",
                        missing="give all clients the adapter's rank, or add a stage such as lora_pad"),
    Fact.BOUNDED: Row(_behind, "needs a bound", "behind it does not say by how much it may grow it",
                      "put {loser} before {needer}", "bounds the norm of an update", "add a stage that does"),
    Fact.INTEGERS: Row(_behind, "adds integers", "behind it would make fractions of them",
                       "put {loser} before {needer}", "yields integers", "put the stage fixed_point last"),
    Fact.FITTED: Row(_behind, "has a bandwidth", "behind it would change its size",
                     "put {loser} before {needer}, or leave it out", "fits the update to a bandwidth",
                     "use method haflq, add the stage lora_cap, or leave bandwidth out"),
    Fact.HIDDEN: Row(_anywhere, "lets the server learn nothing but sums", "shows it the update of each client",
                     _hidden),
    Fact.WRITABLE_BASE: Row(_anywhere, "adds to the matrices of the base model", "holds them in few bits"),
    Fact.GRADIENTS: Row(_anywhere, "changes the gradients of the local steps", "uses none"),
    Fact.SAME_START: Row(_anywhere, "is right only if all updates of a sum began from the same parameters",
                         "adds up others"),
    Fact.SERVER_STATE: Row(_anywhere, "keeps a state on the server from round to round", "has no server"),
}  # fmt: skip
MUST_BE_GIVEN = reduce(or_, (fact for fact, row in ROWS.items() if row.gives))
