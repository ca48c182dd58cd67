"""Pivots of rows whose scores are not written: what the scores of every thirty-second key say of the others.

Keys are sampled at uneven steps, one of each STRIDE, so that no period of the keys is met by all of them. A sample
decides time and never results: how many keys are above a pivot is counted when all are scored.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.aside import SLACK, pivots_of
from headfold.backends.triton.orders import between, bits_of, ordered, places, scores_of
from headfold.backends.triton.pivots import count_true
from headfold.backends.triton.visible import row_bounds


@triton.jit
def sampled_key(i, STRIDE: tl.constexpr):
    """Return the key of place i of a sample, as int32: multiplicative hashing says which of its STRIDE keys."""
    return i * STRIDE + (((i.to(tl.uint32) * 2654435761) >> 16) % STRIDE).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def sample_kernel(
    out, k, count, out_row, k_row, k_channel,
    D: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Write the sampled keys [count, D] of k [sk, D]."""
    i = tl.program_id(0) * STEP + tl.arange(0, STEP)
    channel = tl.arange(0, WIDTH)
    mask = (i < count)[:, None] & (channel < D)[None, :]
    from_ = k + sampled_key(i, STRIDE).to(tl.int64)[:, None] * k_row + channel.to(tl.int64)[None, :] * k_channel
    tl.store(out + i[:, None] * out_row + channel[None, :], tl.load(from_, mask=mask), mask=mask)


@triton.jit(do_not_specialize=["sk", "topk", "offset", "scores_row"])
def pivots_kernel(
    scores, pivots, count, sk, topk, offset, scores_row,
    RATIO: tl.constexpr, HAS_OFFSET: tl.constexpr, BOTTOM: tl.constexpr, TOP: tl.constexpr, FITTING: tl.constexpr,
    STRIDE: tl.constexpr, DEVIATIONS: tl.constexpr, SAMPLE: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Write of each row what is to be listed of it, and an order that probably at most topk keys are above.

    scores: of its sample, float32 [rows, at most SAMPLE].   FITTING: keys of a row that is listed whole.
    DEVIATIONS: of the sample's count, that the pivots lie from the cut.
    pivots: int32 [rows, 4]. The first is the bits of a float: keys that score above it are listed, up to the key that
    is the third, and from then on those above the float of the second. The fourth is the order.
    count: int32 [rows], less than no keys from now on.
    """
    row = tl.program_id(0)
    rows = row + tl.arange(0, 1)
    _, highs = row_bounds(rows, rows >= 0, sk, None, None, 0, 0, offset, RATIO, HAS_OFFSET)
    n = tl.max(highs, axis=0)
    a, b = tl.full((), BOTTOM, tl.int32), tl.full((), BOTTOM, tl.int32)
    upper, until = tl.full((), TOP, tl.int32), tl.zeros((), tl.int32)
    if n > FITTING:
        i = places(0, SAMPLE // WIDE, WIDE)
        key = sampled_key(i, STRIDE)
        seen = (key < n) & (i < sk // STRIDE)
        x = tl.load(scores + row.to(tl.int64) * scores_row + i, mask=seen, other=float("-inf"))
        of_sample = tl.maximum(count_true(seen), 1)
        share = topk.to(tl.float32) / n.to(tl.float32)
        wanted = of_sample * share
        apart = DEVIATIONS * tl.sqrt(wanted * (1 - share)) + 2
        least = tl.ceil(wanted + apart).to(tl.int32)
        a, b, many, fewer, upper = pivots_of(x, of_sample, wanted, apart, BOTTOM, TOP)
        if (many > least + least // SLACK) & (a > BOTTOM):
            order = ordered(bits_of(x), TOP)
            # The one value b is of many keys: the first of them are enough.
            first, last = tl.zeros((), tl.int32), tl.full((), SAMPLE, tl.int32)
            while first + 1 < last:
                middle = between(first, last)
                enough = fewer + count_true((order == b) & (i < middle)) >= least
                last = tl.where(enough, middle, last)
                first = tl.where(enough, first, middle)
            until = last * STRIDE
        else:
            b = a
    at = pivots + row * 4
    tl.store(at, bits_of(_float(a, TOP)))
    tl.store(at + 1, bits_of(_float(b, TOP)))
    tl.store(at + 2, until)
    tl.store(at + 3, upper)
    tl.store(count + row, -1)


@triton.jit
def _float(order, TOP: tl.constexpr):
    """Return the float of an order, to compare with. None has the order -1, which is -0.0: equal to what is above."""
    return scores_of(tl.where(order == -1, -2, order), TOP)
