"""sparse_attention: attention over the keys that an index selected, and over nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from headfold import backends, materialized_attention, ops
from headfold.attention_tiles import gathers
from headfold.contract import attention_call, enough_workspace, reverse_mode_only, wants_grad
from headfold.layout import from_batch_first

if TYPE_CHECKING:
    from torch import Tensor

    from headfold.contract import AttentionCall
    from headfold.keyrange import KeyRange


class Attention(NamedTuple):
    """Attention's result in its query's layout, and the log-sum-exp [b, np, sq] of each row's logits."""

    out: Tensor
    lse: Tensor


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    indices: Tensor,
    *,
    softmax_scale: float,
    v_dim: int | None = None,
    sink: Tensor | None = None,
    causal: bool = False,
    keys: KeyRange | None = None,
    layout: str = "sbhd",
    return_lse: bool = False,
    workspace: int | None = None,
    impl: str = "auto",
) -> Tensor | Attention:
    """Attend to the selected, visible keys of every query row; differentiable once, to query, key, value and sink.

    softmax(softmax_scale · query · key) · value over the keys that stand in `indices` and that the row may see. A key
    counts once however often it stands in a row, and -1 counts not at all; a row without a key is zeros.

    Args:
        query: [s, b, np, hn] float16, bfloat16, float32 or float64.
        key: [s, b, np_k, hn], as query; np_k divides np (grouped and multi-query attention). Heads that were expanded
            along a stride of 0 are read as one, where value's are too.
        value: [s, b, np_k, any width], as query; None reads the first v_dim channels of key.
        indices: int32 or int64 [b, sq, topk], as `index_topk` returns them: positions on the key axis, or -1 for none.
            Values are not checked, which would read them on the host: one of sk or more raises an error of torch's on
            a CPU and is undefined on an accelerator.
        softmax_scale: factor of the logits.
        v_dim: width of the values that are read from key; with a value its width, or None.
        sink: floating [np], a logit of each head without a key; it joins the denominator of every row.
        causal: row s sees key t iff t <= s + sk - sq.
        keys: a KeyRange instead; layout "thd" needs one.
        layout: "sbhd"; "bshd" with query [b, s, np, hn]; "thd" with query [t, np, hn].
        return_lse: whether to return the log-sum-exp too, which is not differentiated.
        workspace: bytes of scratch, 64 MiB when None. The result does not depend on it.
        impl: "auto" and "eager" walk slabs, "materialized" builds [b, np, sq, sk].

    Returns:
        query's layout and dtype with np heads of value's width; with return_lse, Attention(out, lse), lse float32 (or
        float64) [b, np, sq]. lse counts the sink; without a sink it is -inf for a row without a key.

    Memory: the output and at most `workspace` more. Backward allocates the gradients asked for, for half-precision
    inputs float32 sums of one batch element's dk and dv, and at most `workspace` more. Between forward and backward
    only the inputs are held. dk and dv are added up in a fixed order: bitwise equal across runs.

    Raises: ValueError or TypeError for a broken contract, before anything is allocated; UnsupportedError for
    forward-mode tangents; RuntimeError when differentiated twice.

    Source: DeepSeek-V3.2 (arXiv:2512.02556), section 2; sinks as in gpt-oss (arXiv:2508.10925).
    """
    call = attention_call(
        "sparse_attention",
        query,
        key,
        value,
        indices,
        softmax_scale=softmax_scale,
        v_dim=v_dim,
        sink=sink,
        causal=causal,
        keys=keys,
        layout=layout,
        workspace=workspace,
    )
    backend = backends.choose("sparse_attention", impl, call.query, call.v_dim)
    if backend == "materialized":
        attention = Attention(*materialized_attention.sparse_attention(call))
    else:
        attention = _attend(call, with_lse=return_lse, backend=backend)
    out = from_batch_first(attention.out, layout)
    return Attention(out, attention.lse.detach()) if return_lse else out


def _attend(call: AttentionCall, *, with_lse: bool, gathered: bool | None = None, backend: str = "eager") -> Attention:
    """Run a body; gathered: which, None leaves it to the shape."""
    reverse_mode_only("sparse_attention", *call.inputs)
    key, value = ops.heads_once(call.key, call.value)
    if gathered is None:
        gathered = gathers(key.shape[1], call.indices.shape[2], call.query.shape[2], key.shape[2])
    tile = backends.load(backend).attention_tile_of(call.query, key, value, call.indices, call.v_dim, gathered)
    needed = tile.backward_bytes if wants_grad(*call.inputs) else tile.forward_bytes
    enough_workspace("sparse_attention", needed, call.workspace)
    rest = gathered, with_lse, backend
    return Attention(*ops.sparse_attention(call.query, key, value, call.sink, *call.options, *rest))
