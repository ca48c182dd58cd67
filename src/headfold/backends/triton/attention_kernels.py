"""The kernels of sparse attention. Keys are the long side of their products, heads the other; see `attention`."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.operands import factor, matrix, power_of_two, put, rounded
from headfold.backends.triton.products import product


@triton.jit
def _parts(
    x, rows, live, step, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Load the blocks of channels of some rows: COUNT of SIZE, and one of REST unless that is 0.

    Several narrow blocks, not one wide: a thread then has few rows, whose addresses its registers hold, in each.
    """
    parts = ()
    for i in tl.static_range(COUNT):
        parts = parts + (matrix(x, rows, live, step, i * SIZE, SIZE, WIDTH),)
    if REST > 0:
        parts = parts + (matrix(x, rows, live, step, COUNT * SIZE, REST, WIDTH),)
    return parts


@triton.jit
def _store(x, rows, live, step, parts, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
           UPCAST: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """Store blocks of channels [rows, SIZE], or transposed where TURNED, as `_parts` loads them."""
    for i in tl.static_range(COUNT):
        y = rounded(parts[i], x.dtype.element_ty, UPCAST)
        put(x, rows, live, step, tl.trans(y) if TURNED else y, i * SIZE, SIZE, WIDTH)
    if REST > 0:
        y = rounded(parts[COUNT], x.dtype.element_ty, UPCAST)
        put(x, rows, live, step, tl.trans(y) if TURNED else y, COUNT * SIZE, REST, WIDTH)


@triton.jit
def _zeros(ROWS: tl.constexpr, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, ACC: tl.constexpr,
           TURNED: tl.constexpr):  # fmt: skip
    """Sums for blocks of channels: [ROWS, SIZE] each, or transposed where TURNED."""
    parts = ()
    for _ in tl.static_range(COUNT):
        parts = parts + (tl.zeros((SIZE, ROWS) if TURNED else (ROWS, SIZE), ACC),)
    if REST > 0:
        parts = parts + (tl.zeros((REST, ROWS) if TURNED else (ROWS, REST), ACC),)
    return parts


@triton.jit
def _times(parts, factor, PARTS: tl.constexpr):
    """Every part times a factor that broadcasts to it."""
    scaled = ()
    for i in tl.static_range(PARTS):
        scaled = scaled + (parts[i] * factor,)
    return scaled


@triton.jit
def _products(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """a · bᵀ over their blocks of channels."""
    x = tl.zeros((a[0].shape[0], b[0].shape[0]), ACC)
    for i in tl.static_range(PARTS):
        x = product(a[i], tl.trans(b[i]), x, PRECISION, ACC, UPCAST)
    return x


@triton.jit
def _meet(
    a, x, rows, live, step, SIZE: tl.constexpr, COUNT: tl.constexpr, REST: tl.constexpr, WIDTH: tl.constexpr,
    TURNED: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load blocks of channels of x, and a · xᵀ with them, x · aᵀ where TURNED: block by block, for registers' sake."""
    parts = ()
    if TURNED:
        s = tl.zeros((rows.shape[0], a[0].shape[0]), ACC)
    else:
        s = tl.zeros((a[0].shape[0], rows.shape[0]), ACC)
    for i in tl.static_range(COUNT + (REST > 0)):
        if i < COUNT:
            part = matrix(x, rows, live, step, i * SIZE, SIZE, WIDTH)
        else:
            part = matrix(x, rows, live, step, COUNT * SIZE, REST, WIDTH)
        if TURNED:
            s = product(part, tl.trans(a[i]), s, PRECISION, ACC, UPCAST)
        else:
            s = product(a[i], tl.trans(part), s, PRECISION, ACC, UPCAST)
        parts = parts + (part,)
    return s, parts


@triton.jit
def _onto(
    a,
    x,
    sums,
    PARTS: tl.constexpr,
    TURNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """sums + a [n, m] · x [m, d] by blocks of channels; where TURNED sums + xᵀ · a, with a [m, n]."""
    more = ()
    for i in tl.static_range(PARTS):
        if TURNED:
            more = more + (product(tl.trans(x[i]), a, sums[i], PRECISION, ACC, UPCAST),)
        else:
            more = more + (product(a, x[i], sums[i], PRECISION, ACC, UPCAST),)
    return more


@triton.jit
def _picked(picks, j, topk):
    """Load settled picks: keys int64 and whether they count."""
    key = tl.load(picks + j, mask=j < topk, other=-1)
    live = key >= 0
    return tl.where(live, key, 0).to(tl.int64), live


@triton.jit
def _begin(sink, heads, live, BN: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr):
    """The largest logit [BH] and the terms [BN, BH] of a softmax that holds the sink alone, or nothing."""
    if sink is None:
        return tl.full((BH,), float("-inf"), ACC), tl.zeros((BN, BH), ACC)
    else:
        largest = tl.load(sink + heads, mask=live, other=float("-inf")).to(ACC)
        none = largest == float("-inf")
        base = tl.where(none, 0.0, largest)
        term = tl.where(none, 0.0, tl.exp(base - base))  # NaN where the sink is infinite
        return largest, tl.where((tl.arange(0, BN) == 0)[:, None], term[None, :], 0.0)


@triton.jit
def _step(s, largest):
    """Take logits s [BN, BH] into a softmax: p, what its sums shrink by, and its largest logit."""
    after = tl.maximum(largest, tl.max(s, 0))
    base = tl.where(after == float("-inf"), 0.0, after)
    return tl.exp(s - base[None, :]), tl.exp(largest - base), after


@triton.jit
def attend(
    out, lse, query, key, value, sink, picks,
    first_row, sq, topk, scale,
    out_batch, out_row, out_head, out_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr, REUSE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """out [BH, V] and lse [BH] of one row and some heads of one key head."""
    r = tl.program_id(0).to(tl.int64)
    b, row = (first_row + r) // sq, (first_row + r) % sq
    per_head: tl.constexpr = (GROUP + BH - 1) // BH
    key_head = (tl.program_id(1) // per_head).to(tl.int64)
    within = (tl.program_id(1) % per_head) * BH + tl.arange(0, BH)
    live_heads, heads = within < GROUP, key_head * GROUP + within
    picks += r * topk
    key += b * k_batch + key_head * k_head
    value += b * v_batch + key_head * v_head
    q = _parts(query + b * q_batch + row * q_row, heads * q_head, live_heads, q_step, DS, DN, DR, D)
    times = factor(scale, SCALE, ACC)
    # Terms are added up entry by entry, and over the keys of a block but once, at the end.
    largest, terms = _begin(sink, heads, live_heads, BN, BH, ACC)
    acc = _zeros(BH, VS, VN, VR, ACC, True)
    for j0 in tl.range(0, topk, BN, num_stages=STAGES):
        t, live = _picked(picks, j0 + tl.arange(0, BN), topk)
        k = _parts(key, t * k_key, live, k_step, DS, DN, DR, D)
        s = _products(k, q, DP, PRECISION, ACC, UPCAST) * times
        p, shrink, largest = _step(tl.where(live[:, None], s, float("-inf")), largest)
        terms = terms * shrink[None, :] + p
        p = rounded(p, key.dtype.element_ty, UPCAST)
        if REUSE:
            v = k
        else:
            v = _parts(value, t * v_key, live, v_step, VS, VN, VR, V)
        acc = _onto(p, v, _times(acc, shrink[None, :], VP), VP, True, PRECISION, ACC, UPCAST)
    total = tl.sum(terms, 0)
    # Not whether it is above zero: NaN has to stay.
    share = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))[None, :]
    out += b * out_batch + row * out_row
    acc = _times(acc, share, VP)
    _store(out, heads * out_head, live_heads, out_step, acc, VS, VN, VR, V, UPCAST, True)
    if lse is not None:
        logs = tl.where(total == 0, float("-inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))
        tl.store(lse + (b * H + heads) * sq + row, logs, mask=live_heads)


@triton.jit
def row_gradients(
    dq, top, share, mean, reach, g, query, key, value, sink, picks,
    first_row, sq, topk, scale,
    dq_batch, dq_row, dq_head, dq_step, g_batch, g_row, g_head, g_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr, REUSE: tl.constexpr,
    BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """top, share, mean and reach [rows, H] of one row and some heads of one key head, and their dq unless it is None.

    top, share: p = exp(logit - top) · share.   mean: Σ p · dp, where dp = g · v.   reach: the largest |dp|, which keeps
    float16 products in their range.
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
    q = _parts(query + b * q_batch + row * q_row, heads * q_head, live_heads, q_step, DS, DN, DR, D)
    dout = _parts(g + b * g_batch + row * g_row, heads * g_head, live_heads, g_step, VS, VN, VR, V)
    times = factor(scale, SCALE, ACC)
    largest, terms = _begin(sink, heads, live_heads, BN, BH, ACC)
    middles = tl.zeros((BN, BH), ACC)
    far = tl.zeros((BH,), tl.float32)
    for j0 in tl.range(0, topk, BN, num_stages=STAGES):
        t, live = _picked(picks, j0 + tl.arange(0, BN), topk)
        k = _parts(key, t * k_key, live, k_step, DS, DN, DR, D)
        if REUSE:
            v = k
        else:
            v = _parts(value, t * v_key, live, v_step, VS, VN, VR, V)
        s = _products(k, q, DP, PRECISION, ACC, UPCAST) * times
        dp = _products(v, dout, VP, PRECISION, ACC, UPCAST)
        p, shrink, largest = _step(tl.where(live[:, None], s, float("-inf")), largest)
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
        acc = _zeros(BH, DS, DN, DR, ACC, True)
        for j0 in tl.range(0, topk, BN, num_stages=STAGES):
            t, live = _picked(picks, j0 + tl.arange(0, BN), topk)
            k = _parts(key, t * k_key, live, k_step, DS, DN, DR, D)
            if REUSE:
                v = k
            else:
                v = _parts(value, t * v_key, live, v_step, VS, VN, VR, V)
            s = _products(k, q, DP, PRECISION, ACC, UPCAST) * times
            p = tl.exp(tl.where(live[:, None], s, float("-inf")) - base[None, :]) * part[None, :]
            ds = _products(v, dout, VP, PRECISION, ACC, UPCAST) - middle[None, :]
            if RANGED:
                ds = ds / by
            ds = rounded(tl.where(live[:, None], p * ds, 0.0), key.dtype.element_ty, UPCAST)
            acc = _onto(ds, k, acc, DP, True, PRECISION, ACC, UPCAST)
        if RANGED:
            acc = _times(acc, by, DP)
        dq += b * dq_batch + row * dq_row
        acc = _times(acc, times, DP)
        _store(dq, heads * dq_head, live_heads, dq_step, acc, DS, DN, DR, D, UPCAST, True)


@triton.jit
def spread_gradients(
    dkeys, dvalues, top, share, mean, reach, g, query, key, value, picks,
    first_row, first_pick, last_pick, sq, topk, span, group, scale,
    g_batch, g_row, g_head, g_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr, REUSE: tl.constexpr,
    MERGED: tl.constexpr, TURNED: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Gradients of some settled picks of one row and one key head, through its keys and its values.

    MERGED: whether values are channels of the keys, and their gradients are added to those; else dvalues holds them.
    TURNED: whether heads, not keys, are the long side of the logits, and channels that of the gradients.
    """
    r = tl.program_id(0).to(tl.int64)
    b, row = (first_row + r) // sq, (first_row + r) % sq
    key_head = tl.program_id(2).to(tl.int64)
    j = first_pick + tl.program_id(1) * BN + tl.arange(0, BN)
    t, live = _picked(picks + r * topk, j, last_pick)
    key += b * k_batch + key_head * k_head
    value += b * v_batch + key_head * v_head
    query += b * q_batch + row * q_row
    g += b * g_batch + row * g_row
    k = _parts(key, t * k_key, live, k_step, DS, DN, DR, D)
    if REUSE:
        v = k
    else:
        v = _parts(value, t * v_key, live, v_step, VS, VN, VR, V)
    times = factor(scale, SCALE, ACC)
    by = tl.full((), 1.0, tl.float32)
    if RANGED:
        far = tl.zeros((BH,), tl.float32)
        for h0 in range(0, GROUP, BH):
            within = h0 + tl.arange(0, BH)
            far = tl.maximum(far, tl.load(reach + r * H + key_head * GROUP + within, mask=within < GROUP, other=0.0))
        by = power_of_two(tl.max(far, 0))
    x, y = _zeros(BN, DS, DN, DR, ACC, TURNED), _zeros(BN, VS, VN, VR, ACC, TURNED)
    # Up to a number that the compiler does not know: it would unroll the loop, and spill.
    for h0 in tl.range(0, group, BH, num_stages=STAGES):
        within = h0 + tl.arange(0, BH)
        live_heads, heads = within < GROUP, key_head * GROUP + within
        s, q = _meet(k, query, heads * q_head, live_heads, q_step, DS, DN, DR, D, TURNED, PRECISION, ACC, UPCAST)
        dp, dout = _meet(v, g, heads * g_head, live_heads, g_step, VS, VN, VR, V, TURNED, PRECISION, ACC, UPCAST)
        base = tl.load(top + r * H + heads, mask=live_heads, other=0.0)
        part = tl.load(share + r * H + heads, mask=live_heads, other=0.0)
        middle = tl.load(mean + r * H + heads, mask=live_heads, other=0.0)
        if TURNED:
            counts, middle = live_heads[:, None] & live[None, :], middle[:, None]
            base, part = base[:, None], part[:, None]
        else:
            counts, middle = live[:, None] & live_heads[None, :], middle[None, :]
            base, part = base[None, :], part[None, :]
        p = tl.exp(tl.where(counts, s * times, float("-inf")) - base) * part
        if dkeys is not None:
            ds = dp - middle
            if RANGED:
                ds = ds / by
            ds = rounded(tl.where(counts, p * ds * times, 0.0), key.dtype.element_ty, UPCAST)
            x = _onto(ds, q, x, DP, TURNED, PRECISION, ACC, UPCAST)
        p = rounded(p, key.dtype.element_ty, UPCAST)
        if MERGED and REUSE:
            # Values are the first blocks of the keys' channels: so are their gradients.
            x = _onto(p, dout, x, VP, TURNED, PRECISION, ACC, UPCAST) + x[VP:]
        elif MERGED:
            wide = _parts(g, heads * g_head, live_heads, g_step, DS, DN, DR, V)
            x = _onto(p, wide, x, DP, TURNED, PRECISION, ACC, UPCAST)
        elif dvalues is not None:
            y = _onto(p, dout, y, VP, TURNED, PRECISION, ACC, UPCAST)
    rows = (r * tl.num_programs(2) + key_head) * span + (j - first_pick)
    if RANGED:
        x = _times(x, by, DP)
    if dkeys is not None:
        _store(dkeys, rows * D, live, 1, x, DS, DN, DR, D, UPCAST, TURNED)
    if dvalues is not None:
        _store(dvalues, rows * V, live, 1, y, VS, VN, VR, V, UPCAST, TURNED)


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
