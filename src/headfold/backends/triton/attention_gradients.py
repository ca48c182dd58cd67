"""The gradient kernels of sparse attention: of a row's queries, of a row's picks, and of keys that stay.

Keys are the long side of all products, heads the other; see `attention_backward`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.attention_parts import (
    advance,
    begin,
    channels,
    onto,
    products,
    scaled,
    settled,
    store,
    zeros,
)
from headfold.backends.triton.operands import factor, meet, power_of_two, rounded, some_channels
from headfold.backends.triton.products import never_empty, product


@triton.jit
def _stream(
    key, keys, k_step, value, values, v_step, live, query, queries, q_step, g, outs, g_step, live_heads,
    D: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, SHARED: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """key · queryᵀ and value · gᵀ, [BN, BH] each, of rows at offsets, SIZE channels at a time."""
    s, dp = tl.zeros((BN, BH), ACC), tl.zeros((BN, BH), ACC)
    # Channels that keys and values may share; from there on keys alone.
    both: tl.constexpr = (V + SIZE - 1) // SIZE * SIZE if SHARED else 0
    for c in tl.range(0, both, SIZE, num_stages=STAGES):
        k = some_channels(key, keys, live, k_step, c, SIZE, D)
        q = some_channels(query, queries, live_heads, q_step, c, SIZE, D)
        dout = some_channels(g, outs, live_heads, g_step, c, SIZE, V)
        s = product(k, tl.trans(q), s, PRECISION, ACC, UPCAST)
        dp = product(k, tl.trans(dout), dp, PRECISION, ACC, UPCAST)
    for c in tl.range(both, D, SIZE, num_stages=STAGES):
        k = some_channels(key, keys, live, k_step, c, SIZE, D)
        q = some_channels(query, queries, live_heads, q_step, c, SIZE, D)
        s = product(k, tl.trans(q), s, PRECISION, ACC, UPCAST)
    if not SHARED:
        dp = meet(
            value, values, live, v_step, g, outs, live_heads, g_step,
            V, SIZE, BN, BH, STAGES, PRECISION, ACC, UPCAST,
        )  # fmt: skip
    return s, dp


@triton.jit
def row_gradients(
    dq, top, share, mean, reach, g, query, key, value, sink, picks,
    first_row, sq, topk, scale,
    dq_batch, dq_row, dq_head, dq_step, g_batch, g_row, g_head, g_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr, REUSE: tl.constexpr,
    SIZE: tl.constexpr, SHARED: tl.constexpr, STREAM: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """top, share, mean and reach [rows, H] of one row and some heads of one key head, and their dq unless it is None.

    top, share: p = exp(logit - top) · share.   mean: Σ p · dp, where dp = g · v.   reach: the largest |dp|, which keeps
    float16 products in their range.   STREAM: whether channels pass SIZE at a time, and are not held.
    """
    r = tl.program_id(0).to(tl.int64)
    b, row = (first_row + r) // sq, (first_row + r) % sq
    per_head: tl.constexpr = (GROUP + BH - 1) // BH
    key_head = (tl.program_id(1) // per_head).to(tl.int64)
    within = (tl.program_id(1) % per_head) * BH + tl.arange(0, BH)
    live_heads, heads = within < GROUP, key_head * GROUP + within
    picks += r * topk
    key += b * k_batch + key_head * k_head
    value += b * v_batch + key_head * v_head
    query += b * q_batch + row * q_row
    g += b * g_batch + row * g_row
    queries, outs = heads * q_head, heads * g_head
    if not STREAM:
        q = channels(query, queries, live_heads, q_step, DS, DN, DR, D)
        dout = channels(g, outs, live_heads, g_step, VS, VN, VR, V)
    times = factor(scale, SCALE, ACC)
    largest, terms = begin(sink, heads, live_heads, BN, BH, ACC)
    middles = tl.zeros((BN, BH), ACC)
    far = tl.zeros((BH,), tl.float32)
    for j0 in tl.range(0, topk, BN, num_stages=STAGES):
        t, live = settled(picks, j0 + tl.arange(0, BN), topk)
        if STREAM:
            s, dp = _stream(
                key, t * k_key, k_step, value, t * v_key, v_step, live, query, queries, q_step, g, outs, g_step,
                live_heads, D, V, SIZE, SHARED, BN, BH, STAGES, PRECISION, ACC, UPCAST,
            )  # fmt: skip
        else:
            k = channels(key, t * k_key, live, k_step, DS, DN, DR, D)
            if REUSE:
                v = k
            else:
                v = channels(value, t * v_key, live, v_step, VS, VN, VR, V)
            s = products(k, q, DP, PRECISION, ACC, UPCAST)
            dp = products(v, dout, VP, PRECISION, ACC, UPCAST)
        p, shrink, largest = advance(tl.where(live[:, None], s * times, float("-inf")), largest)
        terms = terms * shrink[None, :] + p
        middles = middles * shrink[None, :] + tl.where(live[:, None], p * dp, 0.0)
        if RANGED:
            far = tl.maximum(far, tl.max(tl.where(live[:, None], tl.abs(dp), 0.0), 0))
    total = tl.sum(terms, 0)
    # Not one log-sum-exp: where logits are large its rounding would be seen in every probability.
    base = tl.where(largest == float("-inf"), 0.0, largest)
    part = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    tl.store(top + r * H + heads, base, mask=live_heads)
    tl.store(share + r * H + heads, part, mask=live_heads)
    middle = tl.sum(middles, 0) * part
    tl.store(mean + r * H + heads, middle, mask=live_heads)
    if RANGED:
        tl.store(reach + r * H + heads, far, mask=live_heads)
    if dq is not None:
        by = power_of_two(far)[None, :]
        acc = zeros(BH, DS, DN, DR, ACC, True)
        for j0 in tl.range(0, topk, BN, num_stages=STAGES):
            t, live = settled(picks, j0 + tl.arange(0, BN), topk)
            if STREAM:
                s, dp = _stream(
                    key, t * k_key, k_step, value, t * v_key, v_step, live, query, queries, q_step, g, outs, g_step,
                    live_heads, D, V, SIZE, SHARED, BN, BH, STAGES, PRECISION, ACC, UPCAST,
                )  # fmt: skip
            else:
                k = channels(key, t * k_key, live, k_step, DS, DN, DR, D)
                if REUSE:
                    v = k
                else:
                    v = channels(value, t * v_key, live, v_step, VS, VN, VR, V)
                s = products(k, q, DP, PRECISION, ACC, UPCAST)
            p = tl.exp(tl.where(live[:, None], s * times, float("-inf")) - base[None, :]) * part[None, :]
            if not STREAM:
                dp = products(v, dout, VP, PRECISION, ACC, UPCAST)
            ds = dp - middle[None, :]
            if RANGED:
                ds = ds / by
            ds = rounded(tl.where(live[:, None], p * ds, 0.0), key.dtype.element_ty, UPCAST)
            if STREAM:
                k = channels(key, t * k_key, live, k_step, DS, DN, DR, D)
            acc = onto(ds, k, acc, DP, True, PRECISION, ACC, UPCAST)
        if RANGED:
            acc = scaled(acc, by, DP)
        dq += b * dq_batch + row * dq_row
        acc = scaled(acc, times, DP)
        store(dq, heads * dq_head, live_heads, dq_step, acc, DS, DN, DR, D, UPCAST, True)


@triton.jit
def _below(rows, x, limit):
    """x < limit, for every row."""
    return tl.zeros(rows.shape, tl.int32) + x < limit


@triton.jit
def _write(x, sums, rows, live, first, again, SIZE: tl.constexpr, WIDTH: tl.constexpr, AGAIN: tl.constexpr):
    """Write sums [rows, SIZE] as channels from `first` on of rows of x; add them where that happens again."""
    c = first + tl.arange(0, SIZE)
    at = x + (rows * WIDTH)[:, None] + c[None, :]
    mask = live[:, None] & (c < WIDTH)[None, :]
    if AGAIN:
        sums += tl.load(at, mask=mask & again, other=0.0)
    tl.store(at, sums, mask=mask)


@triton.jit
def spread_gradients(
    dkeys, dvalues, top, share, mean, reach, g, query, key, value, picks,
    first_row, first_pick, last_pick, sq, topk, span, group, scale,
    g_batch, g_row, g_head, g_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr,
    SHARED: tl.constexpr, MERGED: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Gradients of some settled picks of one row and one key head, through its keys and its values.

    Channels stream twice, SIZE at a time, so that registers do not depend on a width: into the logits and dp, then,
    with the p and ds of all heads of a block at hand, out of them.   SHARED: values are the first V channels of the
    keys.   MERGED: their gradients are added to those; else dvalues holds them.   dkeys, dvalues: None where not asked.
    """
    r = tl.program_id(0).to(tl.int64)
    b, row = (first_row + r) // sq, (first_row + r) % sq
    key_head = tl.program_id(2).to(tl.int64)
    j = first_pick + tl.program_id(1) * BN + tl.arange(0, BN)
    t, live = settled(picks + r * topk, j, last_pick)
    rows = (r * tl.num_programs(2) + key_head) * span + (j - first_pick)
    keys = t * k_key
    key += b * k_batch + key_head * k_head
    value += b * v_batch + key_head * v_head
    query += b * q_batch + row * q_row + key_head * GROUP * q_head
    g += b * g_batch + row * g_row + key_head * GROUP * g_head
    held = r * H + key_head * GROUP
    times = factor(scale, SCALE, ACC)
    by = tl.full((), 1.0, tl.float32)
    if RANGED:
        far = tl.zeros((BH,), tl.float32)
        for h0 in range(0, GROUP, BH):
            within = h0 + tl.arange(0, BH)
            far = tl.maximum(far, tl.load(reach + held + within, mask=within < GROUP, other=0.0))
        by = power_of_two(tl.max(far, 0))
    # Up to a number that the compiler does not know: it would unroll the loop, and spill.
    for h0 in tl.range(0, group, BH, num_stages=1):
        within = h0 + tl.arange(0, BH)
        heads, live_heads = within.to(tl.int64), within < GROUP
        queries, outs = heads * q_head, heads * g_head
        s, dp = _stream(
            key, keys, k_step, value, t * v_key, v_step, live, query, queries, q_step, g, outs, g_step, live_heads,
            D, V, SIZE, SHARED, BN, BH, STAGES, PRECISION, ACC, UPCAST,
        )  # fmt: skip
        base = tl.load(top + held + within, mask=live_heads, other=0.0)
        part = tl.load(share + held + within, mask=live_heads, other=0.0)
        middle = tl.load(mean + held + within, mask=live_heads, other=0.0)
        counts = live[:, None] & live_heads[None, :]
        p = tl.exp(tl.where(counts, s * times, float("-inf")) - base[None, :]) * part[None, :]
        ds = dp - middle[None, :]
        if RANGED:
            ds = ds / by
        ds = rounded(tl.where(counts, p * ds * times, 0.0), key.dtype.element_ty, UPCAST)
        p = rounded(p, key.dtype.element_ty, UPCAST)
        again = h0 > 0
        if GROUP > BH:
            # Another thread may have written what this one adds to.
            tl.debug_barrier()
        if dkeys is not None:
            for c in tl.range(0, D, SIZE, num_stages=STAGES):
                q = some_channels(query, queries, live_heads, q_step, c, SIZE, D)
                x = product(ds, q, tl.zeros((BN, SIZE), ACC), PRECISION, ACC, UPCAST)
                if RANGED:
                    x = x * by
                if MERGED:
                    dout = some_channels(g, outs, live_heads & _below(heads, c, V), g_step, c, SIZE, V)
                    x = product(p, dout, x, PRECISION, ACC, UPCAST)
                _write(dkeys, x, rows, live, c, again, SIZE, D, GROUP > BH)
        if dvalues is not None:
            for c in tl.range(0, V, SIZE, num_stages=STAGES):
                dout = some_channels(g, outs, live_heads, g_step, c, SIZE, V)
                y = product(p, dout, tl.zeros((BN, SIZE), ACC), PRECISION, ACC, UPCAST)
                _write(dvalues, y, rows, live, c, again, SIZE, V, GROUP > BH)


