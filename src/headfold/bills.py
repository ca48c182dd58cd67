"""What the paths that are not ours allocate: the materialised path and the loop over heads. Plain integers, no torch.

Each path is replayed on a ledger, step by step in the order in which its operations and autograd allocate and free
(read off allocator traces, and held to measurements by tests/test_plan.py): closed formulas miss the step that peaks as
soon as heads are few, or keys or channels are wide.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

_SCALAR = 8  # a Python number that autograd keeps as a tensor


@dataclass(frozen=True)
class Bill:
    """What one path allocates, in bytes beyond its inputs.

    forward: peak without autograd.   held: kept from forward to backward, beyond inputs and scores.
    training: peak over forward and backward under autograd, scores and gradients included.
    """

    forward: int
    held: int
    training: int


class Scratch(NamedTuple):
    """What a call of ours takes beside its results and gradients, in bytes.

    forward, backward: out of the workspace.   sums: of gradients in the compute dtype, which half-precision ones are
    cast from.
    """

    forward: int
    backward: int
    sums: int = 0


@dataclass(frozen=True)
class Call:
    """One call of a path: its shape, the bytes of an element of its inputs and of its scores, and its options."""

    b: int
    sq: int
    sk: int
    h: int
    d: int
    itemsize: int
    size: int
    relu: bool
    causal: bool
    scaled: bool

    @property
    def q(self) -> int:
        """Bytes of q in the compute dtype."""
        return self.b * self.sq * self.h * self.d * self.size

    @property
    def weights(self) -> int:
        """Bytes of weights in the compute dtype."""
        return self.b * self.sq * self.h * self.size

    @property
    def k(self) -> int:
        """Bytes of k in the compute dtype."""
        return self.b * self.sk * self.d * self.size

    @property
    def scores(self) -> int:
        """Bytes of the scores."""
        return self.b * self.sq * self.sk * self.size

    @property
    def mask(self) -> int:
        """Bytes of the boolean [sq, sk] mask, when causal."""
        return self.sq * self.sk if self.causal else 0

    @property
    def cast(self) -> bool:
        """Whether inputs are cast to the compute dtype."""
        return self.itemsize < self.size

    def stored(self, count: int) -> int:
        """Return the bytes of a tensor in the inputs' dtype, given its bytes in the compute dtype."""
        return count // self.size * self.itemsize


class _Ledger:
    """Bytes alive, and the most there ever were."""

    def __init__(self) -> None:
        self.alive = self.peak = 0

    def take(self, *counts: int) -> None:
        self.alive += sum(counts)
        self.peak = max(self.peak, self.alive)

    def drop(self, *counts: int) -> None:
        self.alive -= sum(counts)

    def swap(self, old: int, new: int) -> None:
        """Make a tensor out of another, which then goes."""
        self.take(new)
        self.drop(old)


def materialized(c: Call) -> Bill:
    """Bill einsum over all heads, relu, times weights, sum over heads."""
    inference, training = _Ledger(), _Ledger()
    _materialized_forward(inference, c, grad=False)
    _materialized_forward(training, c, grad=True)
    held = training.alive - c.scores
    _materialized_backward(training, c)
    return Bill(inference.peak, held, training.peak)


def _materialized_forward(ledger: _Ledger, c: Call, *, grad: bool) -> None:
    intermediate = c.scores * c.h
    # The product wants q batch-first with rows and heads in one axis, which is a view only if one of three is single.
    copied = c.q if min(c.b, c.sq, c.h) > 1 else 0
    operands = (c.q, c.k) if c.cast else ()
    ledger.take(*operands, copied)
    ledger.take(intermediate)
    if grad:
        ledger.drop(c.q if c.cast and copied else 0)
    else:
        ledger.drop(*operands, copied)
    if c.relu:
        ledger.swap(intermediate, intermediate)
    ledger.take(c.weights if c.cast else 0)
    ledger.take(intermediate)
    if not grad:
        ledger.drop(intermediate, c.weights if c.cast else 0)
    ledger.swap(intermediate, c.scores)
    _scale(ledger, c, grad=grad)
    rows, keys = 8 * c.sq, 8 * c.sk
    ledger.take(rows, keys)
    if c.causal:
        ledger.take(rows, _SCALAR)
        ledger.swap(rows, rows)
        ledger.swap(rows, c.mask)
    ledger.drop(rows, keys, _SCALAR if c.causal else 0)
    _hide(ledger, c, grad=grad)


