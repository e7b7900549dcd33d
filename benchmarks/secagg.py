"""Secure sums: what a client computes, what it takes of memory, and that sums are exact.

    python benchmarks/secagg.py --json [--quick] [--sections masks,setup,memory,rounding,exact,flower] [--peers PYTHON]

mask_u32_s, mask_u16_s: processor time of one client for one vector of 1e7 parameters: rounding at random to the ring's
    grid, its own mask and those with 32 neighbours; one thread, the best of several.
mask_kernel_gbps: keystream made and added, of one mask; beside it the machine's own AES-128-CTR in the same run
    (aes_ctr_gbps), and mask_u32_share, mask_u16_share: the bytes of all masks at that speed over the measured time.
setup_100_ms: a client's keys and shares with 100 neighbours, all of whose signatures it checks. opening_100_ms: to open
    their shares and derive the keys of the masks.
rss_over_output: peak memory above the float32 input over the masked vector, at 1e8 parameters in 2^32.
bytes_per_parameter: of a masked vector in 2^16 on the wire, at 100 clients. relative_rms_error: of the mean of their
    updates, decoded from that ring, over the root mean square of the mean in float64. The clients' updates are normal
    with a deviation of 1, of which 0.3 is common to all; the bound is 6.
exact_cases: random cases of 2 to 12 clients, each hundredth of up to 64, with dropouts at every stage, in all rings, by
    both ciphers, whose sum was right; beside them those whose sum was wrong, and those below the threshold.
flower_over_ours: Flower's SecAgg+ client work over mask_u32_s; null where `flwr` is not installed for --peers.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedllm.privacy.secure_aggregation import client, recovery, server
from fedllm.privacy.secure_aggregation.client import ClientState
from fedllm.privacy.secure_aggregation.faults import TooFewError
from fedllm.privacy.secure_aggregation.identity import Identity, new_identity
from fedllm.privacy.secure_aggregation.manifest import Manifest
from fedllm.privacy.secure_aggregation.masks import BLOCK, ZEROS, Mask, apply_masks
from fedllm.privacy.secure_aggregation.policy import Content, Policy
from fedllm.privacy.secure_aggregation.primitives import AES, CHACHA, KEY, MASK_KEY, keystream
from fedllm.privacy.secure_aggregation.rings import RINGS, Vector, dtype_of, largest_bound, to_wire

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers" / "bin" / "python"
NEIGHBOURS, REPEATS = 32, 5
PIECE = 1 << 14  # entries that are rounded at a time
Figures = dict[str, Any]


class Clients:
    """A cohort in one process."""

    def __init__(self, count: int, length: int, bits: int = 32, cipher: str = AES) -> None:
        self.identities = [new_identity(f"client {place}") for place in range(count)]
        keys = tuple((own.name, own.public) for own in self.identities)
        sizes = (length, count - 1, (count - 1) // 2 + 1, 2, bits, largest_bound(bits, count))
        self.manifest = Manifest("benchmark", 0, keys, bytes(KEY), bytes(KEY), *sizes, cipher=cipher)
        self.content = Content(bytes(KEY), bytes(KEY), length)
        self.peers = dict(keys)

    def advertise(self, own: Identity) -> tuple[bytes, ClientState]:
        """With a policy that knows nothing of earlier rounds."""
        policy = Policy(self.peers, min_cohort=2, min_survivors=2, corrupt=0.0)
        return client.advertise(self.manifest.to_bytes(), own, policy, self.content)


def best(act: Callable[[], object], repeats: int) -> float:
    """Least processor time of several calls."""
    seconds = []
    for _ in range(repeats):
        started = time.process_time()
        act()
        seconds.append(time.process_time() - started)
    return min(seconds)


def quantise(values: np.ndarray, scale: float, bits: int) -> Vector:
    """Round at random, without bias, by bits of AES: floor(scale x + u), u uniform on a grid of 2^-16."""
    found = np.empty(len(values), dtype_of(bits))
    numbers = found.view("<i2" if bits == 16 else "<i4")  # the same memory
    stream = keystream(AES, secrets.token_bytes(16))
    drawn, work, offsets = np.empty(2 * PIECE + 16, np.uint8), np.empty(PIECE, np.float32), np.empty(PIECE, np.float32)
    for start in range(0, len(values), PIECE):
        block = values[start : start + PIECE]
        size = len(block)
        stream.update_into(memoryview(ZEROS)[: 2 * size], drawn.data)
        np.multiply(drawn[: 2 * size].view("<u2"), np.float32(2**-16), out=offsets[:size])
        np.multiply(block, np.float32(scale), out=work[:size])
        work[:size] += offsets[:size]
        np.floor(work[:size], out=work[:size])
        numbers[start : start + size] = work[:size]
    return found


def masks(options: argparse.Namespace) -> Figures:
    """The speed of masks, and of AES alone."""
    count = 100_000 if options.quick else 10_000_000
    values = np.random.default_rng(0).standard_normal(count, np.float32)
    figures: Figures = {"parameters": count, "neighbours": NEIGHBOURS}
    figures["aes_ctr_gbps"] = aes_speed(options.repeats)
    for bits in (32, 16):
        keys = [Mask(secrets.token_bytes(16), bool(place % 2)) for place in range(NEIGHBOURS + 1)]
        scale = largest_bound(bits, 100) / 6

        def act(bits: int = bits, scale: float = scale, keys: Sequence[Mask] = keys) -> None:
            apply_masks(quantise(values, scale, bits), keys, AES)

        figures[f"mask_u{bits}_s"] = seconds = best(act, options.repeats)
        figures[f"mask_u{bits}_share"] = len(keys) * count * bits / 8 / seconds / 1e9 / figures["aes_ctr_gbps"]
    vector = np.zeros(count, "<u4")
    for name, cipher in (("mask_kernel_gbps", AES), ("mask_kernel_chacha20_gbps", CHACHA)):
        mask = [Mask(secrets.token_bytes(MASK_KEY[cipher]))]
        seconds = best(lambda mask=mask, cipher=cipher: apply_masks(vector, mask, cipher), options.repeats)
        figures[name] = vector.nbytes / seconds / 1e9
    return figures


def aes_speed(repeats: int) -> float:
    """GB/s of AES-128-CTR into one buffer that stays in the cache."""
    stream, buffer = keystream(AES, bytes(16)), np.empty(BLOCK + 16, np.uint8)
    blocks = 1000

    def act() -> None:
        for _ in range(blocks):
            stream.update_into(ZEROS, buffer.data)

    return blocks * BLOCK / best(act, repeats) / 1e9


def setup(options: argparse.Namespace) -> Figures:
    """One client's work in a complete graph of 101, with a vector of one entry."""
    clients = Clients(11 if options.quick else 101, 1)
    state = server.begin(clients.manifest)
    sent = [clients.advertise(own) for own in clients.identities]
    for message, _ in sent:
        server.add_advertisement(state, message)
    bundle = server.bundle(state)
    for _, own in sent[1:]:
        server.add_shares(state, client.share(own, bundle))
    started = time.process_time()
    clients.advertise(clients.identities[0])
    message = client.share(sent[0][1], bundle)
    spent = time.process_time() - started
    server.add_shares(state, message)
    inbox = server.inboxes(state)["client 0"]
    started = time.process_time()
    client.mask(sent[0][1], inbox, np.zeros(1, "<u4"))
    return {"setup_100_ms": 1000 * spent, "opening_100_ms": 1000 * (time.process_time() - started)}


