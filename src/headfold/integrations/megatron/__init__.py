"""Megatron-Core's DeepSeek Sparse Attention in bounded memory: one call puts headfold under it, one puts it back.

    patch = headfold.integrations.megatron.apply()      # before the first step; patch.undo() puts everything back

What is replaced, what changes and what does not: docs/megatron.md.
"""

from __future__ import annotations

from headfold.contract import workspace_bytes
from headfold.integrations.patching import Patch, Requires

MEGATRON = Requires("megatron-core", "megatron.core", "0.17", "0.20")
CURRENT = Requires("megatron-core", "megatron.core", "0.19", "0.20")


def apply(*, keep_scores: bool = False, workspace: int | None = None) -> Patch:
    """Put headfold under the PyTorch path of Megatron-Core's DSA, for all layers of this process.

    Fused kernels that `dsa_kernel_backend` names stay, and are asked first, as before. Nothing is imported from
    Megatron before this call.

    Args:
        keep_scores: whether fused_qk_topk_naive computes its [b, sq, sk] scores at once. With False they are computed
            when they are first read, and Megatron's own layers never read them: a forward pass without the indexer
            loss, such as the first pass of a recomputed layer, then holds none. Where autograd or a compiler records
            the call they are computed at once.
        workspace: bytes of scratch of each call, 64 MiB when None.

    Returns:
        The Patch, applied: undo it, ask its status, or use it in a `with`.

    Raises: PatchError, with nothing changed, for a version or a signature that this was not written for.
    """
    op = "headfold.integrations.megatron"
    if workspace is not None:
        workspace_bytes(op, workspace)
    if not isinstance(keep_scores, bool):
        raise TypeError(f"{op}: keep_scores must be True or False, got {type(keep_scores).__name__}.")
    from headfold.integrations.megatron import current, earlier

    generation = current if CURRENT.holds(MEGATRON.check(op)) else earlier
    changes = generation.replacements(keep_scores=keep_scores, workspace=workspace)
    return Patch(op, tuple(changes), (MEGATRON,)).apply()
