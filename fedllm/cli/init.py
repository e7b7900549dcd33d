"""`fedllm init`: a packaged recipe as a file of one's own. Nothing heavy is imported."""

from __future__ import annotations

import shlex
from pathlib import Path

from fedllm.errors import ConfigError, nearest

RECIPES = Path(__file__).parent.parent / "recipes"


def init_file(recipe: str, file: Path | None) -> None:
    """Copy a recipe and say what to do next.

    Raises:
        ConfigError: there is no such recipe, the file exists, or it cannot be written.
    """
    known = {path.stem: path for path in RECIPES.glob("*.yaml")}
    if recipe not in known:
        raise ConfigError(f"there is no packaged recipe '{recipe}'{nearest(recipe, known)}")
    place = Path(f"{recipe}.yaml") if file is None else file
    try:
        with place.open("x", encoding="utf-8", newline="\n") as opened:  # never over another file
            opened.write(known[recipe].read_text(encoding="utf-8"))
    except FileExistsError:
        what = "a folder; name a file in it" if place.is_dir() else "there already; name another file"
        raise ConfigError(f"{place} is {what}:  fedllm init {recipe} FILE") from None
    except OSError as error:
        raise ConfigError(f"{place} cannot be written ({error.strerror}); name another file") from error
    name = shlex.quote(str(place))
    print(f"written: {place}")
    print(f"Edit it, then check it:  fedllm check {name}")
    print(f"and run it:              fedllm run {name}")
