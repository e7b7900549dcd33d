"""YAML that stands for more than it says."""

from __future__ import annotations

import string

import pytest

from fedllm.errors import ConfigError
from fedllm.experiment.config_file import parse
from fedllm.experiment.overrides import overridden
from fedllm.experiment.yaml import MOST_REPEATED, read_yaml, write_line


def bomb(levels: int, each: int) -> str:
    """Each level is a list of `each` aliases of the one before it: each ** levels values."""
    lines = [f"a: &a [{','.join('1' * each)}]"]
    for before, name in zip(string.ascii_lowercase, string.ascii_lowercase[1:levels], strict=False):
        lines.append(f"{name}: &{name} [{','.join([f'*{before}'] * each)}]")
    return "\n".join(lines)


@pytest.mark.parametrize("text", [bomb(9, 9), bomb(26, 2)])
def test_nested_aliases_are_refused(text: str) -> None:
    assert len(text) < 500
    with pytest.raises(ConfigError, match=r"its aliases \(\*name\) stand for more than 10,000 values"):
        parse(text)


def test_an_override_with_nested_aliases_is_refused() -> None:
    flow = (
        "["
        + ", ".join(
            [
                "&a [1, 1, 1, 1, 1, 1, 1, 1, 1]",
                *(
                    f"&{name} [{', '.join([f'*{before}'] * 9)}]"
                    for before, name in zip("abcdefg", "bcdefgh", strict=True)
                ),
            ]
        )
        + "]"
    )
    with pytest.raises(ConfigError, match=r"the value of 'evaluation\.metrics=.* cannot be read: its aliases"):
        overridden({}, f"evaluation.metrics={flow}")


def test_what_is_part_of_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="line 2: an alias stands for what it is a part of"):
        read_yaml("x: 1\ny: &a [*a]")


def test_aliases_in_measure_are_read() -> None:
    assert read_yaml("one: &a {lr: 1}\ntwo: *a\nthree: [*a, *a]") == {
        "one": {"lr": 1},
        "two": {"lr": 1},
        "three": [{"lr": 1}] * 2,
    }
    half = MOST_REPEATED // 2 - 2
    assert len(read_yaml(f"a: &a [{','.join('1' * half)}]\nb: [*a]\nc: [*a]")["c"][0]) == half
    with pytest.raises(ConfigError, match="aliases"):
        read_yaml(f"a: &a [{','.join('1' * half)}]\nb: [*a]\nc: [*a, *a]")


def test_a_line_of_yaml_reads_back() -> None:
    value = [{"prox": {"mu": 0.1}}, "uniform", {"sgd": {"lr": 1e-8, "steps": None, "betas": [0.9, 0.999], "no": "1e3"}}]
    assert read_yaml(write_line(value)) == value and "\n" not in write_line(value * 40)
    assert (write_line("by_examples"), write_line([])) == ("by_examples", "[]")
