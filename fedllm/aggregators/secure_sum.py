"""A secure sum: the server learns the sum of the clients' integers, and nothing of one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedllm.aggregators.masked_sum import MaskedSum
from fedllm.messages.call import Call
from fedllm.messages.update import Request, Update


@dataclass(frozen=True)
class SecureSum(MaskedSum):
    """The sum over the whole cohort (SecAgg+, Bell et al. 2020, arXiv 2003.13445)."""

    def reduce(self, call: Call, requests: Mapping[str, Request], name: str = "work") -> Update:
        """Six calls.

        Raises:
            RoundVoid: the threshold is missed, or somebody keeps to another protocol.
        """
        ready = {client: reply for client, reply in call(name, requests) if isinstance(reply, Update)}
        return self._summed(call, requests, ready)[0] if ready else Update({})
