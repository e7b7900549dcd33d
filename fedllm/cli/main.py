"""The command line: few verbs, an experiment file, dotted overrides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fedllm.errors import FedllmError

app = typer.Typer(
    name="fedllm",
    help="Federated fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

File = Annotated[str, typer.Argument(help="An experiment file, or a packaged recipe (fedllm ls recipes).")]
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as in work.sgd.lr=1e-3")]
What = Annotated[str, typer.Argument(help="methods, stages, aggregators, works, models, data, recipes or schema.")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder.")]


@app.command()
def run(
    file: File,
    overrides: Overrides = None,
    engine: Annotated[str, typer.Option(help="auto or serial.")] = "auto",
    out: Annotated[Path | None, typer.Option(help="Run folder; default runs/NAME-HASH8.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished run.")] = False,
) -> None:
    """Run an experiment. A finished one prints its summary again."""
    from fedllm.cli.running import run_file

    run_file(file, overrides or [], engine=engine, out=out, resume=resume)


@app.command()
def check(file: File, overrides: Overrides = None) -> None:
    """Check an experiment without loading a model; print what it would do."""
    from fedllm.cli.checking import check_file

    check_file(file, overrides or [])


@app.command()
def ls(what: What) -> None:
    """List what there is."""
    from fedllm.cli.listing import listing

    listing(what)


@app.command("eval")
def evaluate(
    folder: RunFolder,
    overrides: Overrides = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint instead of the last.")] = False,
) -> None:
    """Score a run's model again, with other `evaluation` settings if given (evaluation.metrics=[rouge_l])."""
    from fedllm.cli.finished import evaluate_run

    evaluate_run(folder, overrides or [], best=best)


@app.command()
def chat(
    folder: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="Answer this and exit; else a conversation.")] = None,
    client: Annotated[str | None, typer.Option(help="A client's personal model.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and tuned side by side.")] = False,
    system: Annotated[str | None, typer.Option(help="System prompt; default: the one of the run's data.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
) -> None:
    """Talk to a run's model."""
    from fedllm.cli.chatting import chat_with

    chat_with(folder, prompt=prompt, client=client, compare=compare, system=system, max_new_tokens=max_new_tokens)


@app.command()
def export(
    folder: RunFolder,
    to: Annotated[str, typer.Option(help="peft or merged.")],
    out: Annotated[Path | None, typer.Option(help="Default: RUN/export-TO.")] = None,
    client: Annotated[str | None, typer.Option(help="A client's personal model.")] = None,
) -> None:
    """Write a run's model for other tools."""
    from fedllm.cli.finished import export_run

    export_run(folder, to=to, out=out, client=client)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="One run folder, or several side by side.")],
    out: Annotated[Path | None, typer.Option(help="Default: report.html in the first folder.")] = None,
) -> None:
    """Write a self-contained page about one or more runs."""
    from fedllm.cli.finished import report_runs

    report_runs(folders, out=out)


def main() -> None:
    """Entry point: a user's mistake is one sentence and exit code 2."""
    try:
        app(standalone_mode=False)
    except FedllmError as error:
        print(f"fedllm: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except typer.Exit as error:
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