def _materialized_backward(ledger: _Ledger, c: Call) -> None:
    intermediate = c.scores * c.h
    arriving = _before_scale(ledger, c)
    ledger.take(intermediate, intermediate, c.weights)
    ledger.drop(intermediate, arriving)
    if c.cast:
        ledger.drop(c.weights)
        ledger.swap(c.weights, c.stored(c.weights))
    if c.relu:
        ledger.swap(intermediate, intermediate)
    ledger.drop(intermediate)
    ledger.take(c.k, c.q)
    ledger.drop(intermediate)
    if c.cast:
        ledger.drop(c.k, c.q)
        ledger.swap(c.k, c.stored(c.k))
        ledger.swap(c.q, c.stored(c.q))


def loop(c: Call) -> Bill:
    """Bill the loop over heads. Autograd keeps every head's rectified logits, and fills a whole dq for each head."""
    inference, training = _Ledger(), _Ledger()
    _loop_forward(inference, c, grad=False)
    _loop_forward(training, c, grad=True)
    held = training.alive - c.scores
    _loop_backward(training, c)
    return Bill(inference.peak, held, training.peak)


def _loop_forward(ledger: _Ledger, c: Call, *, grad: bool) -> None:
    query, factor = c.q // c.h, c.weights // c.h
    ledger.take(c.k if c.cast else 0)
    ledger.take(c.scores)
    for head in range(c.h):
        if c.cast:
            ledger.take(factor)
            ledger.drop(0 if grad or head == 0 else factor)
            ledger.take(query)
        ledger.take(c.scores)
        ledger.drop(query if c.cast and not grad else 0)
        ledger.swap(c.scores, c.scores)
        ledger.take(c.scores)
        ledger.drop(c.scores, 0 if grad else c.scores)
    _scale(ledger, c, grad=grad)
    ledger.take(c.mask)
    ledger.swap(c.mask, c.mask)
    _hide(ledger, c, grad=grad)
    if c.cast and not grad:
        ledger.drop(c.k, factor)


def _loop_backward(ledger: _Ledger, c: Call) -> None:
    query, factor = c.q // c.h, c.weights // c.h
    arriving = _before_scale(ledger, c)
    for head in range(c.h):
        first, last = head == 0, head == c.h - 1
        ledger.take(c.scores, c.scores, factor)
        ledger.drop(c.scores, factor if c.cast else 0, arriving if last else 0)
        ledger.swap(c.scores, c.scores)
        ledger.drop(c.scores)
        ledger.take(c.k, query)
        ledger.drop(c.scores, 0 if first else c.k)
        if c.cast:
            ledger.drop(query, c.k if last else 0)
            ledger.swap(query, c.stored(query))
        ledger.swap(c.stored(query), c.stored(c.q))
        ledger.drop(0 if first else c.stored(c.q))
        if c.cast:
            ledger.swap(factor, c.stored(factor))
        ledger.swap(c.stored(factor), c.stored(c.weights))
        ledger.drop(0 if first else c.stored(c.weights))
    if c.cast:
        ledger.swap(c.k, c.stored(c.k))


def _scale(ledger: _Ledger, c: Call, *, grad: bool) -> None:
    """Multiply the scores; the number becomes a float64 tensor, and once more one of the compute dtype."""
    if c.scaled:
        ledger.take(_SCALAR, _SCALAR)
        ledger.swap(c.scores, c.scores)
        ledger.drop(_SCALAR, 0 if grad else _SCALAR)


def _hide(ledger: _Ledger, c: Call, *, grad: bool) -> None:
    """Fill what the mask hides; autograd keeps the mask."""
    if c.causal:
        ledger.swap(c.scores, c.scores)
        ledger.drop(0 if grad else c.mask)


def _before_scale(ledger: _Ledger, c: Call) -> int:
    """Undo mask and scale, and return the bytes of the gradient that arrives before them, where it is a new tensor."""
    if c.causal:
        ledger.take(c.scores)
        ledger.drop(c.mask)
    if c.scaled:
        ledger.take(_SCALAR)
        ledger.swap(c.scores if c.causal else 0, c.scores)
        ledger.drop(_SCALAR, _SCALAR)
    return c.scores if c.causal or c.scaled else 0
