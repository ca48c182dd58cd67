"""transformers on headfold: a live model by `apply`, models still to be made by `register`; both can be undone."""

from headfold.integrations.patching import Patch, PatchError
from headfold.integrations.transformers.models import MODEL_TYPES, REQUIRES

# Before the imports that take names of transformers: where those are absent, this says which version has them.
try:
    REQUIRES.check()
except PatchError as error:
    raise ImportError(f"headfold.integrations.transformers: {error}") from error

from headfold.integrations.transformers.masks import VisibleKeys
from headfold.integrations.transformers.patches import apply, register
from headfold.integrations.transformers.training import IndexerLosses

__all__ = ["MODEL_TYPES", "IndexerLosses", "Patch", "VisibleKeys", "apply", "register"]
