"""index_scores: the score path, folded over heads while a tile is hot."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headfold import backends, materialized, ops
from headfold.contract import enough_workspace, reverse_mode_only, score_call, wants_grad

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.keyrange import KeyRange


def index_scores(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    *,
    causal: bool = False,
    keys: KeyRange | None = None,
    bias: Tensor | None = None,
    activation: str | None = "relu",
    scale: float = 1.0,
    layout: str = "sbhd",
    impl: str = "auto",
    workspace: int | None = None,
) -> Tensor:
    """Score every visible key for every query row: scale · Σ_h weights · relu(q · k), differentiable once.

    Args:
        q: [sq, b, h, d] float16, bfloat16, float32 or float64, any strides (other layouts: see `layout`).
        weights: [sq, b, h], any floating dtype, cast to the compute dtype; None means ones.
        k: [sk, b, d], q's dtype: one key head that all query heads share.
        causal: row s sees t <= s + sk - sq (bottom-right aligned). Excludes `keys`.
        keys: a KeyRange of visible keys per row.
        bias: [b or 1, sq, sk], added to the scores; -inf makes a key invisible. Never differentiated.
        activation: "relu", or None for a plain weighted sum, whose heads fold before the product (h times cheaper).
        scale: factor on every score.
        layout: "sbhd"; "bshd" (q [b, sq, h, d], weights [b, sq, h], k [b, sk, d]); or "thd", packed (q [tq, h, d],
            weights [tq, h], k [tk, d]; needs `keys`).
        impl: "eager" (PyTorch tiles), "triton" (GPU kernels), "materialized" (the upstream-style path through
            [sq, b, h, sk], an oracle) or "auto": the kernels for a CUDA or ROCm tensor that they take, else the tiles.
        workspace: bytes of scratch, 64 MiB when None. The result does not depend on it, not even in its last bit.

    Returns:
        [b, sq, sk] float32, or float64 for float64 inputs; -inf at keys that a row may not see.

    Memory: 4 · b · sq · sk bytes of output (8 for float64) and at most `workspace` more. Backward allocates the
    gradients asked for, for half-precision inputs one float32 [sk, d] accumulator, and at most `workspace` more.
    Nothing head-shaped is held between forward and backward: only the inputs.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated, naming the argument, what it
    needs and what it got; UnsupportedError for forward-mode tangents, or an impl that cannot run the call;
    RuntimeError when differentiated twice.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), equation 1.
    """
    call = score_call(
        "index_scores",
        q,
        weights,
        k,
        causal=causal,
        keys=keys,
        bias=bias,
        activation=activation,
        scale=scale,
        layout=layout,
        workspace=workspace,
    )
    backend = backends.choose("index_scores", impl, call.q)
    if backend == "materialized":
        return materialized.index_scores(call)
    reverse_mode_only("index_scores", *call.inputs)
    tile = backends.load(backend).tile_of(call.q, call.k, call.relu)
    needed = tile.backward_bytes if wants_grad(*call.inputs) else tile.forward_bytes
    enough_workspace("index_scores", needed, call.workspace)
    scores: Tensor = ops.index_scores(*call.inputs, *call.options, backend)
    return scores
