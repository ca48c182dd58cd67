"""Triton kernels, on CUDA and ROCm devices, and under Triton's interpreter on a CPU.

Imported when a call is dispatched here and not before, so that headfold runs without Triton.
"""

import triton
import triton.language

from headfold.backends.triton.attention import attention_tile_of, sparse_attention
from headfold.backends.triton.attention_backward import sparse_attention_backward
from headfold.backends.triton.gathered import gather_tile_of, selected_scores, selected_scores_backward
from headfold.backends.triton.loss import indexer_loss, loss_plan
from headfold.backends.triton.masks import index_mask, update_index_mask_
from headfold.backends.triton.scores import add_gradients, fill_scores, index_scores, index_scores_backward, tile_of
from headfold.backends.triton.topk import index_topk, selection_plan
from headfold.backends.triton.visible import row_bounds

# Both read TRITON_INTERPRET where they are decorated: a variable set between the two imports gives neither.
INTERPRETED = not any(isinstance(f, triton.JITFunction) for f in (row_bounds, triton.language.zeros))
VERSION = triton.__version__
# Whether this Triton multiplies matrices of float64.
FLOAT64 = tuple(map(int, VERSION.split(".")[:2])) >= (3, 5)

__all__ = [
    "FLOAT64",
    "INTERPRETED",
    "VERSION",
    "add_gradients",
    "attention_tile_of",
    "fill_scores",
    "gather_tile_of",
    "index_mask",
    "index_scores",
    "index_scores_backward",
    "index_topk",
    "indexer_loss",
    "loss_plan",
    "selected_scores",
    "selected_scores_backward",
    "selection_plan",
    "sparse_attention",
    "sparse_attention_backward",
    "tile_of",
    "update_index_mask_",
]
