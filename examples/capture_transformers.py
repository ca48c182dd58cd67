"""Save what the indexer of transformers' DeepSeek-V3.2 scored while the model read a real text.

The model has the published indexer dimensions and rope settings, few layers, small other dimensions and random weights.
The text is read at byte level, one token per byte, so nothing is downloaded. All of it but the saved rows is read on
headfold, in bounded memory; those are scored by the model's own code. --selection also saves the keys that the
model itself selected; `headfold agree` compares them with what headfold selects from the capture.
"""

import argparse
import codecs
import contextlib
import hashlib
import importlib
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModel, DeepseekV32Config, DynamicCache

from headfold import KeyRange, SelectionRecord
from headfold.integrations.transformers import MODEL_TYPES, apply
from headfold.integrations.transformers.models import operands

# As published for DeepSeek-V3.2; index_*, qk_rope_head_dim and max_position_embeddings are the defaults of the class.
ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4096}
ROPE |= {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}


class Capture(NamedTuple):
    """One scoring step: its operands, and what the model made of them."""

    q: Tensor  # [b, sq, h, d]
    weights: Tensor  # [b, sq, h]
    k: Tensor  # [b, sk, d]
    scale: float
    scores: Tensor  # [b, sq, sk], the model's own, -inf where a row may not look
    indices: Tensor  # [b, sq, min(topk, sk)], the model's own, score-descending


class Recorder(TorchFunctionMode):
    """Notes the input and indices of every Tensor.topk, while active."""

    def __init__(self) -> None:
        """Start with nothing seen."""
        super().__init__()
        self.inputs: tuple[Any, ...] = ()
        self.selections: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run func unchanged, and note it when it is that one."""
        result = func(*args, **(kwargs or {}))
        if func is torch.Tensor.topk:
            self.selections.append((args[0], result.indices))
        return result


@contextlib.contextmanager
def recording(indexer: nn.Module) -> Iterator[Recorder]:
    """Record inside this one indexer's forward, and what it is called with; it is its own again afterwards."""
    recorder, forward = Recorder(), indexer.forward

    def recorded(*args: Any, **kwargs: Any) -> Any:
        recorder.inputs = args
        with recorder:
            return forward(*args, **kwargs)

    with mock.patch.object(indexer, "forward", recorded):
        yield recorder


def read_text(path: Path | None, tokens: int) -> tuple[bytes, str]:
    """Return the first bytes of the text, and a description that names no folder."""
    if path is None:
        with contextlib.redirect_stdout(io.StringIO()):  # the module prints itself on import
            text = codecs.decode(importlib.import_module("this").s, "rot13").encode()
        name = "The Zen of Python (standard library module this)"
    else:
        text, name = path.read_bytes(), path.name
    if len(text) < tokens:
        raise SystemExit(f"--tokens {tokens} needs as many bytes, {name} has {len(text)}; give a longer --text.")
    text = text[:tokens]
    return text, f"first {tokens} bytes of {name}, one token per byte, sha256 {hashlib.sha256(text).hexdigest()}"


def build_model(layers: int, dtype: torch.dtype, seed: int) -> Any:
    """Return a random DeepSeek-V3.2 over bytes, about 4 million parameters a layer, every MLP dense."""
    torch.manual_seed(seed)
    small: dict[str, Any] = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1024}
    small |= {"num_attention_heads": 4, "num_key_value_heads": 4, "qk_nope_head_dim": 64, "v_head_dim": 64}
    small |= {"q_lora_rank": 256, "kv_lora_rank": 128, "num_hidden_layers": layers, "first_k_dense_replace": layers}
    config = DeepseekV32Config(**small, rope_parameters=ROPE)
    # sdpa hands the indexer a boolean mask, which leaves the scores of visible keys as they were.
    return AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


@torch.no_grad()
def capture(model: Any, text: bytes, rows: int, layer: int) -> Capture:
    """Run text through model; return what the indexer of this layer scored for the last rows tokens."""
    ids, first = torch.tensor([list(text)]), len(text) - rows
    indexer, cache = model.layers[layer].self_attn.indexer, DynamicCache(config=model.config)
    if first:
        with apply(model):
            model(ids[:, :first], past_key_values=cache, use_cache=True)
    with recording(indexer) as seen:
        model(ids[:, first:], past_key_values=cache, use_cache=True)
    if len(seen.selections) != 1:
        raise SystemExit(
            f"The indexer of transformers {transformers.__version__} made {len(seen.selections)} Tensor.topk calls "
            "where this script knows one; use transformers 5.23."
        )
    hidden, latent, turns, _, places = seen.inputs
    q, weights, _ = operands(MODEL_TYPES["deepseek_v32"], indexer, hidden, latent, turns, places)
    kept: Any = cache.layers[layer]
    keys = kept.indexer_keys  # those of this step, after those of the steps before
    return Capture(q, weights, keys, float(indexer.softmax_scale), *seen.selections[0])


def stored(step: Capture, dtype: torch.dtype) -> Capture:
    """Return step with its operands in dtype, contiguous; the scorer's float32 copies lose no bit by it."""
    operands = {name: getattr(step, name).to(dtype).contiguous() for name in ("q", "weights", "k")}
    for name, tensor in operands.items():
        if not torch.equal(tensor.float(), getattr(step, name)):
            raise SystemExit(f"{name} does not fit {dtype} exactly; use --dtype float32.")
    return step._replace(**operands)


