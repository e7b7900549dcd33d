"""How far the batched engine's updates are from the serial engine's, by local optimiser, in one type.

Each of four clients trains from the same parameters on either engine; its difference is the 2-norm of delta - delta
over that of the serial delta, and the largest over the clients counts. Records and settings are those of round.py.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from prepare import prepare
from torch import Tensor

from fedllm.engines.base import Engine
from fedllm.engines.batched.engine import Batched
from fedllm.engines.serial import Serial
from fedllm.experiment.config_file import load
from fedllm.experiment.record import Experiment
from fedllm.messages.context import RoundContext
from fedllm.messages.update import Update
from fedllm.models.base_models.load import resolve_dtype
from fedllm.models.loaded_model import load as load_model
from fedllm.runs import server_round
from fedllm.tensors import tree

SAME = {
    **{"clients": 4, "batch": 2, "max_length": 256, "fill": False, "seed": 0, "rounds": 0},
    **{"shape": None, "device": "cpu", "template": "plain", "runs": 1},
}
RATES = {"sgd": 0.05, "adamw": 1e-3}


def deltas(engine: Engine, experiment: Experiment) -> dict[str, dict[str, Tensor]]:
    """What each client sends in the first round."""
    clients = experiment.federation.load(experiment.key).clients
    state = server_round.initial_state(experiment, load_model(experiment.task).initial_params(experiment.key))
    everyone = RoundContext(0, experiment.key, len(clients), len(clients), experiment.rounds)
    with engine.open(experiment, None, lambda event: None) as call:
        replies = dict(call("work", server_round.requests_for(experiment, state, clients, everyone)))
    return {name: dict(reply.parts["delta"].tree) for name, reply in replies.items() if isinstance(reply, Update)}


def farthest(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> float:
    """The largest relative difference over the clients."""
    assert found.keys() == expected.keys()
    return max(tree.norm(tree.sub(found[name], mine)) / tree.norm(mine) for name, mine in expected.items())


def main() -> None:
    """Print the figures; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--records", type=Path)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--dtype", default="auto", help="default: what the processor is fast in")
    parser.add_argument("--stack", type=int, default=4, help="clients of a stack, at most")
    options = parser.parse_args()
    options.dtype = str(resolve_dtype(options.dtype)).removeprefix("torch.")
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        prepared, _ = prepare(argparse.Namespace(**vars(options), **SAME), Path(folder))
        for optimizer, lr in RATES.items():
            experiment = load(prepared.experiment, [f"work.sgd.optimizer={optimizer}", f"work.sgd.lr={lr}"])
            serial = deltas(Serial(), experiment)
            figures[optimizer] = farthest(deltas(Batched(stack=options.stack), experiment), serial)
    for name, value in figures.items():
        print(f"{options.dtype} {name:10} {value:.2e}")
    settings = {name: vars(options)[name] for name in ("model", "steps", "dtype", "stack")}
    print(json.dumps({"benchmark": "differences", **settings, **figures}))


if __name__ == "__main__":
    main()
