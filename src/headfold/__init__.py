"""headfold: the lightning indexer of DeepSeek Sparse Attention without the resident head axis."""

from headfold.agreement import Agreement, selection_agreement
from headfold.attention import Attention, sparse_attention
from headfold.contract import UnsupportedError
from headfold.geometry import IndexerGeometry
from headfold.keyrange import KeyRange
from headfold.loss import IndexerLoss, indexer_loss
from headfold.mask import index_mask, update_index_mask_
from headfold.reuse import IndexReuse, ReuseSchedule
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import TopK, index_topk
from headfold.selection_record import SelectionRecord

__version__ = "0.1.0"

__all__ = [
    "Agreement",
    "Attention",
    "IndexReuse",
    "IndexerGeometry",
    "IndexerLoss",
    "KeyRange",
    "ReuseSchedule",
    "SelectionRecord",
    "TopK",
    "UnsupportedError",
    "__version__",
    "index_mask",
    "index_scores",
    "index_topk",
    "indexer_loss",
    "selected_scores",
    "selection_agreement",
    "sparse_attention",
    "update_index_mask_",
]
