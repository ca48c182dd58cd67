"""Other implementations of the score path that this machine may hold, each called as its own users call it.

Nothing of theirs is imported before `installed_peers` asks for it, and nothing of theirs is rewritten here: a peer is
its own function or module, the inputs that it takes, and the place of the scores in what it returns.
"""

from __future__ import annotations

import importlib
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from operator import attrgetter, itemgetter
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """One implementation, ready to be prepared, timed and checked. No peer masks: every row sees every key.

    Attributes:
        name: package and call, for the table.
        package: distribution name.
        version: installed version.
        computes: "scores" or "scores + top-k".
        trains: whether autograd runs backward through it to q, weights and k.
        prepare: q [sq, b, h, d], weights [sq, b, h], k [sk, b, d] -> the peer's own arguments, made
            outside the timed region. ValueError when the peer cannot take these shapes.
        forward: the timed call on what `prepare` returned.
        scores: result of `forward` -> [b, sq, sk], equal to the sum over heads of weights * relu(q . k); None where the
            peer keeps them to itself.
        indices: result of `forward` -> selected keys, int32 or int64 [b, sq, min(topk, sk)], or [b, sq, topk] padded
            with -1, in the peer's own order; None where it does not select.
    """

    name: str
    package: str
    version: str
    computes: str
    trains: bool
    prepare: Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]
    forward: Callable[..., Any]
    scores: Callable[[Any], Tensor | None]
    indices: Callable[[Any], Tensor | None]


class Absent(NamedTuple):
    """A package, or one call of it, that was left out, and why."""

    package: str
    reason: str


class Peers(NamedTuple):
    """What `installed_peers` found, and what it left out."""

    found: tuple[Peer, ...]
    absent: tuple[Absent, ...]


def installed_peers(device: torch.device, topk: int | None = None) -> Peers:
    """Find the peers that are installed and usable on a device, and name those that are not.

    Args:
        device: where the tensors of the comparison live.
        topk: keys to keep a row; None leaves out the peers that always select.

    Returns:
        The found peers in a fixed order, and one (package, reason) for each that was left out.
    """
    reached = [_reach(seam, device, topk) for seam in _seams()]
    absent = [item for item in reached if isinstance(item, Absent)]
    if device.type == "cuda" and Absent("attn-gym", "not installed") not in absent:
        absent.append(Absent("attn-gym", "the fused CUDA kernels of lightning_indexer are not compared"))
    # A package with two seams gives the same reason twice when it is not installed.
    return Peers(tuple(item for item in reached if isinstance(item, Peer)), tuple(dict.fromkeys(absent)))


# A Peer that still wants its name, package, version, computes and trains.
_Bound: TypeAlias = partial[Peer]


@dataclass(frozen=True)
class _Seam:
    """Where a package keeps its score path, and how to call it once it is there.

    `attribute` of `module` must be callable with parameters that begin with `parameters`: the calls are positional, so
    these names are all that has to hold from one version to the next. No `devices` means all of them.
    """

    package: str
    module: str
    attribute: str
    parameters: tuple[str, ...]
    bind: Callable[[ModuleType, int], _Bound]
    selects: bool = False
    trains: bool = False
    devices: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        """Package and call, for the table and the reasons."""
        return f"{self.package} {self.attribute.removesuffix('.forward')}{self.variant}"


def _seams() -> tuple[_Seam, ...]:
    """Every seam that is known, scorers first within a package."""
    dsa = "megatron.core.transformer.experimental_attention_variant.dsa"
    v4 = "transformers.models.deepseek_v4.modeling_deepseek_v4"
    v32 = "transformers.models.deepseek_v32.modeling_deepseek_v32"
    scorer = ("self", "q", "compressed_kv", "hidden_states")
    indexer = ("self", "hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids")
    megatron, transformers = partial(_Seam, "megatron-core", dsa), partial(_Seam, "transformers")
    attn_gym = partial(_Seam, "attn-gym", "attn_gym.sparse", devices=("cpu", "cuda"), variant=", reference")
    return (
        megatron("_compute_index_scores", ("q", "weights", "k"), _megatron_scores, trains=True),
        megatron("fused_qk_topk_naive", ("q", "k", "weights", "index_topk"), _megatron_topk, trains=True, selects=True),
        attn_gym("lightning_indexer", ("q", "k", "weights", "topk"), _attn_gym_reference, selects=True),
        transformers(v4, "DeepseekV4IndexerScorer.forward", scorer, _transformers_v4, trains=True),
        transformers(v32, "DeepseekV32Indexer.forward", indexer, _transformers_v32, selects=True),
    )


def _reach(seam: _Seam, device: torch.device, topk: int | None) -> Peer | Absent:
    """Follow a seam to its peer, or say what stood in the way."""
    try:
        version = metadata.version(seam.package)
    except metadata.PackageNotFoundError:
        return Absent(seam.package, "not installed")
    if seam.devices and device.type not in seam.devices:
        return Absent(seam.package, f"{seam.name} runs on {' and '.join(seam.devices)}, not on {device.type}")
    if seam.selects and topk is None:
        return Absent(seam.package, f"{seam.name} selects as well as scores: give topk to compare it")
    module = _opened(seam, version)
    if isinstance(module, Absent):
        return module
    bound = seam.bind(module, topk or 0)  # a peer that only scores ignores topk
    return bound(
        name=seam.name,
        package=seam.package,
        version=version,
        computes="scores + top-k" if seam.selects else "scores",
        trains=seam.trains,
    )


