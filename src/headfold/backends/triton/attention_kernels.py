"""The forward kernel of sparse attention. Keys are the long side of its products, heads the other; see `attention`."""

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
from headfold.backends.triton.operands import factor, meet, rounded


@triton.jit
def attend(
    out, lse, query, key, value, sink, picks,
    first_row, sq, topk, scale,
    out_batch, out_row, out_head, out_step, q_batch, q_row, q_head, q_step,
    k_batch, k_key, k_head, k_step, v_batch, v_key, v_head, v_step,
    H: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, DS: tl.constexpr, DN: tl.constexpr, DR: tl.constexpr, DP: tl.constexpr,
    V: tl.constexpr, VS: tl.constexpr, VN: tl.constexpr, VR: tl.constexpr, VP: tl.constexpr, REUSE: tl.constexpr,
    SIZE: tl.constexpr, STREAM: tl.constexpr, BH: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    SCALE: tl.constexpr, ACC: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, RANGED: tl.constexpr,
):  # fmt: skip
    """out [BH, V] and lse [BH] of one row and some heads of one key head.

    STREAM: whether channels of queries and keys pass SIZE at a time on their way to the logits, and are not held.
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
    if not STREAM:
        q = channels(query, heads * q_head, live_heads, q_step, DS, DN, DR, D)
    times = factor(scale, SCALE, ACC)
    # Terms are added up entry by entry, and over the keys of a block but once, at the end.
    largest, terms = begin(sink, heads, live_heads, BN, BH, ACC)
    acc = zeros(BH, VS, VN, VR, ACC, True)
    for j0 in tl.range(0, topk, BN, num_stages=STAGES):
        t, live = settled(picks, j0 + tl.arange(0, BN), topk)
        if STREAM:
            s = meet(
                key, t * k_key, live, k_step, query, heads * q_head, live_heads, q_step,
                D, SIZE, BN, BH, STAGES, PRECISION, ACC, UPCAST,
            )  # fmt: skip
        else:
            k = channels(key, t * k_key, live, k_step, DS, DN, DR, D)
            s = products(k, q, DP, PRECISION, ACC, UPCAST)
        s = s * times
        p, shrink, largest = advance(tl.where(live[:, None], s, float("-inf")), largest)
        terms = terms * shrink[None, :] + p
        p = rounded(p, key.dtype.element_ty, UPCAST)
        if REUSE and not STREAM:
            v = k
        else:
            v = channels(value, t * v_key, live, v_step, VS, VN, VR, V)
        acc = onto(p, v, scaled(acc, shrink[None, :], VP), VP, True, PRECISION, ACC, UPCAST)
    total = tl.sum(terms, 0)
    # Not whether it is above zero: NaN has to stay.
    share = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))[None, :]
    out += b * out_batch + row * out_row
    acc = scaled(acc, share, VP)
    store(out, heads * out_head, live_heads, out_step, acc, VS, VN, VR, V, UPCAST, True)
    if lse is not None:
        logs = tl.where(total == 0, float("-inf"), largest + tl.log(tl.where(total == 0, 1.0, total)))
        tl.store(lse + (b * H + heads) * sq + row, logs, mask=live_heads)