def memory(options: argparse.Namespace) -> Figures:
    """In a process of its own, whose peak is its own."""
    count = 1_000_000 if options.quick else 100_000_000
    done = subprocess.run(
        [sys.executable, __file__, "--peak", str(count)], check=True, capture_output=True, text=True, timeout=600
    )
    above = json.loads(done.stdout.splitlines()[-1])
    return {"rss_over_output": above / (4 * count), "rss_above_input_mib": above / 2**20, "rss_parameters": count}


def peak(count: int) -> int:
    """Bytes by which a client's memory rises above its input."""
    clients = Clients(3, count)
    state = server.begin(clients.manifest)
    sent = [clients.advertise(own) for own in clients.identities]
    for message, _ in sent:
        server.add_advertisement(state, message)
    bundle = server.bundle(state)
    for _, own in sent:
        server.add_shares(state, client.share(own, bundle))
    inbox = server.inboxes(state)["client 0"]
    state.total = np.empty(0, "<u4")  # the server's, which is not what is measured
    values = np.full(count, 0.5, np.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = client.mask_in_pieces(sent[0][1], inbox, quantise(values, 1000.0, 32))
    assert sum(map(len, pieces)) > 4 * count
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * (1 if sys.platform == "darwin" else 1024)


def exact(options: argparse.Namespace) -> Figures:
    """Random cases in which up to a third of the clients fall silent at some stage."""
    cases = 20 if options.quick else options.cases
    draw = random.Random(options.seed)
    found = {True: 0, False: 0, None: 0}
    while found[True] < cases:
        large = sum(found.values()) % 100 == 99
        found[one_case(draw, draw.randint(13, 64) if large else draw.randint(2, 12))] += 1
    return {"exact_cases": found[True], "wrong_cases": found[False], "below_threshold_cases": found[None]}


def one_case(draw: random.Random, count: int) -> bool | None:
    """Whether the sum is that of the survivors; None: too few were left, as the threshold has it."""
    bits, length = draw.choice(RINGS), draw.randrange(1, 40)
    clients = Clients(count, length, bits, draw.choice((AES, CHACHA)))
    bound = clients.manifest.bound
    vectors = [[draw.randint(-bound, bound) for _ in range(length)] for _ in range(count)]
    silent = {place: draw.randrange(5) for place in range(count) if draw.random() < draw.choice((0.0, 0.1, 0.33))}
    state = server.begin(clients.manifest)
    states: dict[int, ClientState] = {}
    to_clients: dict[int, bytes] = dict.fromkeys(range(count), b"")
    takes = (server.add_advertisement, server.add_shares, server.add_masked, server.add_consent, server.add_unmasking)
    try:
        for stage, take in enumerate(takes):
            for place in [place for place in to_clients if silent.get(place, 5) > stage]:
                if stage == 0:
                    message, states[place] = clients.advertise(clients.identities[place])
                else:
                    message = reply(stage, states[place], to_clients[place], vectors[place], bits)
                take(state, message)
            to_clients = conclude(state, stage)
        total = recovery.finish(state)
    except TooFewError:
        return None
    members = [place for place in range(count) if clients.manifest.name(place) in total.survivors]
    expected = [sum(vectors[place][i] for place in members) for i in range(length)]
    return total.values.tolist() == expected and all(silent.get(place, 5) > 2 for place in members)


def reply(stage: int, state: ClientState, message: bytes, vector: Sequence[int], bits: int) -> bytes:
    """A client's message of stage 2 to 5."""
    if stage == 2:
        ring = dtype_of(bits)
        return client.mask(state, message, np.array([x % 2 ** (8 * ring.itemsize) for x in vector]).astype(ring))
    return {1: client.share, 3: client.agree, 4: client.unmask}[stage](state, message)


def conclude(state: server.ServerState, stage: int) -> dict[int, bytes]:
    """What each client is sent after a stage."""
    if stage in (0, 2):
        message = server.bundle(state) if stage == 0 else server.survivors(state)
        return dict.fromkeys(sorted(state.keys) if stage == 0 else state.survivors, message)
    if stage == 4:
        return {}
    found = server.inboxes(state) if stage == 1 else server.consents(state)
    return {state.manifest.place(name): message for name, message in found.items()}


def flower(options: argparse.Namespace) -> Figures:
    """Flower's client on as long a vector with as many neighbours."""
    count = 100_000 if options.quick else 10_000_000
    words = [str(options.peers), str(HERE / "peers" / "secagg_flower.py"), str(count), str(NEIGHBOURS), "2"]
    try:
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"flower was not measured: {error}; scripts/peers installs it", file=sys.stderr)
        return {"flower_s": None}
    return {"flower_s": json.loads(done.stdout.splitlines()[-1])["seconds"]}


