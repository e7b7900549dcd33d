"""Homomorphic sums: bytes and seconds against the share p of an update that is encrypted.

    python benchmarks/homomorphic.py --json [--parameters N] [--clients K]

For each p: bytes of one client's update (ciphertexts, and the rest in the clear as float32), processor seconds of one
client to encrypt, of the server to add one client's update, and of the client that reads the total. One thread. And
`error`: the largest difference between the decrypted total and the sum of what was encrypted, in slots, which are
multiples of 2^-20: below 2^-21 rounding takes it away.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fedllm.aggregators import ckks
from fedllm.aggregators.homomorphic_layout import FINE_BITS

SHARES = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)


def timed(act: Callable[[], Any]) -> tuple[Any, float]:
    """What a call returns, and its processor seconds."""
    started = time.process_time()
    return act(), time.process_time() - started


def measured(share: float, parameters: int, clients: int) -> dict[str, float]:
    """One row."""
    count = max(1, round(share * parameters))
    key, generator = ckks.secret(ckks.new_secret()), np.random.default_rng(0)
    values = np.rint(generator.uniform(-1000, 1000, (clients, count)) * 2.0**FINE_BITS) * 2.0**-FINE_BITS
    totals, encrypting, adding = None, 0.0, 0.0
    for row in values:
        sent, seconds = timed(lambda row=row: ckks.encrypt(key, row))
        encrypting += seconds / clients
        totals, seconds = timed(lambda totals=totals, sent=sent: ckks.added(totals, sent))
        adding += seconds / clients
    assert totals is not None
    data = [bytes(one.serialize()) for one in totals]
    found, reading = timed(lambda: ckks.decrypt(key, data, count))
    size = sum(map(len, sent)) + 4 * (parameters - count)
    return {
        "share": share,
        "bytes": size,
        "bytes_over_float32": size / (4 * parameters),
        "encrypt_s": encrypting,
        "add_s": adding,
        "decrypt_s": reading,
        "error": float(abs(found - values.sum(0)).max()),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; JSON in the last line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=460_800, help="of an update: LoRA rank 4 on q and v of 135M")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", action="store_true", help="the last line alone")
    options = parser.parse_args(arguments)
    rows = [measured(share, options.parameters, options.clients) for share in SHARES]
    if not options.json:
        for row in rows:
            print("  ".join(f"{name} {value:.4g}" for name, value in row.items()))
    print(json.dumps({"benchmark": "homomorphic", "parameters": options.parameters, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