@triton.jit
def _marked(bitmap, rows, inside, t, word, words, BN: tl.constexpr):
    """Whether rows [BM] picked keys t [BN], which begin with those of a word of the bitmap: [BN, BM]."""
    bits = tl.zeros((BN, rows.shape[0]), tl.int32)
    for n in tl.static_range(BN // 32):
        some = tl.load(bitmap + rows * words + word + n, mask=inside & _below(rows, word + n, words), other=0)
        here = (tl.arange(0, BN) // 32 == n)[:, None]
        bits = tl.where(here, some[None, :], bits)
    return ((bits >> (t & 31)[:, None]) & 1) != 0


@triton.jit
def masked_gradients(
    total, top, share, mean, bitmap, g, query, key, value,
    first_row, count, sq, sk, words, scale,
    total_head, total_key, g_batch, g_row, g_head, g_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr,
    VALUES: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SCAN: tl.constexpr,
    STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Add to some keys of total [np_k, sk, width] what a block of rows, of one batch element, gives them.

    Keys stay, and all rows from the first to the last that picked one of them stream by: the bitmap of settled picks
    says which count.   VALUES: whether total is of the values, Σ p · g; else of the keys, Σ ds · query.   BM: rows x
    HEADS of a step.
    """
    b, key_head = (first_row // sq).to(tl.int64), tl.program_id(1).to(tl.int64)
    word = tl.program_id(0) * (BN // 32)
    t = tl.program_id(0) * BN + tl.arange(0, BN)
    keys, live = t.to(tl.int64), t < sk
    key += b * k_batch + key_head * k_head
    query += b * q_batch + (first_row % sq).to(tl.int64) * q_row + key_head * GROUP * q_head
    g += b * g_batch + (first_row % sq).to(tl.int64) * g_row + key_head * GROUP * g_head
    first, last = count * 1, count * 0
    for r0 in range(0, count, SCAN):
        r = r0 + tl.arange(0, SCAN)
        any_bit = tl.zeros((SCAN,), tl.int32)
        for n in tl.static_range(BN // 32):
            any_bit |= tl.load(
                bitmap + r.to(tl.int64) * words + word + n, mask=(r < count) & _below(r, word + n, words), other=0
            )
        first = tl.minimum(first, tl.min(tl.where(any_bit != 0, r, count), 0))
        last = tl.maximum(last, tl.max(tl.where(any_bit != 0, r + 1, 0), 0))
    k = channels(key, keys * k_key, live, k_step, DS, DN, DR, D)
    if not VALUES:
        v = channels(value + b * v_batch + key_head * v_head, keys * v_key, live, v_step, VS, VN, VR, V)
    times = factor(scale, SCALE, ACC)
    each = tl.arange(0, BM)
    blocks_of_heads: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    step: tl.constexpr = BM // HEADS
    if VALUES:
        acc = zeros(BN, VS, VN, VR, ACC, False)
    else:
        acc = zeros(BN, DS, DN, DR, ACC, False)
    begin_at = first // step * blocks_of_heads
    end_at = never_empty(begin_at, tl.cdiv(last, step) * blocks_of_heads)
    for n in tl.range(begin_at, end_at, num_stages=STAGES):
        rows = (n // blocks_of_heads * step + each // HEADS).to(tl.int64)
        within = (n % blocks_of_heads) * HEADS + each % HEADS
        inside = (rows < last) & (within < GROUP)
        heads = within.to(tl.int64)
        q = channels(query, rows * q_row + heads * q_head, inside, q_step, DS, DN, DR, D)
        dout = channels(g, rows * g_row + heads * g_head, inside, g_step, VS, VN, VR, V)
        held = rows * H + key_head * GROUP + heads
        base = tl.load(top + held, mask=inside, other=0.0)
        part = tl.load(share + held, mask=inside, other=0.0)
        counts = _marked(bitmap, rows, inside, t, word, words, BN)
        s = products(k, q, DP, PRECISION, ACC, UPCAST) * times
        a = tl.exp(tl.where(counts, s, float("-inf")) - base[None, :]) * part[None, :]
        if VALUES:
            acc = _add(a, dout, acc, VP, PRECISION, ACC, UPCAST, RANGED)
        else:
            middle = tl.load(mean + held, mask=inside, other=0.0)
            dp = products(v, dout, VP, PRECISION, ACC, UPCAST)
            a = tl.where(counts, a * (dp - middle[None, :]) * times, 0.0)
            acc = _add(a, q, acc, DP, PRECISION, ACC, UPCAST, RANGED)
    total += key_head * total_head
    if VALUES:
        _add_to(total, keys * total_key, live, acc, VS, VN, VR, V)
    else:
        _add_to(total, keys * total_key, live, acc, DS, DN, DR, D)


@triton.jit
def _add(
    a,
    x,
    sums,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
    RANGED: tl.constexpr,
):
    """Add a · x to sums by blocks of channels. float16 has no range for rows of all sizes: TF32 has, and its digits."""
    more = ()
    for i in tl.static_range(PARTS):
        if RANGED:
            more = more + (product(a, x[i].to(ACC), sums[i], "tf32", ACC, UPCAST),)
        else:
            more = more + (product(rounded(a, x[i].dtype, UPCAST), x[i], sums[i], PRECISION, ACC, UPCAST),)
    return more


@triton.jit
def _add_to(x, rows, live, parts, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr):
    """Add blocks of channels to those of the rows of x, dense in its last axis, as `channels` loads them."""
    before = channels(x, rows, live, 1, SIZE, COUNT, REST, WIDTH)
    sums = ()
    for i in tl.static_range(COUNT + (REST > 0)):
        sums = sums + (before[i] + parts[i],)
    store(x, rows, live, 1, sums, SIZE, COUNT, REST, WIDTH, False, False)


@triton.jit
def sink_gradients(dsink, top, share, mean, sink, rows, H: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):
    """Add to dsink [H] what a block of rows holds of it: -Σ p · mean, p the sink's own probability."""
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    logit = tl.load(sink + head, mask=head < H, other=0.0).to(dsink.dtype.element_ty)
    sums = tl.zeros((ROWS, HEADS), dsink.dtype.element_ty)
    for r0 in range(0, rows, ROWS):
        r = r0 + tl.arange(0, ROWS)
        at = r.to(tl.int64)[:, None] * H + head[None, :]
        mask = (r < rows)[:, None] & (head < H)[None, :]
        base = tl.load(top + at, mask=mask, other=0.0)
        part, middle = tl.load(share + at, mask=mask, other=0.0), tl.load(mean + at, mask=mask, other=0.0)
        sums -= tl.where(mask, tl.exp(logit[None, :] - base) * part * middle, 0.0)
    total = tl.load(dsink + head, mask=head < H, other=0.0) + tl.sum(sums, 0)
    tl.store(dsink + head, total, mask=head < H)
