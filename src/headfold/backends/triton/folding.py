"""Heads folded before a product, which is all there is to do without an activation, and folded back behind it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["sq"])
def fold_heads(
    out,
    q,
    weights,
    sq,
    out_batch,
    out_row,
    q_batch,
    q_row,
    q_head,
    q_channel,
    weights_batch,
    weights_row,
    weights_head,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write Σ_h weights · q [ROWS, D] in ACC."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < sq
    channel = tl.arange(0, WIDTH).to(tl.int64)
    mask = inside[:, None] & (channel < D)[None, :]
    places = q + batch * q_batch + row[:, None] * q_row + channel[None, :] * q_channel
    total = tl.zeros((ROWS, WIDTH), ACC)
    for head in range(H):
        x = tl.load(places + head * q_head, mask=mask, other=0.0).to(ACC)
        if weights is not None:
            there = weights + batch * weights_batch + row * weights_row + head * weights_head
            x *= tl.load(there, mask=inside, other=0.0).to(ACC)[:, None]
        total += x
    tl.store(out + batch * out_batch + row[:, None] * out_row + channel[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["sq"])
def unfold_heads(
    dq,
    dweights,
    u,
    q,
    weights,
    sq,
    dq_batch,
    dq_row,
    dq_head,
    dq_channel,
    dweights_batch,
    dweights_row,
    dweights_head,
    u_batch,
    u_row,
    q_batch,
    q_row,
    q_head,
    q_channel,
    weights_batch,
    weights_row,
    weights_head,
    H: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    ACC: tl.constexpr,
):
    """Write dq = weights · u and dweights = q · u of every head, given u [rows, D]; either may be None."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    inside = row < sq
    channel = tl.arange(0, WIDTH).to(tl.int64)
    mask = inside[:, None] & (channel < D)[None, :]
    shared = tl.load(u + batch * u_batch + row[:, None] * u_row + channel[None, :], mask=mask, other=0.0)
    for head in range(H):
        if dweights is not None:
            there = q + batch * q_batch + row[:, None] * q_row + head * q_head + channel[None, :] * q_channel
            total = tl.sum(tl.load(there, mask=mask, other=0.0).to(ACC) * shared, 1)
            there = dweights + batch * dweights_batch + row * dweights_row + head * dweights_head
            tl.store(there, total, mask=inside)
        if dq is not None:
            x = shared
            if weights is not None:
                there = weights + batch * weights_batch + row * weights_row + head * weights_head
                x = x * tl.load(there, mask=inside, other=0.0).to(ACC)[:, None]
            there = dq + batch * dq_batch + row[:, None] * dq_row + head * dq_head + channel[None, :] * dq_channel
            tl.store(there, x, mask=mask)
