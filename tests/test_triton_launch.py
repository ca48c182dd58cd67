"""What a launch takes for known: no two calls that Triton compiles apart."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headfold.backends.triton import launch as launching

NUMBERS = st.sampled_from([0, 1, -1, 2, 16, 17, 32, 2**31 - 1, 2**31, -(2**31), 2**31 + 16, 2**40 + 1]) | st.integers(
    -(2**40), 2**40
)


def seen_by_triton(values: list[object]) -> list[object]:
    """Return the type and value of each argument that Triton compiles for on CUDA."""
    from triton._C.libtriton import native_specialize_impl
    from triton.backends.nvidia.compiler import CUDABackend

    return [native_specialize_impl(CUDABackend, x, False, True, True) for x in values]


@given(st.tuples(NUMBERS, NUMBERS), st.tuples(NUMBERS, NUMBERS))
def test_numbers_that_triton_tells_apart_are_told_apart(one: tuple[int, int], two: tuple[int, int]) -> None:
    if launching.traits_of_numbers(one) == launching.traits_of_numbers(two):
        assert seen_by_triton([*one]) == seen_by_triton([*two])


STORAGE = torch.zeros(64, dtype=torch.uint8)
TENSORS = st.builds(
    lambda dtype, at: STORAGE[at * dtype.itemsize :][: 2 * dtype.itemsize].view(dtype),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.int32]),
    st.integers(0, 8),
)


@given(st.none() | TENSORS, st.none() | TENSORS)
def test_tensors_that_triton_tells_apart_are_told_apart(one: Tensor | None, two: Tensor | None) -> None:
    if launching.traits((one,)) == launching.traits((two,)):
        assert seen_by_triton([one]) == seen_by_triton([two])


def test_numbers_whose_value_is_not_looked_at_are_told_apart_by_their_width() -> None:
    assert launching.widths((7, 2**31)) == launching.widths((8, 2**31 + 1)) == (True, False)
    assert launching.widths((-(2**31) - 1, 7)) == (False, True)
    assert launching.widths((7, 8)) is launching.widths(()) is None
    assert launching.widths((None, 7)) == (None, True)


@given(st.none() | NUMBERS, st.none() | NUMBERS)
def test_what_is_a_number_in_one_launch_may_be_none_in_another(one: int | None, two: int | None) -> None:
    # Whichever of the two came first and said what the parameter is.
    for said in (launching.traits, launching.traits_of_numbers):
        if said((one,)) == said((two,)):
            assert seen_by_triton([one]) == seen_by_triton([two])


class Parameter:
    def __init__(self, do_not_specialize: bool) -> None:
        self.do_not_specialize = do_not_specialize


class Kernel:
    params = tuple(Parameter(x) for x in (False, False, True, False, False))


def test_the_arguments_of_a_kernel_are_told_apart_once() -> None:
    tensor = torch.zeros(2)
    known = launching.parameters(Kernel(), (tensor, None, 3, 4, 0.5))
    again = tensor, tensor, 30, 40, 5.0
    assert known.looked_at(again) == (40,)
    assert known.others(again) == (30,)
    first, second = known.rest(again)
    assert first is second is tensor


class Compiled:
    def __init__(self, said: list[Any]) -> None:
        self.said = said

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args: self.said.append(("at once", grid, args))


class Jitted:
    """A kernel of (x, n, N: constexpr, M: constexpr) that notes how it is launched."""

    arg_names = ("x", "n", "N", "M")
    params = tuple(Parameter(x) for x in (False, False, False, False))

    def __init__(self, compiled: Callable[[list[Any]], object]) -> None:
        self.said: list[Any] = []
        self.settled = 0
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
        def run(*args: object, **constants: object) -> object:
            self.said.append(("first", grid, args, constants))
            return self.compiled(self.said)

        return run

    def settle(self) -> None:
        self.settled += 1


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `Jitted` pass for a kernel on the device that the list holds."""
    current = [0]
    monkeypatch.setattr(triton, "JITFunction", Jitted)
    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "settle_key", Jitted.settle)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    return current


