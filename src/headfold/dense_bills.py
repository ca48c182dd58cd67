"""What attention allocates with full tensors: the loss's teacher and dense masked attention. Plain integers, no torch.

The steps that can peak, as `headfold.materialized_loss` and `headfold.materialized_attention` run them (read off
allocator traces, held to measurements by tests/test_plan.py). A is one [b, np, sq, sk] tensor, P one [b, sq, sk].
"""

from __future__ import annotations

from dataclasses import dataclass

from headfold.bills import Bill


@dataclass(frozen=True)
class Dense:
    """One call: its shape, and the bytes of an element of its inputs and of the compute dtype."""

    b: int
    sq: int
    sk: int
    topk: int
    np: int
    hn: int
    v_dim: int
    itemsize: int
    size: int
    causal: bool

    @property
    def mass(self) -> int:
        """P: bytes of the attention mass, which is as large as the scores."""
        return self.b * self.sq * self.sk * self.size

    @property
    def logits(self) -> int:
        """A: bytes of the logits of every head."""
        return self.mass * self.np

    @property
    def marks(self) -> int:
        """Bytes of a boolean [b, sq, sk]."""
        return self.b * self.sq * self.sk

    @property
    def query(self) -> int:
        """Bytes of the queries in the compute dtype, where they need a cast."""
        return self.b * self.sq * self.np * self.hn * self.size if self.itemsize < self.size else 0

    def keys(self, width: int) -> int:
        """Return the bytes of keys or values repeated for every head."""
        return self.b * self.sk * self.np * width * self.size


def full_loss(scored: Bill, c: Dense) -> Bill:
    """Bill the loss that takes all scores (billed already) and all attention probabilities.

    Three A stand at once: the scaled logits, those with a mask, and their softmax. Six P stand while the row sums are
    made. Autograd keeps the scores' own share, the target and the student.
    """
    marks = (3 if c.causal else 1) * c.marks + c.b * c.sq
    teacher = c.mass + marks + c.keys(c.hn) + max(3 * c.logits, c.query + c.logits)
    compared = 6 * c.mass + marks + c.b * c.sq * (2 * c.size + 2)
    kept = 2 * c.mass + c.marks + c.b * c.sq
    forward = max(scored.forward, teacher, compared) + c.size
    training = max(scored.held + max(teacher, compared, kept + 2 * c.mass), scored.training) + 4 * c.size + 128
    return Bill(forward, scored.held + kept + 2 * c.size + 64, training)


def dense_attention(c: Dense, *, accelerator: bool) -> Bill:
    """Bill attention over every key behind a mask of the selection.

    Logits and probabilities stand together beside the repeated keys and values; autograd keeps the probabilities.
    accelerator: whether torch's backward of a softmax takes their product with its gradient, as on CUDA.
    """
    marks, entries = c.b * c.sq * (c.sk + 1), 8 * c.b * c.sq * c.topk
    column = c.b * c.np * c.sq * c.size
    wide, stored = (c.b * c.sq * c.np * c.v_dim * size for size in (c.size, c.itemsize))
    cast = stored if c.itemsize < c.size else 0
    operands = c.query + c.keys(c.hn) + c.keys(c.v_dim)
    logits = c.logits + column
    attended = c.marks + c.b * c.sq + operands + 2 * logits + wide + c.np * c.size
    forward = max(2 * marks + 2 * entries, attended + column)
    held = operands + logits + c.marks + c.b * c.sq + 8
    through_values = (wide if cast else 0) + c.keys(c.v_dim) + c.logits
    backward = stored + held + max((3 if accelerator else 2) * logits, through_values)
    return Bill(forward, held, max(attended + 2 * column + cast, backward))
