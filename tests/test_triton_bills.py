"""Planned bytes of the kernels are allocated bytes, on a GPU or under Triton's interpreter on a CPU.

Every tensor of an op is allocated by the same Python on either: what the interpreter's run takes from the CPU allocator
is what a GPU's run asks of CUDA's. That one hands out multiples of 512 bytes and counts both; the lanes, and these
tests there, read what was asked for (`requested_bytes`), so that the rounding is in neither figure.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from headfold import IndexerGeometry
from headfold.geometry import ATTENDING, ITEMSIZE, LOSSES, PATHS, SELECTED, SELECTING
from headfold.lanes.paths import IndexerPath, headfold, headfold_selected, headfold_topk
from headfold.lanes.problem import Problem
from headfold.lanes.residency import FORWARD, LEAST_SHARE, TRAINING, Call
from headfold.lanes.training_paths import headfold_attention, headfold_loss
from headfold.score_tiles import ScoreTile
from on_device import DEVICE, launches_leave_nothing

pytest.importorskip("triton", reason="Triton is not installed")
from headfold.backends import triton
from headfold.backends.triton.table import TABLE

pytestmark = pytest.mark.skipif(
    DEVICE.type == "cpu" and not triton.INTERPRETED,
    reason="needs a GPU, or TRITON_INTERPRET=1 before Triton is imported",
)
MAKERS: dict[str, Callable[..., IndexerPath]] = {
    PATHS[2]: headfold,
    SELECTING[1]: headfold_topk,
    SELECTED: headfold_selected,
    LOSSES[1]: headfold_loss,
    ATTENDING[1]: headfold_attention,
}
PLAIN = IndexerGeometry(2, 2, 130, 2, 16, 20, np=2, np_k=1, hn=16, v_dim=16)
# By family: shapes at which each term of a bill is a large part of it.
SHAPES: dict[str, list[IndexerGeometry]] = {
    PATHS[2]: [
        PLAIN,
        PLAIN.with_(relu=False, heads=9),
        PLAIN.with_(b=1, sq=1030, sk=9, heads=8),  # the rows of dk are shared out
        PLAIN.with_(b=1, heads=70),  # dk takes several launches
        PLAIN.with_(b=1, heads=40, dim=144),
    ],
    SELECTING[1]: [PLAIN.with_(relu=False), PLAIN.with_(b=1, sq=1, sk=300, topk=70)],
    SELECTED: [
        PLAIN,
        PLAIN.with_(b=1, sk=900, topk=130),
        PLAIN.with_(sk=60, relu=False),  # dk is made of dscores at all keys
        PLAIN.with_(b=1, sq=70, sk=40, heads=32),  # and its rows are shared out
    ],
    LOSSES[1]: [PLAIN, PLAIN.with_(b=1, sq=1, sk=1100, np=4), PLAIN.with_(relu=False)],
    ATTENDING[1]: [
        PLAIN,
        PLAIN.with_(np=4, np_k=2, hn=24, v_dim=40),
        PLAIN.with_(b=1, hn=264),  # the walk makes its gradients
    ],
}
QUICK = {SELECTED: "float16", ATTENDING[1]: "float16"}  # which has terms of its own there
CASES = [
    pytest.param(
        path,
        g.with_(dtype=dtype),
        id=f"{path}-{n}-{dtype}",
        marks=[] if dtype == "bfloat16" or (n == 0 and dtype == QUICK.get(path, "float32")) else [pytest.mark.slow],
    )
    for path, shapes in SHAPES.items()
    for n, g in enumerate(shapes)
    for dtype in ITEMSIZE
]


def measured(problem: Problem, path: IndexerPath) -> dict[str, tuple[int, int]]:
    """Return planned and measured bytes of each part of a bill."""
    bill = path.bill(problem, DEVICE)
    if DEVICE.type == "cuda":  # a library's workspace is allocated at its first call, for good
        Call(problem, path, TRAINING if path.trains else FORWARD, DEVICE).run()
    with launches_leave_nothing():
        forward = Call(problem, path, FORWARD, DEVICE).follow()
        parts = {"forward": (bill.forward, forward.peak)}
        if path.trains:
            trained = Call(problem, path, TRAINING, DEVICE).follow()
            parts |= {"training": (bill.training, trained.peak), "held": (bill.held, trained.held)}
    return parts


@pytest.mark.parametrize(("path", "g"), CASES)
def test_planned_bytes_are_measured_bytes(path: str, g: IndexerGeometry) -> None:
    problem, made = Problem(g, causal=True), MAKERS[path](g, DEVICE, impl="triton")
    assert made.backend == "triton"
    parts = measured(problem, made)
    assert {name: (p, m) for name, (p, m) in parts.items() if not LEAST_SHARE * p <= m <= p} == {}


def test_every_tile_of_dk_takes_the_heads_that_a_bill_counts_on() -> None:
    rows = [
        row for row in TABLE if row.kernel in ("key_gradients", "key_sums") and row.dtype not in ("float32", "float64")
    ]
    assert len(rows) >= 8
    for row in rows:
        assert row.rows >= ScoreTile(1, 1, 1, 1, row.d, 4).heads_at_once, row


def test_a_bill_of_an_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend must be one of eager, triton, got 'cuda'"):
        PLAIN.bill(PATHS[2], backend="cuda")
