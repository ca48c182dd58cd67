"""The backward kernels: one with queries resident, for dq and dweights, and one with keys resident, for dk.

With a = g · [logit > 0] and u = Σ_t a · k: dq = scale · weights · u, dweights = scale · Σ_t a · logit, and
dk = scale · Σ a · weights · q. Each result has a single writer, and its sum one order. dweights is summed beside the
products, in the accumulator's dtype: it also equals q · u, but of a that was rounded to the inputs' dtype.
"""

import triton
import triton.language as tl

from headfold.backends.triton.products import (
    add_product,
    load_rows,
    load_tile,
    never_empty,
    number,
    product,
    tile_places,
)
from headfold.backends.triton.visible import row_bounds, seen_by_any


@triton.jit
def _gated(g, seen, bias, bias_key, t, g_key):
    """Load a tile of g; zeros, whatever it held, where the row may not see the key."""
    if bias is not None:
        seen = seen & (tl.load(bias + t * bias_key, mask=seen, other=float("-inf")) != float("-inf"))
    return tl.load(g + t * g_key, mask=seen, other=0.0)


@triton.jit(do_not_specialize=["sq", "sk", "offset"])
def query_gradients(
    dq,
    dweights,
    g,
    q,
    weights,
    k,
    start,
    end,
    bias,
    sq,
    sk,
    offset,
    scale: tl.float64,
    dq_batch,
    dq_row,
    dq_head,
    dq_channel,
    dweights_batch,
    dweights_row,
    dweights_head,
    g_batch,
    g_row,
    g_key,
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
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STAGES: tl.constexpr,
    EVEN: tl.constexpr,
    UNIFORM: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write dq and dweights of ROWS rows (either may be None). Queries stay, keys and g stream by.

    Without RELU there is one head, a is g, and no logits are made: dq is then Σ_t g · k alone.
    WIDE multiplies a in the accumulator's dtype: float16 has no range for gradients.   EVEN: every tile of
    keys is full, and `is_near`.   UNIFORM: see `seen_by_any`.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    row = block * ROWS + tl.arange(0, ROWS)
    inside = row < sq
    low, high = row_bounds(row, inside, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
    first_key, last_key = seen_by_any(
        low, high, block * ROWS, tl.minimum(block * ROWS + ROWS, sq), sk, start, end, offset, RATIO, HAS_OFFSET, UNIFORM
    )
    # Where no row sees a key the first keys are read for nothing, and whatever they held is dropped behind the loop.
    some = first_key < last_key
    first_key = tl.where(some, first_key // KEYS * KEYS, 0)
    last_key = never_empty(first_key, tl.where(some, last_key, 0))

    each = tl.arange(0, ROWS * HEADS)
    query_row = (block * ROWS + each // HEADS).to(tl.int64)
    head = (each % HEADS).to(tl.int64)
    real = (query_row < sq) & (head < H)
    if RELU:
        places = q + batch * q_batch + query_row * q_row + head * q_head
        q1 = load_rows(places, real, q_channel, 0, FIRST, FIRST if SECOND else D)
        if SECOND > 0:
            q2 = load_rows(places, real, q_channel, FIRST, SECOND, D - FIRST)
    if dq is not None:
        u1 = tl.zeros((ROWS * HEADS, FIRST), ACC)
        if SECOND > 0:
            u2 = tl.zeros((ROWS * HEADS, SECOND), ACC)
    if dweights is not None:
        totals = tl.zeros((ROWS, HEADS), ACC)

    incoming = g + batch * g_batch + row.to(tl.int64)[:, None] * g_row
    if bias is not None:
        bias += batch * bias_batch + row.to(tl.int64)[:, None] * bias_row
    step = tl.arange(0, KEYS)
    k += batch * k_batch
    if EVEN:
        places1 = tile_places(step, k_row, k_channel, 0, FIRST)
        if SECOND > 0:
            places2 = tile_places(step, k_row, k_channel, FIRST, SECOND)
    for key in tl.range(first_key, last_key, KEYS, num_stages=STAGES):
        t = key + step
        if EVEN:
            tile = k + tl.cast(key, tl.int64) * k_row
            k1 = load_tile(tile, places1, FIRST, FIRST if SECOND else D)
            if SECOND > 0:
                k2 = load_tile(tile, places2, SECOND, D - FIRST)
        else:
            there = k + t.to(tl.int64) * k_row
            k1 = load_rows(there, t < sk, k_channel, 0, FIRST, FIRST if SECOND else D)
            if SECOND > 0:
                k2 = load_rows(there, t < sk, k_channel, FIRST, SECOND, D - FIRST)
        seen = (t[None, :] >= low[:, None]) & (t[None, :] < high[:, None])
        if RELU:
            logits = product(q1, tl.trans(k1), tl.zeros((ROWS * HEADS, KEYS), ACC), PRECISION, ACC, UPCAST)
            if SECOND > 0:
                logits = product(q2, tl.trans(k2), logits, PRECISION, ACC, UPCAST)
        # Behind the product, g takes no registers while that runs.
        a = _gated(incoming, seen, bias, bias_key, t.to(tl.int64)[None, :], g_key).to(ACC)[:, None, :]
        if RELU:
            logits = tl.reshape(logits, (ROWS, HEADS, KEYS))
            a = tl.where(logits <= 0, 0.0, a)
            if dweights is not None:
                totals += tl.sum(a * logits, 2)
        if dq is not None:
            a = tl.reshape(a, (ROWS * HEADS, KEYS))
            if WIDE:
                k1 = k1.to(ACC)
                if SECOND > 0:
                    k2 = k2.to(ACC)
            a = a.to(k1.dtype)
            u1 = add_product(a, k1, u1, key < last_key, PRECISION, ACC, UPCAST)
            if SECOND > 0:
                u2 = add_product(a, k2, u2, key < last_key, PRECISION, ACC, UPCAST)

    if dweights is not None:
        totals = tl.where(some, totals, 0.0)
        row_of = row.to(tl.int64)[:, None]
        head_of = tl.arange(0, HEADS)[None, :]
        places = dweights + batch * dweights_batch + row_of * dweights_row + head_of.to(tl.int64) * dweights_head
        tl.store(places, totals * number(scale, ACC, UPCAST), mask=inside[:, None] & (head_of < H))
    if dq is not None:
        u1 = tl.where(some, u1, 0.0)
        if SECOND > 0:
            u2 = tl.where(some, u2, 0.0)
        if weights is not None:
            places = weights + batch * weights_batch + query_row * weights_row + head * weights_head
            factor = tl.load(places, mask=real, other=0.0).to(ACC) * number(scale, ACC, UPCAST)
        else:
            factor = real.to(ACC) * number(scale, ACC, UPCAST)
        places = dq + batch * dq_batch + query_row * dq_row + head * dq_head
        channel = tl.arange(0, FIRST).to(tl.int64)
        mask = real[:, None] & (channel < D)[None, :]
        tl.store(places[:, None] + channel[None, :] * dq_channel, u1 * factor[:, None], mask=mask)
        if SECOND > 0:
            channel = (FIRST + tl.arange(0, SECOND)).to(tl.int64)
            mask = real[:, None] & (channel < D)[None, :]
            tl.store(places[:, None] + channel[None, :] * dq_channel, u2 * factor[:, None], mask=mask)


@triton.jit
def _key_sums(
    g, broken, q, weights, k1, k2, t, start, end, bias, first_row, last_row, sk, offset, batch, q_batch, q_row,
    q_head, q_channel, g_batch, g_row, g_key, weights_batch, weights_row, weights_head, start_row, end_row,
    bias_batch, bias_row, bias_key,
    RATIO: tl.constexpr, HAS_OFFSET: tl.constexpr, RELU: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    HEADS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Sums [KEYS, FIRST] and [KEYS, SECOND] over rows [first_row, last_row) of a · weights · q."""
    sum1 = tl.zeros((KEYS, FIRST), ACC)
    sum2 = tl.zeros((KEYS, SECOND if SECOND > 0 else 16), ACC)
    each = tl.arange(0, ROWS * HEADS)
    head = (each % HEADS).to(tl.int64)
    step = tl.arange(0, ROWS)
    key_of = t.to(tl.int64)[:, None]
    behind = never_empty(first_row, last_row)
    for first in tl.range(first_row, behind, ROWS, num_stages=STAGES):
        row = first + step
        inside = row < last_row
        query_row = (first + each // HEADS).to(tl.int64)
        there = (query_row < last_row) & (head < H)
        real = there
        if broken is not None:
            whole = tl.load(broken + row, mask=inside, other=0) == 0
            real = there & (tl.load(broken + query_row, mask=there, other=0) == 0)
        places = q + batch * q_batch + query_row * q_row + head * q_head
        q1 = load_rows(places, real, q_channel, 0, FIRST, FIRST if SECOND else D)
        if SECOND > 0:
            q2 = load_rows(places, real, q_channel, FIRST, SECOND, D - FIRST)
        low, high = row_bounds(row, inside, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
        seen = (t[:, None] >= low[None, :]) & (t[:, None] < high[None, :])
        incoming = g + batch * g_batch + row.to(tl.int64)[None, :] * g_row
        if bias is not None:
            added = bias + batch * bias_batch + row.to(tl.int64)[None, :] * bias_row
            a = _gated(incoming, seen, added, bias_key, key_of, g_key)
        else:
            a = _gated(incoming, seen, None, bias_key, key_of, g_key)
        a = a.to(ACC)[:, :, None]
        if RELU:
            logits = product(k1, tl.trans(q1), tl.zeros((KEYS, ROWS * HEADS), ACC), PRECISION, ACC, UPCAST)
            if SECOND > 0:
                logits = product(k2, tl.trans(q2), logits, PRECISION, ACC, UPCAST)
            barred = tl.reshape(logits, (KEYS, ROWS, HEADS)) <= 0
            if broken is not None:
                barred = barred & whole[None, :, None]
            a = tl.where(barred, 0.0, a)
        a = tl.reshape(a, (KEYS, ROWS * HEADS))
        if weights is not None:
            factors = weights + batch * weights_batch + query_row * weights_row + head * weights_head
            # Read of all that are there: a mask that was itself read cuts what a loop copies ahead into single
            # elements, and of two bytes Triton 3.5 cannot copy one.
            factor = tl.load(factors, mask=there, other=0.0).to(ACC)
            a = a * (factor if broken is None else tl.where(real, factor, 0.0))[None, :]
        if WIDE:
            q1 = q1.to(ACC)
            if SECOND > 0:
                q2 = q2.to(ACC)
        a = a.to(q1.dtype)
        sum1 = add_product(a, q1, sum1, first < behind, PRECISION, ACC, UPCAST)
        if SECOND > 0:
            sum2 = add_product(a, q2, sum2, first < behind, PRECISION, ACC, UPCAST)
    return sum1, sum2


@triton.jit(do_not_specialize=["sq", "sk", "offset"])
def key_gradients(
    dk,
    g,
    broken,
    q,
    weights,
    k,
    start,
    end,
    bias,
    sq,
    sk,
    offset,
    scale: tl.float64,
    dk_part,
    dk_batch,
    dk_row,
    dk_channel,
    g_batch,
    g_row,
    g_key,
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
    SCAN: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write or ADD dk of KEYS keys, from one of the parts of the rows. Keys stay, queries and g stream by.

    Without RELU there is one head and a is g.   broken: None, or of a batch of one int32 [1 + sq]: whether any row is,
    and which. Its queries are taken for zeros and its a for g: a key gets NaN of it where g is NaN, and 0 elsewhere.
    """
    # Under a causal bound most rows see the first keys: those of every batch element and part start first.
    batches, parts = tl.num_programs(1), tl.num_programs(2)
    program = (tl.program_id(2) * batches + tl.program_id(1)).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    batch = program % batches
    part = program // batches % parts
    if start is not None:
        start += batch * start_batch
    if end is not None:
        end += batch * end_batch
    first_of = (program // (batches * parts)).to(tl.int32) * KEYS
    t = first_of + tl.arange(0, KEYS)
    there = k + batch * k_batch + t.to(tl.int64) * k_row
    if RELU:
        k1 = load_rows(there, t < sk, k_channel, 0, FIRST, FIRST if SECOND else D)
        if SECOND > 0:
            k2 = load_rows(there, t < sk, k_channel, FIRST, SECOND, D - FIRST)

    # Rows before the first and after the last that sees one of these keys are not visited.
    first_row = sq * 0
    last_row = sq * 1
    if HAS_OFFSET:
        first_row = tl.minimum(tl.maximum((first_of.to(tl.int64) + 1) * RATIO - 1 - offset, 0), sq).to(tl.int32)
    if start is not None or end is not None:
        before = sq * 1
        behind = sq * 0
        for scanned in range(first_row // SCAN * SCAN, last_row, SCAN):
            some = scanned + tl.arange(0, SCAN)
            begin, stop = row_bounds(some, some < sq, sk, start, end, start_row, end_row, offset, RATIO, HAS_OFFSET)
            sees = (begin < stop) & (begin < first_of + KEYS) & (stop > first_of)
            before = tl.minimum(before, tl.min(tl.where(sees, some, sq), 0))
            behind = tl.maximum(behind, tl.max(tl.where(sees, some + 1, 0), 0))
        first_row = before
        last_row = behind
    first_block = first_row // ROWS
    per_part = tl.cdiv(tl.maximum(tl.cdiv(last_row, ROWS) - first_block, 0), parts)
    first_block += part.to(tl.int32) * per_part
    last_row = tl.minimum(last_row, (first_block + per_part) * ROWS)

    if not RELU:
        k1 = 0
        k2 = 0
    elif SECOND == 0:
        k2 = k1
    if broken is None or tl.load(broken) == 0:
        sum1, sum2 = _key_sums(
            g, None, q, weights, k1, k2, t, start, end, bias, first_block * ROWS, last_row, sk, offset, batch,
            q_batch, q_row, q_head, q_channel, g_batch, g_row, g_key, weights_batch, weights_row, weights_head,
            start_row, end_row, bias_batch, bias_row, bias_key,
            RATIO, HAS_OFFSET, RELU, H, D, HEADS, FIRST, SECOND, ROWS, KEYS, STAGES, PRECISION, WIDE, ACC, UPCAST,
        )  # fmt: skip
    else:
        sum1, sum2 = _key_sums(
            g, broken + 1, q, weights, k1, k2, t, start, end, bias, first_block * ROWS, last_row, sk, offset, batch,
            q_batch, q_row, q_head, q_channel, g_batch, g_row, g_key, weights_batch, weights_row, weights_head,
            start_row, end_row, bias_batch, bias_row, bias_key,
            RATIO, HAS_OFFSET, RELU, H, D, HEADS, FIRST, SECOND, ROWS, KEYS, STAGES, PRECISION, WIDE, ACC, UPCAST,
        )  # fmt: skip

    key_of = t.to(tl.int64)[:, None]
    dk += part * dk_part + batch * dk_batch
    channel = tl.arange(0, FIRST).to(tl.int64)
    places = dk + key_of * dk_row + channel[None, :] * dk_channel
    mask = (t < sk)[:, None] & (channel < D)[None, :]
    sum1 = sum1 * number(scale, ACC, UPCAST)
    if ADD:
        sum1 += tl.load(places, mask=mask, other=0.0).to(ACC)
    tl.store(places, sum1, mask=mask)
    if SECOND > 0:
        channel = (FIRST + tl.arange(0, SECOND)).to(tl.int64)
        places = dk + key_of * dk_row + channel[None, :] * dk_channel
        mask = (t < sk)[:, None] & (channel < D)[None, :]
        sum2 = sum2 * number(scale, ACC, UPCAST)
        if ADD:
            sum2 += tl.load(places, mask=mask, other=0.0).to(ACC)
        tl.store(places, sum2, mask=mask)
