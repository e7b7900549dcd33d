"""What a client of Flower's SecAgg+ computes for one masked vector: quantisation, its own mask and the pairwise ones.

    .venv-peers/bin/python benchmarks/peers/secagg_flower.py PARAMETERS NEIGHBOURS REPEATS

The calls are those of `_collect_masked_vectors` in flwr/client/mod/secure_aggregation/secaggplus_mod.py, with the
defaults of its workflow: clipping range 8, target range 2^22, modulus 2^32. The last line is one JSON object.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    factor_combine,
    parameters_addition,
    parameters_mod,
    parameters_multiply,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import (
    bytes_to_private_key,
    bytes_to_public_key,
    generate_key_pairs,
    private_key_to_bytes,
    public_key_to_bytes,
)

CLIP, TARGET, MODULUS = 8.0, 1 << 22, 1 << 32


def masked(vector: np.ndarray, own: bytes, seed: bytes, peers: list[bytes]) -> list[np.ndarray]:
    """The masked vector of a client with weight 1 of 1."""
    quantised = quantize(parameters_multiply([vector], 1.0), CLIP, TARGET)
    quantised = factor_combine(TARGET, quantised)
    shapes = [array.shape for array in quantised]
    quantised = parameters_addition(quantised, pseudo_rand_gen(seed, MODULUS, shapes))
    for place, peer in enumerate(peers):
        key = generate_shared_key(bytes_to_private_key(own), bytes_to_public_key(peer))
        change = parameters_addition if place % 2 else parameters_subtraction
        quantised = change(quantised, pseudo_rand_gen(key, MODULUS, shapes))
    return parameters_mod(quantised, MODULUS)


def main() -> None:
    """Time it and print the least."""
    parameters, neighbours, repeats = map(int, sys.argv[1:])
    vector = np.random.default_rng(0).standard_normal(parameters, np.float32)
    own = private_key_to_bytes(generate_key_pairs()[0])
    peers = [public_key_to_bytes(generate_key_pairs()[1]) for _ in range(neighbours)]
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        masked(vector, own, bytes(32), peers)
        seconds.append(time.process_time() - started)
    print(json.dumps({"seconds": min(seconds)}))


if __name__ == "__main__":
    main()
