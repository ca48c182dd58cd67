"""headfold: the lightning indexer of DeepSeek Sparse Attention without the resident head axis."""

from headfold.contract import UnsupportedError
from headfold.geometry import IndexerGeometry
from headfold.keyrange import KeyRange
from headfold.mask import index_mask, update_index_mask_
from headfold.scores import index_scores
from headfold.selected import selected_scores
from headfold.selection import TopK, index_topk

__version__ = "0.1.0"

__all__ = [
    "IndexerGeometry",
    "KeyRange",
    "TopK",
    "UnsupportedError",
    "__version__",
    "index_mask",
    "index_scores",
    "index_topk",
    "selected_scores",
    "update_index_mask_",
]