def _opened(seam: _Seam, version: str) -> ModuleType | Absent:
    """Import a seam's module, and hold its attribute to the parameters that the call relies on."""
    try:
        with warnings.catch_warnings():
            # Advice about the package's own missing extras: nothing to do with the comparison.
            warnings.simplefilter("ignore")
            module = importlib.import_module(seam.module)
    except (ImportError, AttributeError, OSError, RuntimeError, SyntaxError) as error:
        return Absent(seam.package, f"version {version} does not import {seam.module}: {error}")
    try:
        target = attrgetter(seam.attribute)(module)
    except AttributeError:
        return Absent(seam.package, f"version {version} has no {seam.attribute} in {seam.module}")
    taken = tuple(inspect.signature(target).parameters)
    if taken[: len(seam.parameters)] != seam.parameters:
        needs, has = ", ".join(seam.parameters), ", ".join(taken)
        return Absent(seam.package, f"version {version}: {seam.attribute} takes ({has}), the call here needs ({needs})")
    return module


def _megatron_scores(dsa: ModuleType, topk: int) -> _Bound:
    """Return float32 scores [b, sq, sk] from inputs as headfold has them."""
    forward = dsa._compute_index_scores
    return partial(Peer, prepare=lambda q, w, k: (q, w, k), forward=forward, scores=_whole, indices=_nothing)


def _megatron_topk(dsa: ModuleType, topk: int) -> _Bound:
    """Return scores and int64 indices; without mask and varlen bounds, every key competes.

    Versions before 0.19 keep min(topk, sq) keys, not min(topk, sk).
    """
    forward, scores, indices = dsa.fused_qk_topk_naive, itemgetter(0), itemgetter(1)
    return partial(Peer, prepare=lambda q, w, k: (q, k, w, topk), forward=forward, scores=scores, indices=indices)


def _attn_gym_reference(sparse: ModuleType, topk: int) -> _Bound:
    """Return int32 indices alone. Its scale, 1 / sqrt(h * d), moves no key, so its inputs are not scaled back."""

    def prepare(q: Tensor, weights: Tensor, k: Tensor) -> tuple[Any, ...]:
        sq, sk = q.shape[0], k.shape[0]
        if sq != sk:
            raise ValueError(f"attn-gym lightning_indexer needs as many keys as query rows, got sq={sq}, sk={sk}.")
        # It refuses weights of another dtype than q: wider ones are rounded.
        return _batch_first(q), _batch_first(k), _batch_first(weights.to(q.dtype)), topk

    forward = partial(sparse.lightning_indexer, impl="reference")
    return partial(Peer, prepare=prepare, forward=forward, scores=_nothing, indices=_whole)


def _transformers_v4(modeling: ModuleType, topk: int) -> _Bound:
    """Return float32 scores [b, sq, sk] from the one scorer that transformers keeps in a module of its own.

    It divides by sqrt(h * d); weights carry that factor in, at the float32 that it computes in.
    """

    def prepare(q: Tensor, weights: Tensor, k: Tensor) -> tuple[Any, ...]:
        h, d = q.shape[2:]
        config = modeling.DeepseekV4Config(index_n_heads=h, index_head_dim=d, hidden_size=1)
        scorer = modeling.DeepseekV4IndexerScorer(config)
        scorer.weights_proj = nn.Identity()
        return scorer, _batch_first(q), _batch_first(k), _batch_first(weights.float() * math.sqrt(h * d))

    return partial(Peer, prepare=prepare, forward=_call, scores=_whole, indices=_nothing)


def _transformers_v32(modeling: ModuleType, topk: int) -> _Bound:
    """Return int32 indices alone; the module runs under no_grad. Its scale moves no key, so none is undone.

    The scorer lives inside the module's forward, behind its projections: these answer with the given tensors. A rotary
    part of width zero leaves q and k untouched (they are still copied once, as the module does for every model).
    """

    def prepare(q: Tensor, weights: Tensor, k: Tensor) -> tuple[Any, ...]:
        (sq, b, h, d), sk = q.shape, k.shape[0]
        config = modeling.DeepseekV32Config(
            index_n_heads=h, index_head_dim=d, index_topk=topk, qk_rope_head_dim=0, hidden_size=1, q_lora_rank=1
        )
        indexer = modeling.DeepseekV32Indexer(config, layer_idx=0)
        indexer.wq_b = _Given(_batch_first(q).flatten(2))
        indexer.wk = _Given(_batch_first(k))
        indexer.k_norm = nn.Identity()
        indexer.weights_proj = _Given(_batch_first(weights))
        hidden, rope = q.new_zeros(b, sq, 1), q.new_zeros(1, 1, 0)
        visible = torch.ones(b, sq, sk, dtype=torch.bool, device=q.device)
        return indexer, hidden, hidden, (rope, rope), visible, None

    return partial(Peer, prepare=prepare, forward=_call, scores=_nothing, indices=_whole)


class _Given(nn.Module):
    """A projection that answers with one tensor, whatever it is asked."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # under this name because its owner reads weight.dtype

    def forward(self, asked: Tensor) -> Tensor:
        """Return the given tensor."""
        return self.weight


def _batch_first(x: Tensor) -> Tensor:
    """[s, b, ...] -> [b, s, ...], contiguous, as the projections of a batch-first model leave it."""
    return x.transpose(0, 1).contiguous()


def _call(module: nn.Module, *inputs: Any) -> Any:
    return module(*inputs)


def _whole(result: Tensor) -> Tensor:
    return result


def _nothing(result: object) -> None:
    return None
