"""Masks of a selection are torch's own scatter on every device: nothing here is a kernel.

The scatter takes an integer maximum, so it is exact and the same in every run; it captures into a CUDA graph; and it
meets an entry of sk or more with torch's assertion, where a store of ours would write beside the mask or drop the
entry without a word.
"""

from headfold.backends.eager.masks import index_mask, update_index_mask_

__all__ = ["index_mask", "update_index_mask_"]
