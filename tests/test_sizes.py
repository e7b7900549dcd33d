"""Size caps: what scripts/sizes.py counts, and that fedllm stays below them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fedllm_scripts_sizes", ROOT / "scripts" / "sizes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


sizes = load()

SOURCE = '''\
class Thing:
    def method(self, one, /, two, *rest, three, **more):
        """Two lines
        of words."""
        def inner():
            return one

        return inner

    @property
    def short(self): return 1


async def plain(): ...
'''


def function(lines: int, parameters: int = 0) -> object:
    return sizes.Function("place", lines, parameters)


def test_functions_are_counted_by_hand() -> None:
    found = {item.place: (item.lines, item.parameters) for item in sizes.functions_of(SOURCE, "a.py")}
    assert found == {
        "a.py:2 method": (5, 5),  # 7 lines less 2 of docstring; one, two, rest, three, more
        "a.py:5 inner": (2, 0),
        "a.py:11 short": (1, 0),
        "a.py:14 plain": (1, 0),
    }


@pytest.mark.parametrize(
    ("lengths", "p90"),
    [([], 0), ([7], 7), ([1] * 9 + [50], 1), ([1] * 8 + [50] * 2, 50), (list(range(1, 21)), 18)],
)
def test_p90_is_the_nearest_rank(lengths: list[int], p90: int) -> None:
    assert sizes.Sizes({}, tuple(function(lines) for lines in lengths)).p90 == p90


@given(st.lists(st.integers(1, 500), min_size=1, max_size=60))
def test_p90_leaves_at_most_a_tenth_above(lengths: list[int]) -> None:
    p90 = sizes.Sizes({}, tuple(function(lines) for lines in lengths)).p90
    assert p90 in lengths
    assert sum(length > p90 for length in lengths) * 10 <= len(lengths)
    assert sum(length >= p90 for length in lengths) * 10 > len(lengths)


def test_each_cap_has_its_sentence() -> None:
    assert sizes.faults(sizes.Sizes({"a.py": 400}, (function(35, 8),))) == []
    assert "a.py has 401 lines" in sizes.faults(sizes.Sizes({"a.py": 401}, ()))[0]
    assert "place has 9 parameters" in sizes.faults(sizes.Sizes({}, (function(1, 9),)))[0]
    assert "the cap is 35" in sizes.faults(sizes.Sizes({}, (function(36),)))[0]


def test_command_prints_the_table_and_fails_on_a_broken_cap(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "thing"
    package.mkdir()
    (package / "a.py").write_text(SOURCE)
    assert sizes.main([str(package)]) == 0
    assert "    14  thing/a.py" in capsys.readouterr().out
    (package / "b.py").write_text("x = 1\n" * 401)
    assert sizes.main([str(package), "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("thing/b.py has 401 lines")


def test_fedllm_keeps_the_caps() -> None:
    measured = sizes.measure(ROOT / "fedllm")
    assert len(measured.files) > 5
    assert sizes.faults(measured) == []
