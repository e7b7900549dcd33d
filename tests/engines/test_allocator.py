"""What is settled is left out of garbage collections, and memory that was freed is kept, and only until the end."""

from __future__ import annotations

import gc
import platform
import subprocess
import sys
import weakref

import pytest

from fedllm.engines.allocator import freeze_gc

pytestmark = pytest.mark.usefixtures("unfrozen")


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_what_exists_is_left_out_until_the_end() -> None:
    kept, before = Ring(), Ring()
    gone = weakref.ref(before)
    assert not gc.get_freeze_count()
    with freeze_gc():
        assert gc.get_freeze_count() > 1000
        assert not any(found is kept for found in gc.get_objects())
        del before
        gc.collect()
        assert gone() is not None
    assert not gc.get_freeze_count()
    gc.collect()
    assert gone() is None


def test_what_is_garbage_before_or_becomes_it_inside_is_collected() -> None:
    gone = weakref.ref(Ring())
    with freeze_gc():
        assert gone() is None
        gone = weakref.ref(Ring())
        gc.collect()
        assert gone() is None


def test_only_the_outermost_ends_it() -> None:
    with freeze_gc():
        with freeze_gc():
            pass
        assert gc.get_freeze_count()
    assert not gc.get_freeze_count()


def test_objects_that_another_froze_stay_frozen() -> None:
    gc.freeze()
    try:
        with freeze_gc():
            pass
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


def test_it_ends_with_an_error() -> None:
    with pytest.raises(KeyError), freeze_gc():
        raise KeyError
    assert not gc.get_freeze_count()


KEPT = """
import ctypes, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from fedllm.engines.allocator import retain_freed_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 >> 20

def freed():
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [library.malloc(20 << 20) for _ in range(10)]  # three to a heap
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        library.free(block)
    return resident()

with ThreadPoolExecutor(1) as pool:
    before = pool.submit(resident).result()
    with retain_freed_memory(emptied=sys.argv[1] == "True"):
        print(pool.submit(freed).result() - before)
    print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.parametrize("emptied", [True, False])
def test_a_heap_of_another_thread_is_kept_even_if_it_is_empty(emptied: bool) -> None:
    """Megabytes that are left of 200 that were freed."""
    run = subprocess.run([sys.executable, "-c", KEPT, str(emptied)], capture_output=True, text=True, check=True)
    inside, after = map(int, run.stdout.split())
    assert (inside > 195) == emptied and after < 100
