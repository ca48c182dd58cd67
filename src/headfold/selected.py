"""selected_scores: the scores of selected keys alone, for whatever trains on a selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headfold import backends, materialized, ops
from headfold.contract import enough_workspace, indices_for, reverse_mode_only, score_call, wants_grad

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.keyrange import KeyRange


def selected_scores(
    q: Tensor,
    weights: Tensor | None,
    k: Tensor,
    indices: Tensor,
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
    """Score the selected keys of every query row, and nothing else; differentiable once, to q, weights and k.

    What `index_scores` gives at these indices, from topk keys a row instead of sk. An index may stand more than once in
    a row; each time it scores, and each time its gradient counts.

    Args:
        q: [sq, b, h, d] float16, bfloat16, float32 or float64.
        weights: [sq, b, h], cast to the compute dtype; None means ones.
        k: [sk, b, d], as q.
        indices: int32 or int64 [b, sq, topk], as `index_topk` returns them: positions on the key axis, or -1 for none.
            Values are not checked, which would read them on the host: one of sk or more raises an error of torch's on
            a CPU and is undefined on an accelerator. With sk = 0 every entry scores -inf.
        causal: as in `index_scores`; a selected key that its row may not see scores -inf, as -1 does.
        keys: as in `index_scores`.
        bias: as in `index_scores`.
        activation: as in `index_scores`.
        scale: as in `index_scores`.
        layout: as in `index_scores`.
        impl: as in `index_scores`; "materialized" gathers from a whole score matrix.
        workspace: bytes of scratch, 64 MiB when None. The result does not depend on it.

    Returns:
        [b, sq, topk] float32, or float64 for float64 inputs; -inf at -1.

    Memory: 4 · b · sq · topk bytes of output (8 for float64) and at most `workspace` more. Backward allocates the
    gradients asked for, for half-precision inputs one float32 [sk, d] accumulator, and at most `workspace` more.
    Between forward and backward only the inputs are held. dk is added up in a fixed order: bitwise equal across runs.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated; UnsupportedError for
    forward-mode tangents; RuntimeError when differentiated twice.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), equation 1, at the keys of equation 2.
    """
    call = score_call(
        "selected_scores",
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
    indices_for("selected_scores", indices, call.q)
    backend = backends.choose("selected_scores", impl, call.q)
    if backend == "materialized":
        return materialized.selected_scores(call, indices)
    reverse_mode_only("selected_scores", *call.inputs)
    tile = backends.load(backend).gather_tile_of(call.q, call.k, indices, call.relu)
    needed = tile.backward_bytes if wants_grad(*call.inputs) else tile.forward_bytes
    enough_workspace("selected_scores", needed, call.workspace)
    scores: Tensor = ops.selected_scores(*call.inputs, indices, *call.options, backend)
    return scores
