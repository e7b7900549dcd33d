"""The ring of a sum: integers modulo 2^16, 2^20 or 2^32, and how a vector of them travels.

A client's integers lie within -bound..bound. The sum of n clients is read back as the signed number that it is if

    n * bound <= 2^(bits - 1) - 1                                                          (no overflow)

A vector is uint16 for 16 bits and uint32 for 20 and 32; on the wire it takes exactly bits / 8 bytes per entry, and with
20 bits two entries share five bytes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedllm.privacy.secure_aggregation.faults import MessageError, VectorError

Vector = npt.NDArray[Any]  # uint16 or uint32
RINGS = (16, 20, 32)
BLOCK = 1 << 16  # entries that are looked at in one piece
CHECK = 4  # entries behind a vector, each of them 1: their sum is the number of clients, or a mask was left in it


def dtype_of(bits: int) -> np.dtype[Any]:
    """The type of a vector's entries, little-endian as on the wire."""
    return np.dtype("<u2") if bits == 16 else np.dtype("<u4")


def largest_bound(bits: int, clients: int) -> int:
    """The largest bound that cannot overflow."""
    return int((2 ** (bits - 1) - 1) // clients)


def choose_ring(clients: int, weight_cap: int = 1, levels: int = 256) -> int:
    """The smallest ring in which each of `clients`, with the largest weight, has `levels` steps up and as many down.

    Raises:
        VectorError: not even 2^32 has that many.
    """
    for bits in RINGS:
        if largest_bound(bits, clients) // weight_cap >= levels:
            return bits
    raise VectorError(
        f"{clients} clients with weights up to {weight_cap} leave {largest_bound(32, clients) // weight_cap} levels in "
        f"the largest ring, 2^32, and {levels} are asked for; lower the weight cap or the levels"
    )


def signed(vector: Vector, bits: int) -> npt.NDArray[Any]:
    """The numbers that ring elements stand for, from -2^(bits-1) to 2^(bits-1) - 1."""
    if bits == 16:
        return vector.view("<i2")
    shift = np.int32(32 - bits)
    return (vector.view("<i4") << shift) >> shift


def largest(vector: Vector, bits: int) -> int:
    """The largest magnitude of the numbers that a vector stands for."""
    found = 0
    for start in range(0, len(vector), BLOCK):
        block = signed(vector[start : start + BLOCK], bits)
        found = max(found, -int(block.min()), int(block.max()))
    return found


def check_vector(vector: Vector, length: int, bits: int, bound: int) -> None:
    """Pass if a client's vector is what it may send.

    Raises:
        VectorError: wrong type or length, or an entry beyond the bound, which could wrap the sum.
    """
    if vector.dtype != dtype_of(bits) or vector.ndim != 1 or not vector.flags.c_contiguous:
        raise VectorError(
            f"the vector to mask is {vector.dtype} of {vector.ndim} dimensions; a ring of 2^{bits} takes a contiguous "
            f"{dtype_of(bits)} of one"
        )
    if len(vector) != length:
        raise VectorError(f"the vector to mask has {len(vector):,} entries; this round's have {length:,}")
    if (found := largest(vector, bits)) > bound:
        raise VectorError(
            f"the vector to mask has an entry of magnitude {found}; beyond {bound} the sum could overflow; clip it"
        )


def wire_bytes(length: int, bits: int) -> int:
    """Bytes of a vector on the wire."""
    return -(-length // 2) * 5 if bits == 20 else length * bits // 8


def to_wire(vector: Vector, bits: int) -> memoryview:
    """A vector as bytes; a view of it but for 20 bits."""
    if bits != 20:
        return vector.view(np.uint8).data
    packed = np.zeros((-(-len(vector) // 2), 5), np.uint8)
    for start in range(0, len(vector), 2 * BLOCK):
        block = vector[start : start + 2 * BLOCK].astype("<u8") & 0xFFFFF
        pairs = block[0::2].copy()
        pairs[: len(block) // 2] |= block[1::2] << np.uint64(20)
        packed[start // 2 : start // 2 + len(pairs)] = pairs.view(np.uint8).reshape(-1, 8)[:, :5]
    return packed.reshape(-1).data


def from_wire(data: memoryview, length: int, bits: int) -> Vector:
    """A vector from its bytes; a read-only view of them but for 20 bits.

    Raises:
        MessageError: there are more or fewer bytes than such a vector has.
    """
    if len(data) != wire_bytes(length, bits):
        raise MessageError(
            f"a masked vector has {len(data):,} bytes; {length:,} entries of {bits} bits "
            f"take {wire_bytes(length, bits):,}"
        )
    if bits != 20:
        return np.frombuffer(data, dtype_of(bits))
    packed = np.frombuffer(data, np.uint8).reshape(-1, 5)
    vector = np.empty(2 * len(packed), "<u4")
    for start in range(0, len(packed), BLOCK):
        block = np.zeros((len(packed[start : start + BLOCK]), 8), np.uint8)
        block[:, :5] = packed[start : start + BLOCK]
        pairs = block.view("<u8")[:, 0]
        vector[2 * start : 2 * start + 2 * len(pairs) : 2] = pairs & 0xFFFFF
        vector[2 * start + 1 : 2 * start + 2 * len(pairs) : 2] = pairs >> np.uint64(20)
    return vector[:length]
