"""Why a party refuses to go on with a secure sum.

SecureSumError
|-- MessageError     bytes that are malformed, truncated, oversized, repeated or meant for another round
|-- SignatureError   a signature that does not verify
|-- ManifestError    a round whose conditions break the client's own policy
|-- IdentityError    a key that is not pinned, is used twice, or lies in a file that others can read
|-- StageError       a request out of turn, such as the same question twice
|-- RoundSpentError  a round in which this client has masked already
|-- VectorError      a vector of the wrong length, type or range
|-- SurvivorsError   a list of survivors that the client does not accept
`-- TooFewError      fewer parties than the threshold; the round is lost, and no update is shown
"""

from __future__ import annotations

from fedllm.errors import SecureSumError

__all__ = [
    *("IdentityError", "ManifestError", "MessageError", "RoundSpentError", "SecureSumError"),
    *("SignatureError", "StageError", "SurvivorsError", "TooFewError", "VectorError"),
]


class MessageError(SecureSumError):
    """Bytes that are malformed, truncated, oversized, repeated or meant for another round."""


class SignatureError(SecureSumError):
    """A signature that does not verify."""


class ManifestError(SecureSumError):
    """A round whose conditions break the client's own policy."""


class IdentityError(SecureSumError):
    """A key that is not pinned, is used twice, or lies in a file that others can read."""


class StageError(SecureSumError):
    """A request out of turn."""


class RoundSpentError(SecureSumError):
    """A round in which this client has masked already."""


class VectorError(SecureSumError):
    """A vector of the wrong length, type or range."""


class SurvivorsError(SecureSumError):
    """A list of survivors that a client does not accept."""


class TooFewError(SecureSumError):
    """Fewer parties than the threshold."""
