"""A fold's launches are noted once and launched again wherever its tensors are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from headfold.backends.triton import compare, launches, loss, select, table, teacher, topk
from headfold.backends.triton import launch as launching
from headfold.backends.triton import replay as replaying
from headfold.backends.triton.launch import launch
from headfold.backends.triton.memory import Arena
from headfold.backends.triton.replay import do, replay
from headfold.loss_slabs import PIECE

Said = list[tuple[Any, ...]]


class Compiled:
    """A compiled kernel that notes what it is started with: pointers as numbers."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*args: Any, stream: int | None = None) -> None:
            seen = [
                x.data_ptr() if isinstance(x, Tensor) and x.numel() else 0 if isinstance(x, Tensor) else x for x in args
            ]
            self.kernel.said.append((self.kernel.name, grid, *seen))

        return start


class Kernel:
    """A kernel as `launch` sees it, whose first launch compiles it."""

    def __init__(self, name: str, arg_names: Sequence[str], said: Said) -> None:
        self.name, self.arg_names, self.said = name, arg_names, said
        self.params = [SimpleNamespace(do_not_specialize=False) for _ in arg_names]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
        def run(*args: Any, **constants: Any) -> Compiled:
            compiled = Compiled(self)
            rest = [constants[name] for name in self.arg_names[len(args) :]]
            whole = (*grid, 1, 1)
            compiled[whole](*args, *rest)
            return compiled

        return run


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Said:
    """Let kernels pass for those of a device, in a process that has launched nothing yet; return what they say."""
    monkeypatch.setattr(triton, "JITFunction", Kernel)
    monkeypatch.setattr(triton.compiler, "CompiledKernel", Compiled)
    monkeypatch.setattr(launching, "settle_key", lambda kernel: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(launching, "_compiled", {})
    monkeypatch.setattr(launching, "_parameters", {})
    monkeypatch.setattr(replaying, "_kept", replaying._Kept(replaying._MOST))
    return []


def test_launches_are_made_again_where_the_tensors_are_now(said: Said) -> None:
    kernel = Kernel("copy", ("x", "y", "n", "N"), said)
    ran = []

    def call(x: Tensor, y: Tensor, key: str = "one") -> Said:
        said.clear()

        def run() -> None:
            ran.append(key)
            for i in range(3):
                launch(kernel, (i + 1,), x[i:], y[2 * i :], 5 + i, N=4)

        replay(run, key, x, None, y)
        return [*said]

    (x, y), (z, w) = (torch.zeros(2, 8, 16) for _ in range(2))
    x, y, z, w = x.clone(), y.clone(), z.clone(), w.clone()
    first, noted, again, moved = call(x, y), call(x, y), call(x, y), call(z, w)
    assert ran == ["one"] * 2
    assert first == noted == again
    assert [one[2:4] for one in moved] == [(z[i:].data_ptr(), w[2 * i :].data_ptr()) for i in range(3)]
    assert [(one[1], one[4:]) for one in moved] == [((i + 1, 1, 1), (5 + i, 4)) for i in range(3)]
    call(x, y, "two")
    call(x.half(), y)
    call(x[:, :8].clone(), y)
    call(torch.zeros(8 * 16 + 1)[1:].view(8, 16), y)
    assert len(ran) == 6


def test_what_cannot_be_launched_again_by_pointers_runs_anew(said: Said) -> None:
    kernel = Kernel("copy", ("x", "y", "n", "N"), said)
    interpreted = {(1,): lambda x: None}
    ran = []

    def call(x: Tensor, y: Tensor, third: Tensor, *, by_hand: bool = False) -> None:
        def run() -> None:
            ran.append(1)
            if by_hand:
                launch(interpreted, (1,), x)
            launch(kernel, (1,), x, third, 3, N=4)

        replay(run, by_hand, x, y)

    x, y = torch.zeros(8), torch.zeros(8)
    for _ in range(2):
        call(x, y, torch.zeros(8))  # a tensor that nobody named
        call(x, y, y, by_hand=True)
    assert len(ran) == 4
    assert not any(replaying._kept.steps.values())
    for _ in range(4):
        call(x, y, y)
    assert len(ran) == 5


def test_tensors_of_one_memory_are_told_apart_by_where_they_lie(said: Said) -> None:
    kernel, ran = Kernel("copy", ("x", "y"), said), []

    def call(x: Tensor, y: Tensor, z: Tensor) -> Said:
        said.clear()

        def run() -> None:
            ran.append(1)
            launch(kernel, (1,), x, z)
            launch(kernel, (2,), z[1:], y)

        replay(run, "one", x, y, z)
        return [*said]

    for _ in range(3):
        both, other = torch.zeros(40), torch.zeros(8)
        x, y, z = both[8:16], other, both[24:32]
        pointers = [[one.data_ptr() for one in pair] for pair in ((x, z), (z[1:], y))]
        assert [one[2:] for one in call(x, y, z)] == [tuple(pair) for pair in pointers]
    assert len(ran) == 2
    call(both[8:16], other, both[16:24])
    call(both[24:32], other, both[8:16])
    call(both[8:16], both[16:24], both[24:32])
    assert len(ran) == 5


def test_what_was_not_used_for_longest_is_let_go(said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = replaying._Kept(9)
    monkeypatch.setattr(replaying, "_kept", kept)
    kernel, x = Kernel("zero", ("x",), said), torch.zeros(4)

    def call(key: int, times: int) -> None:
        def run() -> None:
            for _ in range(times):
                launch(kernel, (1,), x)

        for _ in range(2):
            replay(run, key, x)

    def sizes() -> list[int]:
        return [len(steps or ()) for steps in kept.steps.values()]

    call(0, 2)
    call(1, 3)
    assert (sizes(), kept.size) == ([2, 3], 7)
    call(0, 2)
    assert sizes() == [3, 2]
    call(2, 1)
    assert (sizes(), kept.size) == ([3, 2, 1], 9)
    call(3, 0)
    assert (sizes(), kept.size) == ([2, 1, 0], 6)
    call(4, 20)  # more than are kept of all
    assert (sizes(), kept.size) == ([2, 1, 0, 0], 7)
    call(5, 8)
    assert (sizes(), kept.size) == ([8], 9)
    for key in range(6, 100):
        replay(lambda: None, key, x)
    assert len(kept.steps) == kept.size == 9


def test_an_error_while_launches_are_noted_leaves_none(said: Said) -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    x = torch.zeros(4)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            replay(broken, "key", x)
    assert not any(replaying._kept.steps.values())
    assert replaying._local.notes is None


CALLS: dict[str, dict[str, Any]] = {
    "causal": {"offset": 0},
    "in no order, with scores": {"offset": 0, "with_scores": True, "in_order": False},
    "bounds and a bias": {"bounds": True, "bias": True},
    "without weights": {"weights": False, "offset": 3, "ratio": 2},
    "float64": {"dtype": torch.float64, "with_scores": True},
    "one row longer than is cut at once": {"sk": 9000, "sq": 3},
    "more than a network sorts": {"topk": 2500, "sk": 5000, "sq": 40, "index_dtype": torch.int64},
}


class ViewsAlone(TorchDispatchMode):
    """Refuses everything that torch could do but to view a tensor in another way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in (*func._schema.returns, *func._schema.arguments):
            writes = x.alias_info is not None and x.alias_info.is_write
            assert not writes, func
        assert all(x.alias_info is not None for x in func._schema.returns), func
        return func(*args, **(kwargs or {}))


Made = list[tuple[Callable[[], None], Any, tuple["Tensor | None", ...]]]


def assert_done_again(made: Made, said: Said) -> None:
    """Check that the second of two like calls, noted on the tensors of the first, does on its own what it runs."""
    (run, key, tensors), (run_there, key_there, tensors_there) = made
    assert key == key_there
    with ViewsAlone():  # type: ignore[no-untyped-call]
        for _ in range(2):
            replay(run, key, *tensors)
    said.clear()
    run_there()
    by_hand = [*said]
    said.clear()
    replay(lambda: pytest.fail("ran again"), key, *tensors_there)
    assert said == by_hand
    assert len(said) > 4


@pytest.mark.parametrize("name", CALLS)
def test_a_selection_launched_again_is_launched_as_by_its_fold(
    name: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = {"sq": 300, "sk": 300, "topk": 40, "weights": True, "dtype": torch.float32, **CALLS[name]}
    b, sq, sk, h, d, dtype = 2, call["sq"], call["sk"], 4, 16, call["dtype"]
    for module, kernel in (
        (launches, "score_slab"),
        *((select, f"{one}_kernel") for one in ("keep", "order", "count", "merge", "write")),
    ):
        monkeypatch.setattr(module, kernel, Kernel(kernel, getattr(module, kernel).arg_names, said))
    made: Made = []
    monkeypatch.setattr(topk, "replay", lambda run, key, *tensors: made.append((run, key, tensors)))
    for _ in range(2):
        start, end = (torch.zeros(1, sq, dtype=torch.int32) if "bounds" in call else None for _ in range(2))
        topk.index_topk(
            torch.zeros(b, sq, h, d, dtype=dtype),
            torch.zeros(b, sq, h, dtype=dtype) if call["weights"] else None,
            torch.zeros(b, sk, d, dtype=dtype),
            start,
            end,
            torch.zeros(b, sq, sk, dtype=dtype) if "bias" in call else None,
            call.get("offset"),
            call.get("ratio", 1),
            True,
            0.5,
            call["topk"],
            call.get("with_scores", False),
            call.get("index_dtype", torch.int32),
            1 << 18,
            call.get("in_order", True),
        )
    assert_done_again(made, said)


LOSSES: dict[str, dict[str, Any]] = {
    "sparse": {"topk": 40, "sparse": True},
    "several sums of dk": {"topk": 40, "sparse": True, "h": 32},
    "rows that see nothing": {"sq": 700, "sk": 1500, "topk": 40, "sparse": True, "offset": -600},
    "dense, with a bias and a mask": {"bias": True, "row_mask": True},
    "without an activation": {"relu": False, "h": 32},
    "without gradients": {"needs": False, "topk": 40},
    "fewer batch elements last": {"b": 6, "sq": 64, "sk": 4096, "h": 128, "d": 256, "np": 128},
    "fewer batch elements last, folded": {"b": 300, "sq": 64, "sk": 100, "h": 16, "d": 192, "np": 1, "relu": False},
    "many slabs": {"sq": 700, "sk": 1500, "topk": 40, "sparse": True},
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_done_again_is_done_as_by_its_walk(name: str, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {
        "b": 2,
        "sq": 300,
        "sk": 300,
        "h": 4,
        "d": 16,
        "topk": None,
        "sparse": False,
        "offset": 0,
        "np": 4,
        **LOSSES[name],
    }
    b, sq, sk, h, d = (call[name] for name in ("b", "sq", "sk", "h", "d"))
    kernels = {
        launches: ("score_slab", "query_gradients", "key_gradients", "fold_heads", "unfold_heads"),
        select: ("keep_kernel", "order_kernel"),
        compare: ("mark_seen_kernel", "mark_selected_kernel", "compare_kernel"),
        teacher: ("sums_kernel", "join_kernel", "mass_kernel"),
    }
    for module, names in kernels.items():
        for kernel in names:
            monkeypatch.setattr(module, kernel, Kernel(kernel, getattr(module, kernel).arg_names, said))

    def say(function: str) -> Callable[..., None]:
        return lambda *xs: said.append((function, *((x.data_ptr(), x.shape, x.stride(), x.dtype) for x in xs)))

    for module, function in ((loss, "_fill_with_zeros"), (launches, "_add_parts")):
        monkeypatch.setattr(module, function, say(function))
    made: Made = []
    monkeypatch.setattr(loss, "replay", lambda run, key, *tensors: made.append((run, key, tensors)))
    for _ in range(2):
        loss.indexer_loss(
            torch.zeros(b, sq, h, d),
            torch.zeros(b, sq, h),
            torch.zeros(b, sk, d),
            torch.zeros(b, sq, call["np"], 16),
            torch.zeros(b, sk, 1, 16),
            None,
            None,
            torch.zeros(b, sq, sk) if "bias" in call else None,
            torch.ones(b, sq, dtype=torch.bool) if "row_mask" in call else None,
            call["offset"],
            1,
            call.get("relu", True),
            0.5,
            0.25,
            call["topk"],
            call["sparse"],
            True,
            needs=(call.get("needs", True),) * 3,
        )
    assert_done_again(made, said)
    assert any(one[0] == "_add_parts" for one in said) == (name in ("several sums of dk", "fewer batch elements last"))


def test_other_tiles_are_other_launches(said: Said) -> None:
    kernel, x, ran = Kernel("zero", ("x",), said), torch.zeros(4), []

    def run() -> None:
        ran.append(1)
        launch(kernel, (1,), x)

    def call() -> None:
        replay(run, "key", x)

    for _ in range(3):
        call()
    for kernel_of_a_row in ("scores", "compare"):
        with table.trying(table.tile(kernel_of_a_row, "cpu", torch.float32, 16, 4)._replace(keys=128)):
            call()
    call()
    assert len(ran) == 4


def test_what_is_done_again_within_another_call_is_noted_for_that(said: Said) -> None:
    kernel, x, ran = Kernel("zero", ("x",), said), torch.zeros(4), []

    def inner() -> None:
        launch(kernel, (1,), x)

    def outer() -> None:
        ran.append(1)
        replay(inner, "inner", x)
        launch(kernel, (2,), x)

    for _ in range(3):
        replay(inner, "inner", x)
    for _ in range(3):
        said.clear()
        replay(outer, "outer", x)
        assert [one[1][0] for one in said] == [1, 2]
    assert len(ran) == 2


def test_what_torch_does_is_done_again_to_the_same_views(said: Said) -> None:
    def fill(x: Tensor) -> None:
        x.fill_(1)

    def add(x: Tensor, y: Tensor) -> None:
        x.add_(y)

    def call(x: Tensor, y: Tensor) -> None:
        def run() -> None:
            do(fill, x.view(torch.int16)[8:12, 2:])
            do(add, y[1:, ::2], x.view(torch.bfloat16).view(8, 8).t()[:3, :4])

        replay(run, "one", x, y)

    def drawn(seed: int) -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 100, (3, 16, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
        return x[1], torch.zeros(4, 8, dtype=torch.bfloat16)

    by_hand = [drawn(seed) for seed in (1, 2)]
    for pair in by_hand:
        call(*pair)
    again = [drawn(seed) for seed in (1, 2)]
    for pair in again:
        call(*pair)
    assert [len(steps or ()) for steps in replaying._kept.steps.values()] == [2]
    for one, other in zip(by_hand, again, strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])
    assert float(again[0][1].abs().sum()) > 0


def test_a_step_takes_the_bytes_of_the_last_one_and_no_more() -> None:
    arena, cpu = Arena(2 * PIECE + 40, torch.device("cpu")), torch.device("cpu")
    with arena.step():
        first = arena.empty(3, 5, dtype=torch.float32, device=cpu)
        with arena.step():
            inner = arena.empty(7, dtype=torch.int64, device=cpu)
        second = arena.empty(1, dtype=torch.uint8, device=cpu)
        last = arena.empty(10, dtype=torch.float32, device=cpu)
        with pytest.raises(RuntimeError, match="more than its 552 bytes"):
            arena.empty(1, dtype=torch.uint8, device=cpu)
    assert (first.shape, first.stride(), first.dtype) == ((3, 5), (5, 1), torch.float32)
    assert [x.data_ptr() - first.data_ptr() for x in (inner, second, last)] == [PIECE, PIECE, 2 * PIECE]
    with arena.step():
        assert arena.empty(2, dtype=torch.float64, device=cpu).data_ptr() == first.data_ptr()


def test_another_precision_or_scale_is_another_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    monkeypatch.setattr(topk, "replay", lambda run, key, *tensors: keys.append(key))
    q, k = torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 16)

    def call(scale: float = 0.5) -> None:
        topk.index_topk(q, None, k, None, None, None, 0, 1, True, scale, 4, False, torch.int32, 1 << 20)

    call()
    call()
    monkeypatch.setattr(topk, "precision", lambda dtype: "tf32")
    call()
    call(0.25)
    assert keys[0] == keys[1]
    assert len({*keys}) == 3


def test_another_precision_or_scale_is_another_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    monkeypatch.setattr(loss, "replay", lambda run, key, *tensors: keys.append(key))
    q, k, beside = torch.zeros(1, 8, 4, 16), torch.zeros(1, 8, 16), torch.zeros(1, 8, 2, 16)

    def call(scale: float = 0.5, softmax_scale: float = 0.25, sparse: bool = True) -> None:
        ranges = None, None, None, None, 0, 1
        rest = True, scale, softmax_scale, 4, sparse, True
        loss.indexer_loss(q, None, k, beside, beside, *ranges, *rest, needs=(True, False, True))

    call()
    call()
    monkeypatch.setattr(loss, "precision", lambda dtype: "tf32")
    call()
    call(scale=0.25)
    call(softmax_scale=1)
    call(sparse=False)
    assert keys[0] == keys[1]
    assert len({*keys}) == 5