def rounding(options: argparse.Namespace) -> Figures:
    """What 16 bits cost of 100 clients: bytes, and the error of the mean."""
    clients, count = 100, 10_000 if options.quick else 200_000
    generator, bound = np.random.default_rng(0), largest_bound(16, 100)
    common = generator.standard_normal(count)
    total, exact = np.zeros(count, np.int64), np.zeros(count)
    for _ in range(clients):
        own = 0.3 * common + np.sqrt(1 - 0.3**2) * generator.standard_normal(count)
        exact += own / clients
        levels = quantise(np.clip(own, -6, 6).astype(np.float32), bound / 6, 16)
        total += levels.view("<i2").astype(np.int64)
    error = total * (6 / bound) / clients - exact
    vector = to_wire(np.zeros(count, dtype_of(16)), 16)
    return {
        "bytes_per_parameter": len(vector) / count,
        "relative_rms_error": float(np.sqrt(np.mean(error**2) / np.mean(exact**2))),
    }


SECTIONS: dict[str, Callable[[argparse.Namespace], Figures]] = {
    "masks": masks,
    "setup": setup,
    "memory": memory,
    "rounding": rounding,
    "exact": exact,
    "flower": flower,
}


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas; default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--json", action="store_true", help="print nothing but one line of JSON")
    parser.add_argument("--cases", type=int, default=10_000, help="random cases; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="the best counts; default: %(default)s")
    parser.add_argument("--peers", type=Path, default=PEERS, help="a Python that has flwr; default: %(default)s")
    parser.add_argument("--peak", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak:
        print(peak(options.peak))
        return 0
    figures: Figures = {}
    for name in options.sections.split(","):
        if name not in SECTIONS:
            parser.error(f"there is no section {name!r}; there are {', '.join(SECTIONS)}")
        found = SECTIONS[name](options)
        figures |= found
        if not options.json:
            print(*(f"{key:<28} {value}" for key, value in found.items()), sep="\n")
    slow, ours = figures.get("flower_s"), figures.get("mask_u32_s")
    figures["flower_over_ours"] = slow / ours if slow and ours else None
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
