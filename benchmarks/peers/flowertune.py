"""The stack that people use today: Flower's simulation, TRL's SFTTrainer and PEFT's LoRA, averaged by FedAvg.

As shipped: `--dtype float32`, one client at a time on all cores, and each client loads the model anew. `--cpus 1` with
OMP_NUM_THREADS=1 runs one client per core; `--keep` holds the loaded model in its process. Needs .venv-peers, which
scripts/peers makes.
"""

from __future__ import annotations

import os

os.environ |= {  # read when the libraries are imported
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import argparse

import batches
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

KEPT = {}  # the loaded model of this process, with --keep


def client_app(options: argparse.Namespace) -> ClientApp:
    """Load the model, take the server's adapter, train, send the adapter back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict
        from tuning import adapted, scratch, tune

        model, tokenizer = KEPT.get("model") or adapted(options)
        if options.keep:
            KEPT["model"] = model, tokenizer
        set_peft_model_state_dict(model, message.content["arrays"].to_torch_state_dict())
        work = batches.read(options.batches, options.batch)
        client = work.clients[context.node_config["partition-id"]]
        rows = work.rows[message.content["config"]["place"]][client]
        with scratch() as folder:
            tokens = tune(model, tokenizer, rows, options, folder)
        content = {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"num-examples": len(rows), "tokens": tokens}),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def counted(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
    """Tokens and clients of a round: sums, where FedAvg would average."""
    return MetricRecord({"tokens": sum(reply["metrics"]["tokens"] for reply in replies), "clients": len(replies)})


def server_app(options: argparse.Namespace, work: batches.Batches) -> ServerApp:
    """Rounds of FedAvg over all clients, timed."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        from peft import get_peft_model_state_dict
        from tuning import adapted

        everyone = len(work.clients)
        strategy = FedAvg(
            fraction_train=1.0,
            fraction_evaluate=0.0,
            min_train_nodes=everyone,
            min_available_nodes=everyone,
            train_metrics_aggr_fn=counted,
        )
        arrays = ArrayRecord(get_peft_model_state_dict(adapted(options)[0]))

        def one_round(place: int) -> int:
            nonlocal arrays
            config = ConfigRecord({"place": place})
            result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=1, train_config=config)
            metrics = result.train_metrics_clientapp[1]
            if metrics["clients"] != everyone:
                raise RuntimeError(f"{everyone - metrics['clients']} of {everyone} clients failed in round {place}")
            arrays = result.arrays
            return metrics["tokens"]

        batches.timed(work, one_round)

    return app


def main() -> None:
    """Run all rounds; one line of the output is JSON."""
    parser = batches.arguments(__doc__)
    parser.add_argument("--cpus", type=int, default=os.cpu_count(), help="cores of one client")
    parser.add_argument("--keep", action="store_true", help="hold the loaded model from client to client")
    options = parser.parse_args()
    work = batches.read(options.batches, options.batch)
    run_simulation(
        server_app=server_app(options, work),
        client_app=client_app(options),
        num_supernodes=len(work.clients),
        backend_config={"client_resources": {"num_cpus": options.cpus, "num_gpus": 0.0}},
    )


if __name__ == "__main__":
    main()
