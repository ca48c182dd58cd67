from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headfold import KeyRange, index_scores


def visible(keys: KeyRange | None, sq: int, sk: int, b: int = 1, **call: object) -> Tensor:
    """What an op lets through, [b, sq, sk]: read off scores of ones."""
    ones = torch.ones(sq, b, 1, 1), None, torch.ones(sk, b, 1)
    return index_scores(*ones, keys=keys, **call).isfinite()  # type: ignore[arg-type]


def rule(sq: int, sk: int, sees: object) -> Tensor:
    return torch.tensor([[sees(s, t) for t in range(sk)] for s in range(sq)], dtype=torch.bool).view(1, sq, sk)  # type: ignore[operator]


@given(st.integers(0, 9), st.integers(0, 9), st.integers(-12, 12), st.integers(1, 4))
def test_the_static_bound_is_floor_division_clamped(sq: int, sk: int, offset: int, ratio: int) -> None:
    expected = rule(sq, sk, lambda s, t: t < (s + 1 + offset) // ratio)
    assert torch.equal(visible(KeyRange(offset=offset, ratio=ratio), sq, sk), expected)


@given(st.integers(0, 8), st.integers(0, 8), st.data())
def test_tensors_bound_each_row_and_may_leave_the_axis(sq: int, sk: int, data: st.DataObject) -> None:
    bounds = st.lists(st.integers(-3, 12), min_size=sq, max_size=sq)
    start, end = data.draw(bounds), data.draw(bounds)
    offset = data.draw(st.none() | st.integers(-5, 5))
    keys = KeyRange(torch.tensor(start, dtype=torch.int32), torch.tensor(end, dtype=torch.int32), offset)
    expected = rule(sq, sk, lambda s, t: start[s] <= t < end[s] and (offset is None or t < s + 1 + offset))
    assert torch.equal(visible(keys, sq, sk), expected)


@pytest.mark.parametrize(("sq", "sk"), [(5, 5), (3, 7), (7, 3)])
def test_causal_aligns_the_last_row_with_the_last_key(sq: int, sk: int) -> None:
    expected = rule(sq, sk, lambda s, t: t <= s + sk - sq)
    assert torch.equal(visible(KeyRange.causal(sq, sk), sq, sk), expected)
    assert torch.equal(visible(None, sq, sk, causal=True), expected)


def test_at_positions_sees_up_to_its_own_position() -> None:
    positions = torch.tensor([4, 0, 9])
    assert torch.equal(visible(KeyRange.at_positions(positions), 3, 8), rule(3, 8, lambda s, t: t <= positions[s]))
    compressed = visible(KeyRange.at_positions(positions, ratio=4), 3, 8)
    assert torch.equal(compressed, rule(3, 8, lambda s, t: t < (positions[s] + 1) // 4))


@pytest.mark.parametrize("offset", [2**31 - 1, 2**31 - 5, -(2**31)])
def test_static_bounds_beside_tensors_do_not_wrap(offset: int) -> None:
    keys = KeyRange(torch.zeros(5, dtype=torch.int32), offset=offset)
    assert visible(keys, 5, 6).all() if offset > 0 else not visible(keys, 5, 6).any()


def test_positions_of_a_narrow_integer_type_do_not_wrap() -> None:
    assert visible(KeyRange.at_positions(torch.tensor([255, 3], dtype=torch.uint8)), 2, 9).sum(-1).tolist() == [[9, 4]]


def test_at_positions_per_batch_element() -> None:
    seen = visible(KeyRange.at_positions(torch.tensor([[0, 1], [2, 3]])), 2, 4, b=2)
    assert seen.sum(-1).tolist() == [[1, 2], [3, 4]]


def test_sliding_keeps_the_latest_keys() -> None:
    assert torch.equal(visible(KeyRange.sliding(4, 6, 3), 4, 6), rule(4, 6, lambda s, t: s + 2 - 3 < t <= s + 2))
    assert not visible(KeyRange.sliding(4, 6, 0), 4, 6).any()


lengths = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=4)


@given(lengths, st.integers(0, 3), st.booleans())
def test_packed_rows_see_their_own_sequence_bottom_right_aligned(
    pairs: list[tuple[int, int]], padding: int, causal: bool
) -> None:
    queries, keys = [q for q, _ in pairs], [k for _, k in pairs]
    cu_q, cu_k = (torch.tensor([0, *x]).cumsum(0) for x in (queries, keys))
    sq, sk = sum(queries) + padding, sum(keys)
    expected = torch.zeros(1, sq, sk, dtype=torch.bool)
    for i, (n, m) in enumerate(pairs):
        block = torch.ones(n, m, dtype=torch.bool)
        rows, columns = slice(int(cu_q[i]), int(cu_q[i + 1])), slice(int(cu_k[i]), int(cu_k[i + 1]))
        expected[0, rows, columns] = block.tril(m - n) if causal else block
    packed = KeyRange.packed(cu_q, cu_k, total_q=sq, causal=causal)
    assert torch.equal(visible(packed, sq, sk), expected)


ranges = st.builds(
    KeyRange,
    st.none() | st.just(torch.tensor([0, 2, 1, 3], dtype=torch.int32)),
    st.none() | st.just(torch.tensor([6, 3, 9, 4], dtype=torch.int32)),
    st.none() | st.integers(-2, 4),
)


@given(ranges, ranges)
def test_and_is_the_intersection(a: KeyRange, b: KeyRange) -> None:
    assert torch.equal(visible(a & b, 4, 6), visible(a, 4, 6) & visible(b, 4, 6))


def test_and_of_two_ratios_needs_a_row_count_and_says_so() -> None:
    a, b = KeyRange(offset=1, ratio=2), KeyRange(offset=8, ratio=4)
    with pytest.raises(ValueError, match="at_positions"):
        a & b
    rows = KeyRange(end=torch.full((5,), 9, dtype=torch.int32))
    both = (a & rows) & b
    assert torch.equal(visible(both, 5, 6), visible(a, 5, 6) & visible(b, 5, 6))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: KeyRange(start=torch.zeros(3)), TypeError, "start must be an int32 tensor, got torch.float32"),
        (
            lambda: KeyRange(end=torch.zeros(3, dtype=torch.int64)),
            TypeError,
            "end must be an int32 tensor, got torch.int64",
        ),
        (lambda: KeyRange(end=[1, 2]), TypeError, "end must be an int32 tensor, got list"),  # type: ignore[arg-type]
        (lambda: KeyRange(end=torch.zeros(1, 2, 3, dtype=torch.int32)), ValueError, r"end must be \[sq\] or \[b, sq\]"),
        (lambda: KeyRange(offset=1.5), TypeError, "offset must be a Python int or None, got float"),  # type: ignore[arg-type]
        (lambda: KeyRange(ratio=True), TypeError, "ratio must be a Python int, got bool"),
        (lambda: KeyRange(ratio=0), ValueError, "ratio must be at least 1, got 0"),
        (lambda: KeyRange.causal(4, 1, ratio=4), ValueError, "offset must be given when ratio is not 1, got ratio 4"),
        (lambda: KeyRange.at_positions(torch.zeros(3)), TypeError, "positions must be integers, got torch.float32"),
        (lambda: KeyRange(offset=2**31), ValueError, "offset must be at most 2147483647, got 2147483648"),
        (lambda: KeyRange.at_positions([1, 2]), TypeError, "positions must be an integer tensor, got list"),  # type: ignore[arg-type]
        (lambda: KeyRange.at_positions(torch.zeros(3).int(), ratio=0), ValueError, "ratio must be at least 1, got 0"),
        (
            lambda: KeyRange.packed(torch.zeros(2).int(), torch.zeros(2).int(), total_q=-2),
            ValueError,
            "total_q must be at least 0, got -2",
        ),
        (
            lambda: KeyRange(torch.zeros(3).int()) & KeyRange(torch.zeros(4).int()),
            ValueError,
            "one number of rows, got 3 and 4",
        ),
        (lambda: KeyRange.sliding(3, 3, -1), ValueError, "window must be at least 0, got -1"),
        (
            lambda: KeyRange.packed(torch.zeros(2), torch.zeros(2), total_q=1),
            TypeError,
            "cu_seqlens_q must be integers, got torch.float32",
        ),
        (
            lambda: KeyRange.packed(torch.tensor([0, 1]), torch.tensor([0, 1, 2]), total_q=1),
            ValueError,
            r"must have one length, got \[2\] and \[3\]",
        ),
    ],
)
def test_errors_name_the_argument_the_need_and_the_value(make: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()  # type: ignore[operator]
