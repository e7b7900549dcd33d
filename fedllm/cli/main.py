"""The command line: few verbs, an experiment file, dotted overrides."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from time import time
from typing import Annotated, Any

import typer

from fedllm.errors import ConfigError, FedllmError
from fedllm.version import __version__

BEGAN = time()  # of the command

app = typer.Typer(
    name="fedllm",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

USAGE = typer.BadParameter.__mro__[1]  # click's UsageError, whether typer imports click or brings it along

File = Annotated[str, typer.Argument(help="An experiment file, or a packaged recipe (fedllm ls recipes).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as in work.sgd.lr=1e-3")]
What = Annotated[str, typer.Argument(help="methods, stages, aggregators, works, models, data, recipes or schema.")]
ENGINES = "auto, serial, batched, ray, sites, or one with settings: '{batched: {stack: 8}}'."
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"fedllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Federated fine-tuning of language models."""


@app.command()
def init(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe (fedllm ls recipes).")],
    file: Annotated[Path | None, typer.Argument(help="A new file; default RECIPE.yaml.")] = None,
) -> None:
    """Copy a packaged recipe to a file of your own."""
    from fedllm.cli.init import init_file

    init_file(recipe, file)


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help=ENGINES)] = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-HASH8.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
    continues: Annotated[
        Path | None, typer.Option("--continue", help="A finished run, to go on from with more rounds.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Run once for each, as 0,1,2; table mean and spread.")] = None,
) -> None:
    """Run an experiment. A finished one prints its summary again."""
    if "torch" not in sys.modules:  # importing it takes seconds, in which nothing else would be seen
        print(f"loading PyTorch, then {file}", flush=True)
    if seeds is not None:
        if continues is not None:
            raise ConfigError(
                "--continue goes on from one run with its one seed, and --seeds runs several; leave one out"
            )
        from fedllm.cli.seeds import run_seeds

        raise typer.Exit(run_seeds(file, overrides or [], seeds, engine=engine, out=out, resume=resume))
    from fedllm.cli.run import run_file

    run_file(file, overrides or [], engine=engine, out=out, resume=resume, continues=continues, began=BEGAN)


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Check an experiment and print its plan. No model is loaded."""
    from fedllm.cli.check import check_file

    check_file(file, overrides or [])


@app.command()
def ls(what: What) -> None:
    """List what there is."""
    from fedllm.cli.ls import listing

    listing(what)


@app.command("eval")
def evaluate(
    folder: RunFolder,
    overrides: Overrides = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint instead of the last.")] = False,
    client: Annotated[str | None, typer.Option(help="Its personal model alone, on all records.")] = None,
) -> None:
    """Score a run's model again. Other `evaluation` settings may be given, as in evaluation.metrics=[rouge_l]."""
    from fedllm.cli.evaluate import evaluate_run

    evaluate_run(folder, overrides or [], best=best, client=client)


@app.command()
def personalise(
    folder: RunFolder,
    data: Annotated[str, typer.Option(help="Records of a client that took no part: a file, or packaged data.")],
    name: Annotated[str, typer.Option(help="Its name; chat, eval and export take it as --client.")],
    fields: Annotated[
        list[str] | None, typer.Option(help="NAME=FIELD, once for each, as in prompt=question; default: the run's.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Local steps; default: a client's in the whole run.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate; default: the run's.")] = None,
    heldout: Annotated[
        float | None, typer.Option(help="Fraction of the records to test with; default: the run's, or 0.1.")
    ] = None,
) -> None:
    """Give a newcomer its own model: train the personal part alone; the shared one stays as it is."""
    from fedllm.cli.personalise import personalise_run

    personalise_run(folder, data=data, name=name, fields=fields or [], steps=steps, lr=lr, heldout=heldout)


@app.command()
def chat(
    folder: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit; else a conversation.")] = None,
    client: Annotated[str | None, typer.Option(help="A client's personal model.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned side by side.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the one of the run's data.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 64,
) -> None:
    """Talk to a run's model."""
    from fedllm.cli.chat import chat_with

    chat_with(folder, prompt=prompt, client=client, compare=compare, system=system, max_new_tokens=max_new_tokens)


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[str, typer.Option(help="peft or merged.")],
    out: Annotated[Path | None, typer.Option(help="A new folder; default RUN/export-TO.")] = None,
    client: Annotated[str | None, typer.Option(help="A client's personal model.")] = None,
) -> None:
    """Write a run's model for other tools."""
    from fedllm.cli.export import export_run

    export_run(folder, to=to, out=out, client=client)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="One run folder, or several side by side.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first folder.")] = None,
) -> None:
    """Write a self-contained page about one or more runs."""
    from fedllm.cli.report import report_runs

    report_runs(folders, out=out)


@app.command()
def audit(
    folder: RunFolder,
    records: Annotated[int, typer.Option(min=1, help="Records of each side, at most.")] = 400,
    reconstruct: Annotated[bool, typer.Option("--reconstruct", help="Read texts out of the first round.")] = False,
    client: Annotated[str | None, typer.Option(help="Whose texts; default: the first of the round.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Attack a run: could somebody tell which records it was trained on, or read them?"""
    from fedllm.cli.audit import audit_run, reconstruct_run

    if reconstruct or client is not None:
        reconstruct_run(folder, client=client, as_text=json)
    else:
        audit_run(folder, records=records, as_text=json)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2; anything unexpected keeps its traceback."""
    try:
        code = app(standalone_mode=False)  # the exit code where a verb ends early, as --help does
    except FedllmError as error:
        code = _refuse(str(error))
    except typer.Abort:
        code = 130
    except Exception as error:
        if not isinstance(error, USAGE):
            raise
        code = _refuse_usage(error)
    sys.exit(code if isinstance(code, int) else 0)


def _refuse(sentence: str) -> int:
    print(f"fedllm: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


def _refuse_usage(error: Any) -> int:
    """An unknown verb or option, or a missing argument: what is wrong, and where to look."""
    if len(sys.argv) == 1:
        print(error.format_message())  # the help
        return 2
    told = error.format_message().rstrip(".?")
    sentence = re.sub(r"[.?] (\w)", lambda found: f"; {found[1].lower()}", told[0].lower() + told[1:])
    verb = error.ctx.command_path if error.ctx is not None else "fedllm"
    return _refuse(f"{sentence}; see: {verb} --help")


if __name__ == "__main__":
    main()
