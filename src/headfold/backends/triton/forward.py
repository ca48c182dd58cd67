"""The forward kernel: queries resident, keys streamed, heads folded while a tile of logits is in registers."""

import triton
import triton.language as tl

from headfold.backends.triton.products import load_rows, load_tile, number, product, tile_places
from headfold.backends.triton.visible import row_bounds, seen_by_all, seen_by_any


@triton.jit
def tile_scores(
    k1, k2, q1, q2, factor, head, scale,
    RELU: tl.constexpr, H: tl.constexpr, HEADS: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scores [KEYS, ROWS] of a tile of keys."""
    logits = product(k1.to(q1.dtype), q1, tl.zeros((KEYS, ROWS * HEADS), ACC), PRECISION, ACC, UPCAST)
    if SECOND > 0:
        logits = product(k2.to(q1.dtype), q2, logits, PRECISION, ACC, UPCAST)
    if RELU:
        logits = tl.maximum(logits, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HEADS != H:  # a padded head of zeros makes NaN of an infinite key
        logits = tl.where((head < H)[None, :], logits, 0.0)
    return tl.sum(tl.reshape(logits * factor[None, :], (KEYS, ROWS, HEADS)), 2) * number(scale, ACC, UPCAST)


@triton.jit(do_not_specialize=["sq", "sk", "offset", "per_program"])
def score_slab(
    out,
    q,
    weights,
    k,
    start,
    end,
    bias,
    sq,
    sk,
    offset,
    per_program,
    scale: tl.float64,
    out_batch,
    out_row,
    out_key,
    q_batch,
    q_row,
    q_head,
    q_channel,
    weights_batch,
    weights_row,
    weights_head,
    k_batch,
    k_row,
    k_channel,
    start_batch,
    start_row,
    end_batch,
    end_row,
    bias_batch,
    bias_row,
    bias_key,
    RATIO: tl.constexpr,
    HAS_OFFSET: tl.constexpr,
    RELU: tl.constexpr,
    ADD: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    WHOLE: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write scores of ROWS rows of a batch element at per_program keys: every element, -inf where invisible.

    ADD adds to those of other heads, which brought in the bias, instead.

    Logits are [KEYS, ROWS * HEADS]: with keys as the rows of the product, a sum over heads stays within four threads.
    The queries stay in shared memory for all keys of the program.   WHOLE: tiles of keys that
    every row sees are read without asking which keys and rows those are; there is no bias then, and `is_near`.
    UNIFORM: see `seen_by_any`.
    """
    # Under a causal bound the last rows see most keys: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch

    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < sq
    low, high = row_bounds(row, inside, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    first_key = tl.program_id(2) * per_program
    last_key = tl.minimum(first_key + per_program, sk)
    first, last = seen_by_any(
        low, high, block * ROWS, tl.minimum(block * ROWS + ROWS, sq), sk, start, end, offset, RATIO, HAS_OFFSET, UNIFORM
    )
    seen_first = tl.minimum(tl.maximum(first // KEYS * KEYS, first_key), last_key)
    seen_last = tl.minimum(last, last_key)
    after = tl.maximum(seen_first, tl.cdiv(tl.maximum(seen_last, 0), KEYS) * KEYS)

    step = tl.arange(0, KEYS)
    here = out + batch * out_batch + row.to(tl.int64)[None, :] * out_row
    hidden = tl.full((KEYS, ROWS), float("-inf"), ACC)
    for key in range(first_key, seen_first, KEYS):
        t = key + step
        tl.store(here + t.to(tl.int64)[:, None] * out_key, hidden, mask=(t < seen_first)[:, None] & inside[None, :])
    for key in range(after, last_key, KEYS):
        t = key + step
        tl.store(here + t.to(tl.int64)[:, None] * out_key, hidden, mask=(t < last_key)[:, None] & inside[None, :])

    each = tl.arange(0, ROWS * HEADS)
    query_row = (block * ROWS + each // HEADS).to(tl.int64)
    head = each % HEADS
    real = (query_row < sq) & (head < H)
    places = q + batch * q_batch + query_row * q_row + head.to(tl.int64) * q_head
    q1 = tl.trans(load_rows(places, real, q_channel, 0, FIRST, FIRST if SECOND else D))
    if SECOND > 0:
        q2 = tl.trans(load_rows(places, real, q_channel, FIRST, SECOND, D - FIRST))
    if weights is not None:
        factor = tl.load(
            weights + batch * weights_batch + query_row * weights_row + head.to(tl.int64) * weights_head,
            mask=real,
            other=0.0,
        ).to(ACC)
    else:
        factor = real.to(ACC)

    if SECOND == 0:
        q2 = q1
    k += batch * k_batch
    whole_first = seen_first
    whole_last = seen_first
    if WHOLE:
        first, last = seen_by_all(low, high, inside, block * ROWS, sk, start, end, offset, RATIO, HAS_OFFSET, UNIFORM)
        first = tl.cdiv(tl.maximum(first, seen_first), KEYS) * KEYS
        last = tl.minimum(last, seen_last) // KEYS * KEYS
        if first < last:
            whole_first = first
            whole_last = last
        places1 = tile_places(step, k_row, k_channel, 0, FIRST)
        if SECOND > 0:
            places2 = tile_places(step, k_row, k_channel, FIRST, SECOND)
        for key in tl.range(whole_first, whole_last, KEYS, num_stages=STAGES):
            tile = k + tl.cast(key, tl.int64) * k_row
            k1 = load_tile(tile, places1, FIRST, FIRST if SECOND else D)
            k2 = load_tile(tile, places2, SECOND, D - FIRST) if SECOND > 0 else k1
            scores = tile_scores(
                k1, k2, q1, q2, factor, head, scale, RELU, H, HEADS, SECOND, ROWS, KEYS, PRECISION, ACC, UPCAST
            )
            cells = here + (key + step).to(tl.int64)[:, None] * out_key
            if ADD:
                scores += tl.load(cells, mask=inside[None, :], other=0.0)
            tl.store(cells, scores, mask=inside[None, :])

    before = tl.cdiv(whole_first - seen_first, KEYS)
    behind = tl.cdiv(seen_last - whole_last, KEYS)
    for i in tl.range(0, before + behind, num_stages=STAGES):
        key = tl.where(i < before, seen_first + i * KEYS, whole_last + (i - before) * KEYS)
        t = key + step
        there = k + t.to(tl.int64) * k_row
        k1 = load_rows(there, t < sk, k_channel, 0, FIRST, FIRST if SECOND else D)
        k2 = load_rows(there, t < sk, k_channel, FIRST, SECOND, D - FIRST) if SECOND > 0 else k1
        scores = tile_scores(
            k1, k2, q1, q2, factor, head, scale, RELU, H, HEADS, SECOND, ROWS, KEYS, PRECISION, ACC, UPCAST
        )
        seen = (t[:, None] >= low[None, :]) & (t[:, None] < high[None, :])
        if bias is not None:
            column = bias + batch * bias_batch + row.to(tl.int64)[None, :] * bias_row
            added = tl.load(column + t.to(tl.int64)[:, None] * bias_key, mask=seen, other=float("-inf")).to(ACC)
            seen = added != float("-inf")
            if not ADD:
                scores += added
        cells = here + t.to(tl.int64)[:, None] * out_key
        written = (t < last_key)[:, None] & inside[None, :]
        if ADD:
            scores += tl.load(cells, mask=written, other=0.0)
        scores = tl.where(seen, scores, float("-inf"))
        tl.store(cells, scores, mask=written)
