from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headfold import Agreement, SelectionRecord, TopK, index_topk, selection_agreement
from headfold.lanes.measure import allocator_peak
from headfold.lanes.syncfree import no_data_reads
from headfold.tiles import MIB

Rows = list[list[list[int]]]


def by_hand(a: Rows, b: Rows) -> tuple[list[Fraction], list[bool], Fraction, Fraction]:
    """Overlap, equality, and both shares in plain Python sets."""
    pairs = [
        ({t for t in x if t >= 0}, {t for t in y if t >= 0})
        for rows, others in zip(a, b, strict=True)
        for x, y in zip(rows, others, strict=True)
    ]
    shared = [len(x & y) for x, y in pairs]
    held = [len(x) + len(y) for x, y in pairs]
    per_row = [Fraction(2 * s, n) if n else Fraction(1) for s, n in zip(shared, held, strict=True)]
    equal = [x == y for x, y in pairs]
    rows = Fraction(sum(equal), len(equal)) if equal else Fraction(1)
    members = Fraction(2 * sum(shared), sum(held)) if sum(held) else Fraction(1)
    return per_row, equal, rows, members


@st.composite
def selections(draw: st.DrawFn) -> tuple[Rows, Rows, tuple[int, int, int, int]]:
    b, sq = draw(st.integers(0, 3)), draw(st.integers(0, 4))
    widths = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    members = st.integers(-1, 6) | st.sampled_from([-1, 2**31 - 1])
    numbers = (draw(st.lists(members, min_size=b * sq * k, max_size=b * sq * k)) for k in widths)
    a, c = (
        [[[next(drawn) for _ in range(k)] for _ in range(sq)] for _ in range(b)]
        for drawn, k in zip(map(iter, numbers), widths, strict=True)
    )
    return a, c, (b, sq, *widths)


@settings(deadline=None, max_examples=300)
@given(
    selections(), st.sampled_from([torch.int32, torch.int64]), st.sampled_from([torch.int32, torch.int64]), st.data()
)
def test_it_is_what_python_sets_say(
    drawn: tuple[Rows, Rows, tuple[int, int, int, int]], dtype: torch.dtype, other: torch.dtype, data: st.DataObject
) -> None:
    a, c, (b, sq, *widths) = drawn
    x, y = (
        torch.tensor(rows, dtype=kind).view(b, sq, k)
        for rows, kind, k in zip((a, c), (dtype, other), widths, strict=True)
    )
    blocks = data.draw(st.sampled_from([None, 48 * sum(widths), 3 * 48 * sum(widths)]))
    got = selection_agreement(x, y, workspace=blocks)
    per_row, equal, rows, members = by_hand(a, c)
    assert got.per_row.flatten().tolist() == [float(share) for share in per_row]
    assert got.equal.flatten().tolist() == equal
    assert (float(got.rows), float(got.members)) == (float(rows), float(members))
    assert got.per_row.shape == got.equal.shape == (b, sq)
    back = selection_agreement(y, x)
    assert all(torch.equal(one, two) for one, two in zip(got, back, strict=True))


def test_one_member_among_millions_does_not_round_away() -> None:
    a = torch.arange(3_000_000, dtype=torch.int32).view(1, 1000, 3000)
    b = a.clone()
    b[0, 0, 0] = 2**31 - 1
    got = selection_agreement(a, b)
    assert float(got.members) == pytest.approx(1 - 1 / 3e6, abs=1e-12)
    assert float(got.members) < 1
    assert float(got.rows) == 0.999


def test_records_and_results_are_read_like_their_indices() -> None:
    q, weights, k = torch.randn(5, 2, 2, 4), torch.randn(5, 2, 2), torch.randn(9, 2, 4)
    chosen = index_topk(q, weights, k, 3)
    record = SelectionRecord(chosen.indices.flip(-1).long(), 9)
    for a in (chosen, chosen.indices, record):
        got = selection_agreement(a, record)
        assert isinstance(got, Agreement)
        assert got.equal.all()
        assert (float(got.rows), float(got.members)) == (1.0, 1.0)


@pytest.mark.parametrize("workspace", [2 * MIB, 16 * MIB])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_beyond_its_results_it_takes_its_workspace(dtype: torch.dtype, workspace: int) -> None:
    a, b = (torch.stack([torch.randperm(4096) for _ in range(2 * 300)]).view(2, 300, 4096) for _ in range(2))
    a, b = a[..., :2048].to(dtype), b[..., :1500].int()

    def compare() -> Any:
        return selection_agreement(a, b, workspace=workspace)

    compare()
    peak = allocator_peak(compare, torch.device("cpu"))
    assert peak.peak <= workspace + 33 * 600 + 4096
    assert workspace < 4 * a.nbytes  # so that blocks were needed
    whole = selection_agreement(a, b)
    assert all(torch.equal(one, two) for one, two in zip(whole, peak.result, strict=True))


def test_a_row_takes_33_bytes_beside_the_workspace() -> None:
    a = torch.randint(-1, 5, (1, 20_000, 1), dtype=torch.int32)
    selection_agreement(a, a, workspace=9600)
    peak = allocator_peak(lambda: selection_agreement(a, a, workspace=9600), torch.device("cpu"))
    assert peak.peak <= 33 * 20_000 + 9600 + 1024
    assert peak.left <= 9 * 20_000 + 1024


def test_no_data_is_read() -> None:
    a = torch.arange(24, dtype=torch.int32).view(2, 3, 4)
    with no_data_reads():
        selection_agreement(a, a.flip(0))


def test_it_compiles_with_fullgraph() -> None:
    torch._dynamo.reset()
    a = torch.arange(24, dtype=torch.int32).view(2, 3, 4) % 5
    compiled = torch.compile(selection_agreement, fullgraph=True, backend="aot_eager")
    got, wanted = compiled(a, a.flip(0)), selection_agreement(a, a.flip(0))
    assert all(torch.equal(one, two) for one, two in zip(got, wanted, strict=True))


def of(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("a", "b", "more", "error", "said"),
    [
        (of(1, 2, 3), of(1, 3, 3), {}, ValueError, r"b must have a's \[b, sq\] = \[1, 2\], got \[1, 3\]"),
        (of(1, 2, 3), of(2, 2, 3), {}, ValueError, r"got \[2, 2\]"),
        (of(2, 3), of(2, 3), {}, ValueError, r"a must be \[b, sq, topk\], got shape \[2, 3\]"),
        (
            of(1, 2, 3),
            of(1, 2, 3, dtype=torch.int16),
            {},
            TypeError,
            "b must be int32 or int64 indices, .* torch.int16",
        ),
        (of(1, 2, 3), [0], {}, TypeError, "b must be .* got list"),
        (of(1, 2, 3), of(1, 2, 3), {"workspace": 100}, ValueError, "workspace must be at least 288 bytes"),
        (
            SelectionRecord(of(1, 2, 3), 4),
            SelectionRecord(of(1, 2, 3), 5),
            {},
            ValueError,
            "a's 4 keys, got one from 5",
        ),
        (TopK(of(1, 2, 3), None), of(1, 2, 3).to("meta"), {}, ValueError, "b must be on a's device cpu, got meta"),
    ],
)
def test_a_breach_is_one_sentence(a: Any, b: Any, more: dict[str, int], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=f"selection_agreement: .*{said}"):
        selection_agreement(a, b, **more)