def test_what_is_known_is_started_at_once_with_its_constants_in_their_order(devices: list[int]) -> None:
    kernel, x = Jitted(Compiled), torch.zeros(4)
    for n in (32, 48, 33, 1):
        launching.launch(kernel, (7,), x, n, M=5, N=6, num_warps=4)
    devices[0] = 1
    launching.launch(kernel, (7, 2), x, 48, M=5, N=6, num_warps=4)
    launching.launch(kernel, (7, 2), x, 48, M=5, N=7, num_warps=4)
    assert [one[0] for one in kernel.said] == ["first", "at once", "first", "first", "first", "first"]
    assert kernel.said[1] == ("at once", (7, 1, 1), (x, 48, 6, 5))
    assert kernel.settled == 1


def test_the_key_of_a_kernel_is_settled_on_rocm_too(devices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    kernel = Jitted(Compiled)
    for _ in range(2):
        launching.launch(kernel, (7,), torch.zeros(4), 3, M=5, N=6)
    assert [one[0] for one in kernel.said] == ["first", "first"]
    assert kernel.settled == 1


@pytest.mark.parametrize("values", [(None, 3, None, 3), (3, None, 3, None)])
@pytest.mark.parametrize("specialized", [True, False])
def test_an_offset_may_be_a_number_in_one_launch_and_none_in_another(
    values: tuple[int | None, ...], specialized: bool, devices: list[int]
) -> None:
    kernel, x = Jitted(Compiled), torch.zeros(4)
    kernel.params = tuple(Parameter(not specialized) for _ in range(4))
    for n in values:
        launching.launch(kernel, (1,), x, n, M=5, N=6)
    assert [one[0] for one in kernel.said] == ["first", "first", "at once", "at once"]
    assert [one[2][1] for one in kernel.said] == [*values]


def test_what_a_hook_kept_from_being_compiled_is_not_known(devices: list[int]) -> None:
    kernel = Jitted(lambda _: None)
    for _ in range(2):
        launching.launch(kernel, (1,), torch.zeros(4), 3, N=1, M=1)
    assert [one[0] for one in kernel.said] == ["first", "first"]


# Functions whose keys a kernel's follows from, in the order in which Triton asks for them, and whether each was known.
ASKED = """
from triton.runtime import jit
from headfold.backends.triton.keys import settle_key
from headfold.backends.triton.select_rows import select_rows_kernel
from headfold.backends.triton.keep import keep_kernel

class Finder(jit.DependenciesFinder):
    def _update_hash(self, function):
        print(function.fn.__name__, function.hash is not None)
        super()._update_hash(function)

jit.DependenciesFinder = Finder
"""


def asked(then: str) -> list[list[str]]:
    command = [sys.executable, "-W", "ignore", "-c", ASKED + then]
    compiling = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=compiling)
    return [line.split() for line in done.stdout.splitlines()]


def test_the_key_of_a_kernel_follows_from_keys_that_are_known() -> None:
    found = asked("settle_key(keep_kernel); settle_key(select_rows_kernel)")
    assert {"narrowed", "sift", "_write"} <= {name for name, _ in found}
    assert all(known == "True" for _, known in found)
    assert not all(known == "True" for _, known in asked("select_rows_kernel.cache_key"))


def test_the_key_of_a_kernel_that_is_only_compiled_follows_from_keys_that_are_known() -> None:
    found = asked("""
from headfold.backends.triton.compiling import compile_specimen
from headfold.backends.triton.select_specimens import specimens
compile_specimen(next(x for x in specimens("sm_90") if x.kernel is keep_kernel), "sm_90")
""")
    assert "narrowed" in {name for name, _ in found}
    assert all(known == "True" for _, known in found)


KEYS = """
from headfold.backends.triton.keys import settle_key
from headfold.backends.triton.keep import keep_kernel
from headfold.backends.triton.sampling import pivots_kernel
from headfold.backends.triton.select_rows import select_rows_kernel
kernels = keep_kernel, pivots_kernel, select_rows_kernel
for kernel in kernels{order}:
    settle_key(kernel)
print(*[kernel.cache_key for kernel in kernels])
"""


def test_keys_are_the_same_whichever_kernel_came_first_with_the_triton_at_hand() -> None:
    # The first and the last of them share functions, which in Triton 3.5 and 3.6 was enough for other keys.
    compiling = {**os.environ, "TRITON_INTERPRET": "0"}
    found = {
        subprocess.check_output(
            [sys.executable, "-W", "ignore", "-c", KEYS.format(order=order)], text=True, env=compiling
        )
        for order in ("", "[::-1]")
    }
    assert len(found) == 1