def index_scores(q: Tensor, weights: Tensor, k: Tensor, scale: float) -> Tensor:
    """Return scale * sum_h weights * relu(q.k) in float64, [b, sq, sk], one head at a time."""
    q, weights, k = q.double(), weights.double(), k.double()
    heads = (weights[:, :, h, None] * (q[:, :, h] @ k.mT).relu() for h in range(q.shape[2]))
    return scale * sum(heads, start=torch.zeros(()))


def check(step: Capture) -> str:
    """Compare step with the model's own scores and selection, and say what was found.

    A score may differ by float32 rounding of a sum of n = d + h terms: 2 * eps * sqrt(n) of the sum of magnitudes. In a
    row whose scores differ by at most e, the model's j-th key must score within 2e of the j-th best for every j: each
    top-j set is then the same up to ties that close.
    """
    q, weights, k, scale, scores, indices = step
    (_, sq, heads, dim), sk, count = q.shape, k.shape[1], indices.shape[-1]
    ends = torch.arange(sk - sq, sk)[:, None] + 1  # a causal row sees the keys before its end
    visible, ranked = (torch.arange(sk) < ends).expand_as(scores), torch.arange(count) < ends
    if not torch.equal(visible, scores.isfinite()):
        raise SystemExit("The model's own scores are not finite exactly at the keys that a causal row sees.")
    own = index_scores(q, weights, k, scale)
    error = (own - scores).abs().where(visible, 0.0)
    bound = 2 * torch.finfo(torch.float32).eps * (dim + heads) ** 0.5
    if (error > bound * index_scores(q.abs(), weights.abs(), k.abs(), scale)).any():
        raise SystemExit(f"Scores from the captured tensors miss the model's own by up to {error.max():.3g}.")
    best = own.masked_fill(~visible, -torch.inf).sort(dim=-1, descending=True)
    gap = (own.gather(-1, indices) - best.values[..., :count]).abs().where(ranked, 0.0)
    if (gap > 2 * error.amax(-1, keepdim=True)).any():
        raise SystemExit(f"The captured tensors rank keys otherwise than the model did, by up to {gap.max():.3g}.")
    ties = ((indices != best.indices[..., :count]) & ranked).sum()
    return f"scores within {error.max():.2g} (spread {own[visible].std():.2g}), rankings equal but for {ties} ties"


def selection(step: Capture, layer: int) -> SelectionRecord:
    """Return the model's own selection, with -1 where a short row was filled up with keys that it may not see."""
    sq, sk = step.scores.shape[1:]
    ends = torch.arange(sk - sq, sk)[:, None] + 1
    return SelectionRecord(step.indices.where(step.indices < ends, -1), sk, KeyRange.causal(sq, sk), layer=layer)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read and check the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("deepseek_v32_indexer.safetensors"), help="file to write")
    parser.add_argument("--selection", type=Path, metavar="FILE", help="write the model's own selection here too")
    parser.add_argument("--tokens", type=int, default=112, help="tokens that the model reads: the keys (%(default)s)")
    parser.add_argument("--rows", type=int, help="save the queries of the last ROWS tokens only (all of them)")
    parser.add_argument("--layers", type=int, default=2, help="layers of the model (%(default)s)")
    parser.add_argument("--layer", type=int, help="layer to save, counted from 0 (the last)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of model and file")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (%(default)s)")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to read (The Zen of Python, 856 bytes)")
    args = parser.parse_args(argv)
    args.rows = args.tokens if args.rows is None else args.rows
    args.layer = args.layers - 1 if args.layer is None else args.layer
    if not 1 <= args.rows <= args.tokens:
        parser.error(f"--rows must be from 1 to --tokens ({args.tokens}), got {args.rows}.")
    if not 0 <= args.layer < args.layers:
        parser.error(f"--layer must be from 0 to --layers - 1 ({args.layers - 1}), got {args.layer}.")
    if args.text and not args.text.is_file():
        parser.error(f"--text must name a file, got {args.text}.")
    for name, path in (("--out", args.out), ("--selection", args.selection)):
        if path is not None and not path.parent.is_dir():
            parser.error(f"{name} must lie in a folder that exists, got {path}.")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Capture, check, then write."""
    args = parse(argv)
    dtype = getattr(torch, args.dtype)
    text, description = read_text(args.text, args.tokens)
    model = build_model(args.layers, dtype, args.seed)
    step = stored(capture(model, text, args.rows, args.layer), dtype)
    print(f"Checked: {check(step)}.")
    source = (
        f"{type(model).__name__} of transformers {transformers.__version__}, torch {torch.__version__}, random "
        f"{args.dtype} weights of seed {args.seed}, layer {args.layer} of {args.layers} counted from 0, "
        f"last {args.rows} rows of {args.tokens}; {description}"
    )
    metadata = {"layout": "bshd", "causal": "true", "scale": repr(step.scale), "topk": str(model.config.index_topk)}
    tensors = {"q": step.q, "weights": step.weights, "k": step.k}
    save_file(tensors, args.out, metadata | {"source": source})
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    print(f"Wrote {args.out}: {shapes}, {args.dtype}, {args.out.stat().st_size} bytes.")
    if args.selection:
        selection(step, args.layer).save(args.selection)
        print(f"Wrote {args.selection}: indices {list(step.indices.shape)}.")


if __name__ == "__main__":
    main()
