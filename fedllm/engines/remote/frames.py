"""Frames on a stream socket: what two processes say to each other, whole or not at all.

    frame = bytes of the head (4) | bytes of the body (8) | head, a JSON object | body

A length is looked at before any memory is taken for what it announces.
"""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Mapping
from typing import Any

from fedllm.errors import WireError

Head = Mapping[str, Any]
Frame = tuple[Head, bytes]

LENGTHS = struct.Struct(">IQ")
MOST_HEAD = 64 << 10
CHUNK = 4 << 20  # of a message that is sent in pieces
PIECES = 1 << 20  # bytes that a read asks for: memory grows with what has arrived, not with what was announced


def send(link: socket.socket, head: Head, body: bytes | memoryview = b"") -> None:
    """Write one frame."""
    told = json.dumps(head).encode()
    if len(told) > MOST_HEAD:
        raise WireError(f"the head of a frame has {len(told)} bytes, and at most {MOST_HEAD} are allowed")
    link.sendall(LENGTHS.pack(len(told), len(body)) + told)
    if body:
        link.sendall(body)


def receive(link: socket.socket, most: int = CHUNK) -> Frame:
    """Read one frame whose body has at most `most` bytes.

    Raises:
        WireError: it is no frame, or too large.
        OSError: the other side is gone, or silent for longer than the socket's timeout.
    """
    head_size, body_size = LENGTHS.unpack(_exactly(link, LENGTHS.size))
    if head_size > MOST_HEAD or body_size > most:
        raise WireError(f"a frame of {head_size} and {body_size} bytes; at most {MOST_HEAD} and {most} are allowed")
    told = _exactly(link, head_size)
    try:
        head = json.loads(told)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the head of a frame is no JSON: {type(error).__name__}") from error
    if not isinstance(head, dict):
        raise WireError("the head of a frame is no JSON object")
    return head, _exactly(link, body_size)


def _exactly(link: socket.socket, size: int) -> bytes:
    """So many bytes."""
    found = bytearray()
    while len(found) < size:
        piece = link.recv(min(PIECES, size - len(found)))
        if not piece:
            raise ConnectionResetError("the other side has closed the connection")
        found += piece
    return bytes(found)
