"""The kernels of selected_scores. Keys are the long side of their products, heads the other; see `gathered`."""

from __future__ import annotations

import triton
import triton.language as tl

from headfold.backends.triton.operands import factor, halves, matrix, meet, power_of_two, put, rounded
from headfold.backends.triton.picks import picked
from headfold.backends.triton.products import product
from headfold.backends.triton.visible import row_bounds


@triton.jit
def _weights(w, heads, live, step, ACC: tl.constexpr):
    """Weights of some heads in the compute dtype: ones when w is None, zeros beyond the heads."""
    if w is None:
        return tl.where(live, 1.0, 0.0).to(ACC)
    else:
        return tl.load(w + heads * step, mask=live, other=0.0).to(ACC)


@triton.jit
def _queries(
    q, heads, live, head_step, step,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """Queries [BH, D0] and [BH, D1] of some heads; the first again where there is no second block of channels."""
    q0 = matrix(q, heads * head_step, live, step, 0, D0, D)
    if D1 > 0:
        return q0, matrix(q, heads * head_step, live, step, D0, D1, D)
    else:
        return q0, q0


@triton.jit
def _logits(k0, k1, q0, q1, D1: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr):
    """Logits [BN, BH] of keys against the queries of some heads."""
    s = product(k0, tl.trans(q0), tl.zeros((k0.shape[0], q0.shape[0]), ACC), PRECISION, ACC, UPCAST)
    if D1 > 0:
        s = product(k1, tl.trans(q1), s, PRECISION, ACC, UPCAST)
    return s


@triton.jit
def _folded(
    q, w, head_step, step, weight_step,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BH: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Σ_h weights · q, [D0] and [D1]: all that a row needs without an activation."""
    f0 = tl.zeros((D0,), ACC)
    f1 = tl.zeros((D1 if D1 > 0 else D0,), ACC)
    for h0 in range(0, H, BH):
        head = h0 + tl.arange(0, BH)
        heads, live = head.to(tl.int64), head < H
        factors = _weights(w, heads, live, weight_step, ACC)[:, None]
        q0, q1 = _queries(q, heads, live, head_step, step, D, D0, D1)
        f0 += tl.sum(q0.to(ACC) * factors, 0)
        if D1 > 0:
            f1 += tl.sum(q1.to(ACC) * factors, 0)
    return f0, f1


@triton.jit
def score_picks(
    out, q, w, k, indices, start, end, bias,
    sk, topk, offset, scale,
    q_batch, q_row, q_head, q_step, w_batch, w_row, w_head, k_batch, k_key, k_step,
    i_batch, i_row, i_step, start_batch, start_step, end_batch, end_step, bias_batch, bias_row, bias_step,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    BLOCKS: tl.constexpr, STAGES: tl.constexpr, RELU: tl.constexpr, RATIO: tl.constexpr, STATIC: tl.constexpr,
    SIZE: tl.constexpr, STREAM: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Scores of one row at BLOCKS blocks of its picks.

    STREAM: whether channels of queries and keys pass SIZE at a time, and are not held.
    """
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.program_id(1) * (BLOCKS * BN)
    q += b * q_batch + row * q_row
    k += b * k_batch
    indices += b * i_batch + row * i_row
    out += (b * tl.num_programs(0) + row) * topk
    if w is not None:
        w += b * w_batch + row * w_row
    if start is not None:
        start += b * start_batch
    if end is not None:
        end += b * end_batch
    if bias is not None:
        bias += b * bias_batch + row * bias_row
    lo, hi = row_bounds(row, tl.full((), 1, tl.int1), sk, start, end, start_step, end_step, offset, RATIO, STATIC)
    times = factor(scale, SCALE, ACC)
    within = tl.arange(0, BH)
    heads, live_heads = within.to(tl.int64), within < H
    if RELU:
        if not STREAM:
            q0, q1 = _queries(q, heads, live_heads, q_head, q_step, D, D0, D1)
            factors = _weights(w, heads, live_heads, w_head, ACC)
    else:
        f0, f1 = _folded(q, w, q_head, q_step, w_head, H, D, D0, D1, BH, ACC)
    for j0 in tl.range(first, tl.minimum(first + BLOCKS * BN, topk), BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        t, live, added = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
        if not (RELU and STREAM):
            k0 = matrix(k, t * k_key, live, k_step, 0, D0, D)
            if D1 > 0:
                k1 = matrix(k, t * k_key, live, k_step, D0, D1, D)
            else:
                k1 = k0
        if RELU and STREAM:
            scores = tl.zeros((BN,), ACC)
            for h0 in range(0, H, BH):
                more = (h0 + within).to(tl.int64)
                live_more = h0 + within < H
                s = meet(
                    k, t * k_key, live, k_step, q, more * q_head, live_more, q_step,
                    D, SIZE, BN, BH, STAGES, PRECISION, ACC, UPCAST,
                )  # fmt: skip
                s = tl.where(s < 0, 0.0, s) * _weights(w, more, live_more, w_head, ACC)[None, :]
                scores += tl.sum(tl.where(live_more[None, :], s, 0.0), 1)
        elif RELU:
            s = _logits(k0, k1, q0, q1, D1, PRECISION, ACC, UPCAST)
            # NaN is not below zero, and a padded head has no part even in a key that is infinite.
            s = tl.where(s < 0, 0.0, s) * factors[None, :]
            if H < BH:
                s = tl.where(live_heads[None, :], s, 0.0)
            scores = tl.sum(s, 1)
            for h0 in range(BH, H, BH):
                more = (h0 + within).to(tl.int64)
                live_more = h0 + within < H
                p0, p1 = _queries(q, more, live_more, q_head, q_step, D, D0, D1)
                s = _logits(k0, k1, p0, p1, D1, PRECISION, ACC, UPCAST)
                s = tl.where(s < 0, 0.0, s) * _weights(w, more, live_more, w_head, ACC)[None, :]
                scores += tl.sum(tl.where(live_more[None, :], s, 0.0), 1)
        else:
            scores = tl.sum(k0.to(ACC) * f0[None, :], 1)
            if D1 > 0:
                scores += tl.sum(k1.to(ACC) * f1[None, :], 1)
        scores = scores * times
        if bias is not None:
            scores += added.to(ACC)
        tl.store(out + j, tl.where(live, scores, float("-inf")), mask=j < topk)


@triton.jit
def query_gradients_of_picks(
    dq, dw, g, q, w, k, indices, start, end, bias,
    sk, topk, offset, scale,
    dq_batch, dq_row, dq_head, dq_step, dw_batch, dw_row, dw_head, g_batch, g_row, g_step,
    q_batch, q_row, q_head, q_step, w_batch, w_row, w_head, k_batch, k_key, k_step,
    i_batch, i_row, i_step, start_batch, start_step, end_batch, end_step, bias_batch, bias_row, bias_step,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, RELU: tl.constexpr, RATIO: tl.constexpr, STATIC: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """dq and dweights (either may be None) of one row and a block of its heads, over all of its picks.

    u = Σ_t g · [logit > 0] · k, transposed so that channels are the long side; dq = weights · u. Without an activation
    u is one for all heads, and dweights = q · u.
    """
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    q += b * q_batch + row * q_row
    k += b * k_batch
    g += b * g_batch + row * g_row
    indices += b * i_batch + row * i_row
    if w is not None:
        w += b * w_batch + row * w_row
    if start is not None:
        start += b * start_batch
    if end is not None:
        end += b * end_batch
    if bias is not None:
        bias += b * bias_batch + row * bias_row
    lo, hi = row_bounds(row, tl.full((), 1, tl.int1), sk, start, end, start_step, end_step, offset, RATIO, STATIC)
    times = factor(scale, SCALE, ACC)
    head = tl.program_id(1) * BH + tl.arange(0, BH)
    heads, live_heads = head.to(tl.int64), head < H
    q0, q1 = _queries(q, heads, live_heads, q_head, q_step, D, D0, D1)
    largest = tl.full((), 1.0, tl.float32)
    if RANGED and RELU:
        top = tl.zeros((BN,), tl.float32)
        for j0 in range(0, topk, BN):
            j = j0 + tl.arange(0, BN)
            _, live, _ = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
            top = tl.maximum(top, tl.abs(tl.load(g + j.to(tl.int64) * g_step, mask=live, other=0.0).to(ACC) * times))
        largest = power_of_two(tl.max(top, 0))
    if RELU:
        u0 = tl.zeros((D0, BH), ACC)
        u1 = tl.zeros((D1 if D1 > 0 else 16, BH), ACC)
        terms = tl.zeros((BN, BH), ACC)
    else:
        u0 = tl.zeros((BN, D0), ACC)
        u1 = tl.zeros((BN, D1 if D1 > 0 else 16), ACC)
    for j0 in tl.range(0, topk, BN, num_stages=STAGES):
        j = j0 + tl.arange(0, BN)
        t, live, _ = picked(indices, j, topk, i_step, lo, hi, bias, bias_step)
        incoming = tl.load(g + j.to(tl.int64) * g_step, mask=live, other=0.0).to(ACC) * times
        k0 = matrix(k, t * k_key, live, k_step, 0, D0, D)
        if D1 > 0:
            k1 = matrix(k, t * k_key, live, k_step, D0, D1, D)
        else:
            k1 = k0
        if RELU:
            s = _logits(k0, k1, q0, q1, D1, PRECISION, ACC, UPCAST)
            # NaN is not at or below zero: it passes, and makes u NaN.
            barred = s <= 0
            if dw is not None:
                terms += tl.where(barred, 0.0, s) * incoming[:, None]
            if dq is not None:
                if RANGED:
                    incoming = incoming / largest
                # Where equal picks cancel, a single rounding would be all that is left of them.
                high, low = halves(incoming, k0.dtype, UPCAST)
                a = tl.where(barred, 0.0, high[:, None]).to(k0.dtype)
                u0 = product(tl.trans(k0), a, u0, PRECISION, ACC, UPCAST)
                if D1 > 0:
                    u1 = product(tl.trans(k1), a, u1, PRECISION, ACC, UPCAST)
                if k0.dtype.primitive_bitwidth == 16:
                    a = tl.where(barred, 0.0, low[:, None]).to(k0.dtype)
                    u0 = product(tl.trans(k0), a, u0, PRECISION, ACC, UPCAST)
                    if D1 > 0:
                        u1 = product(tl.trans(k1), a, u1, PRECISION, ACC, UPCAST)
        else:
            u0 += incoming[:, None] * k0.to(ACC)
            if D1 > 0:
                u1 += incoming[:, None] * k1.to(ACC)
    factors = _weights(w, heads, live_heads, w_head, ACC)
    if RELU:
        u0, u1 = tl.trans(u0), tl.trans(u1)
        if RANGED:
            u0, u1 = u0 * largest, u1 * largest
    else:
        u0, u1 = tl.sum(u0, 0)[None, :], tl.sum(u1, 0)[None, :]
    if dw is not None:
        dw += b * dw_batch + row * dw_row
        if RELU:
            total = tl.sum(terms, 0)
        else:
            total = tl.sum(q0.to(ACC) * u0, 1)
            if D1 > 0:
                total += tl.sum(q1.to(ACC) * u1, 1)
        tl.store(dw + heads * dw_head, rounded(total, dw.dtype.element_ty, UPCAST), mask=live_heads)
    if dq is not None:
        dq += b * dq_batch + row * dq_row
        x0 = rounded(u0 * factors[:, None], dq.dtype.element_ty, UPCAST)
        put(dq, heads * dq_head, live_heads, dq_step, x0, 0, D0, D)
        if D1 > 0:
            x1 = rounded(u1 * factors[:, None], dq.dtype.element_ty, UPCAST)
            put(dq, heads * dq_head, live_heads, dq_step, x1, D0, D1, D)


@triton.jit
def spread_key_gradients(
    spread, picks, sums, largest, q, w, k,
    first_row, first_pick, last_pick, topk, span,
    q_row, q_head, q_step, w_row, w_head, k_key, k_step,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr,
    STAGES: tl.constexpr, RELU: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys of some settled picks of one row: Σ_h sums · weights · [logit > 0] · q."""
    r = tl.program_id(0).to(tl.int64)
    row = first_row + r
    q += row * q_row
    if w is not None:
        w += row * w_row
    j = first_pick + tl.program_id(1) * BN + tl.arange(0, BN)
    key = tl.load(picks + r * topk + j, mask=j < last_pick, other=-1)
    live = key >= 0
    t = tl.where(live, key, 0).to(tl.int64)
    incoming = tl.load(sums + r * topk + j, mask=j < last_pick, other=0.0)
    places = (r * span + (j - first_pick)) * D
    if RELU:
        k0 = matrix(k, t * k_key, live, k_step, 0, D0, D)
        if D1 > 0:
            k1 = matrix(k, t * k_key, live, k_step, D0, D1, D)
        else:
            k1 = k0
        beyond = tl.full((), 1.0, tl.float32)
        if RANGED:
            by = power_of_two(tl.load(largest + r))
            incoming = incoming / by
            heaviest = tl.zeros((BH,), ACC)
            for h0 in range(0, H, BH):
                head = h0 + tl.arange(0, BH)
                heaviest = tl.maximum(heaviest, tl.abs(_weights(w, head.to(tl.int64), head < H, w_head, ACC)))
            beyond = power_of_two(tl.max(heaviest, 0))
        x0 = tl.zeros((BN, D0), ACC)
        x1 = tl.zeros((BN, D1 if D1 > 0 else 16), ACC)
        for h0 in tl.range(0, H, BH, num_stages=STAGES):
            head = h0 + tl.arange(0, BH)
            heads, live_heads = head.to(tl.int64), head < H
            q0, q1 = _queries(q, heads, live_heads, q_head, q_step, D, D0, D1)
            factors = _weights(w, heads, live_heads, w_head, ACC)
            if RANGED:
                factors = factors / beyond
            s = _logits(k0, k1, q0, q1, D1, PRECISION, ACC, UPCAST)
            a = rounded(tl.where(s <= 0, 0.0, incoming[:, None] * factors[None, :]), q0.dtype, UPCAST)
            x0 = product(a, q0, x0, PRECISION, ACC, UPCAST)
            if D1 > 0:
                x1 = product(a, q1, x1, PRECISION, ACC, UPCAST)
        if RANGED:
            x0, x1 = x0 * by * beyond, x1 * by * beyond
    else:
        f0, f1 = _folded(q, w, q_head, q_step, w_head, H, D, D0, D1, BH, ACC)
        x0 = incoming[:, None] * f0[None, :]
        x1 = incoming[:, None] * f1[None, :]
    put(spread, places, live, 1, x0, 0, D0, D)
    if D1 > 0:
        put(spread, places, live, 1, x1, D0, D1, D)
