"""torch.library registration: schema, fake, autograd, FLOP formula and the refusal of double backward.

Ops take batch-first views and plain values, so that records stay out of schemas. The bodies that ship are the
undecorated functions of the backend; nothing is computed here.
"""

from headfold.ops.attention import sparse_attention, sparse_attention_backward
from headfold.ops.expanded import heads_once
from headfold.ops.loss import indexer_loss, indexer_loss_backward, indexer_loss_in_group
from headfold.ops.scores import index_scores, index_scores_backward
from headfold.ops.selected import selected_scores, selected_scores_backward
from headfold.ops.selection import index_mask, index_topk, update_index_mask_

__all__ = [
    "heads_once",
    "index_mask",
    "index_scores",
    "index_scores_backward",
    "index_topk",
    "indexer_loss",
    "indexer_loss_backward",
    "indexer_loss_in_group",
    "selected_scores",
    "selected_scores_backward",
    "sparse_attention",
    "sparse_attention_backward",
    "update_index_mask_",
]
