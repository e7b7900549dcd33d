"""Traits: what a component declares about updates, so that `check` can decide before a model loads.

    needs   must hold where it stands           loses   no longer holds because of it
    gives   holds behind it                     keeps   what its `encode` leaves as it found it

Stages, works, aggregators and schedules declare them; `experiment/checks` adds what the task, the demands and the
clients' profiles say, and has one rule for each fact. The comments of `Bracket` and `Fact` are the table in the docs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, IntEnum, auto


class Bracket(IntEnum):
    """Where a stage may stand. A list of stages is sorted by bracket; order inside one is part of the method."""

    LOCAL = -1  # keeps tensors on the client, so that no other stage sees them
    MEANING = 0  # works on what the update means
    WEIGH = 1  # gives each client its weight; exactly one stage does
    PRIVATE = 2  # bounds and adds noise
    ADVERSARY = 3  # an attack under test
    WIRE = 4  # changes how the values travel


class Fact(Flag):
    """What may hold of the updates of a round."""

    FACTORS = auto()  # the adapter has lora_A and lora_B in each layer
    SHAPE = auto()  # the part 'delta' has the names and shapes of the parameters
    ENTRIES = auto()  # what the delta held is still in it, and in no other part
    DIFFERENCE = auto()  # the delta is how far a client has moved, not what it came to
    LOCAL_UNITS = auto()  # the delta is as the local steps made it
    SUM_OF_DELTAS = auto()  # what the server adds up are the deltas as they are at this place
    ALL_TENSORS = auto()  # every tensor that trains is sent
    BOTH_TRAIN = auto()  # neither factor stands still in a round
    FIXED_BASIS = auto()  # an entry of lora_A or lora_B stands for the same in all rounds
    FIXED_SIZES = auto()  # a client's tensors keep their size from round to round
    SAME_TENSORS = auto()  # the same tensors are sent in every round
    PLAIN_MEAN = auto()  # before this place, the step is the mean of the updates
    ONLY_STEP = auto()  # no other stage takes a step of its own on the server
    EQUAL_WEIGHTS = auto()  # every client weighs the same
    EQUAL_COMPONENTS = auto()  # every client counts the same in each component of an adapter
    FIXED_DENOMINATOR = auto()  # the mean divides by a number that does not depend on who answered
    ANSWERED = auto()  # the mean divides by the weights of those who answered
    ANY_RANK = auto()  # a client may have another rank than the adapter
    ONE_SHAPE = auto()  # updates of clients of unequal ranks are brought to one shape
    BOUNDED = auto()  # the norm of what a client sends is bounded
    INTEGERS = auto()  # the values are integers
    FITTED = auto()  # the update fits the bandwidth of its client
    HIDDEN = auto()  # the server sees sums alone, and no sum shows the update of one client
    WRITABLE_BASE = auto()  # something may be added to the frozen weights
    GRADIENTS = auto()  # the local steps use gradients
    SAME_START = auto()  # all updates of a sum began from the same parameters
    SERVER_STATE = auto()  # a server keeps a state from round to round


NONE = Fact(0)
# What an `encode` loses unless it says that it keeps it.
FRAGILE = Fact.LOCAL_UNITS | Fact.SUM_OF_DELTAS | Fact.BOUNDED | Fact.INTEGERS | Fact.FITTED

# Names for several facts that a stage of a kind needs, keeps or loses.
PER_ENTRY = Fact.FIXED_BASIS | Fact.ENTRIES | Fact.DIFFERENCE  # needs: it keeps something for each entry
BOTH_FACTORS = Fact.FACTORS | Fact.SHAPE | Fact.ALL_TENSORS | Fact.BOTH_TRAIN  # needs: it works on lora_A and lora_B
MOVED_BASE = Fact.PLAIN_MEAN | Fact.WRITABLE_BASE  # needs: its decode makes a part "base_delta"
CONTROL = PER_ENTRY | Fact.LOCAL_UNITS | Fact.GRADIENTS | Fact.SERVER_STATE  # needs: it corrects the local steps
SAME_DELTA = Fact.LOCAL_UNITS | Fact.SUM_OF_DELTAS  # keeps: its encode leaves the values of the delta as they are
OWN_STEP = Fact.PLAIN_MEAN | Fact.ONLY_STEP  # loses: its decode takes another step than the mean


@dataclass(frozen=True)
class Traits:
    """What a component declares. The defaults need nothing and promise nothing.

    Args:
        bracket: of a stage, where it may stand.
        takes: parts that `encode` reads.
        may_take: parts that it reads where somebody makes them.
        makes: parts that `encode` adds and the stage's own `decode` removes; of a work, the parts of its updates.
        needs: facts that must hold where it stands.
        gives: facts that hold behind it.
        keeps: facts that its `encode` leaves as it found them.
        loses: facts that no longer hold because of it.
        adapter: the one adapter that it works on; None: any.
        optimizers: local optimisers that the method's derivation covers; None: any.
    """

    bracket: Bracket = Bracket.MEANING
    takes: frozenset[str] = frozenset()
    may_take: frozenset[str] = frozenset()
    makes: frozenset[str] = frozenset()
    needs: Fact = NONE
    gives: Fact = NONE
    keeps: Fact = NONE
    loses: Fact = NONE
    adapter: str | None = None
    optimizers: frozenset[str] | None = None


DELTA = frozenset({"delta"})
