"""PyTorch tiles, on any device."""

from headfold.backends.eager.attention import (
    attention_tile_of,
    heads_apart,
    rows_like,
    sparse_attention,
    sparse_attention_backward,
)
from headfold.backends.eager.gathered import gather_tile_of, selected_scores, selected_scores_backward
from headfold.backends.eager.loss import indexer_loss, loss_plan, scaled
from headfold.backends.eager.masks import index_mask, update_index_mask_
from headfold.backends.eager.scores import empty_rows_like, index_scores, index_scores_backward
from headfold.backends.eager.topk import index_topk, selection_plan
from headfold.backends.eager.walks import BackwardWalk, ForwardWalk, tile_of

__all__ = [
    "BackwardWalk",
    "ForwardWalk",
    "attention_tile_of",
    "empty_rows_like",
    "gather_tile_of",
    "heads_apart",
    "index_mask",
    "index_scores",
    "index_scores_backward",
    "index_topk",
    "indexer_loss",
    "loss_plan",
    "rows_like",
    "scaled",
    "selected_scores",
    "selected_scores_backward",
    "selection_plan",
    "sparse_attention",
    "sparse_attention_backward",
    "tile_of",
    "update_index_mask_",
]
