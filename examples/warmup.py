"""Train a small language model with ordinary attention, freeze it, and teach a lightning indexer where it looks.

    python examples/warmup.py --out warmup        # minutes on two CPU cores; needs pip install 'headfold[cli]'

The text is the Python standard library's own source, one token per byte. Each layer of the model gets an indexer, and
`indexer_loss` trains it against that layer's attention while the model stays as it is. Then, on files that neither has
seen, two questions, of the trained indexer, the untrained one, a sliding window of the same width, and the best
selection there is (the oracle: the keys with the most attention):

    recall   which share of attention falls on the selected keys?
    loss     how well does the model predict the next byte when every layer attends to the selected keys alone?

Both count the rows that see more than topk keys; in the others every way selects all of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import platform
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import headfold

# What a layer attends to: (layer, x, query, key) -> indices [b, s, topk], or None for every key that causality allows.
# x [b, s, width] is what the layer's attention reads; query and key are [b, s, heads, width // heads].
Select = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
NEG_INF = float("-inf")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")
LEAST_BYTES = 1_000_000
HELD_OUT = 10  # every tenth file is evaluated on, and never trained on


@dataclass(frozen=True)
class Settings:
    """What one run is made of."""

    steps: int = 300
    warmup_steps: int = 100
    context: int = 512
    topk: int = 32
    batch: int = 4
    warmup_batch: int = 1
    layers: int = 2
    width: int = 128
    heads: int = 4
    index_heads: int = 8
    index_dim: int = 32
    evaluate: int = 32  # held-out sequences
    seed: int = 0


def rope(x: Tensor) -> Tensor:
    """Turn pairs of channels of x [b, s, heads, even] by angles that grow with position."""
    half = x.shape[-1] // 2
    rates = 1000.0 ** -(torch.arange(half) / half)
    angles = torch.arange(x.shape[1])[:, None, None] * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()), dim=-1)


class Block(nn.Module):
    """One layer of the model: attention to all earlier keys, or to those that are selected, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, layer: int, hidden: Tensor, select: Select | None) -> Tensor:
        """Return hidden [b, s, width] one layer on."""
        x = self.before_attention(hidden)
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        query, key = rope(query), rope(key)
        indices = None if select is None else select(layer, x, query, key)
        if indices is None:
            query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
            attended = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)
        else:
            call: dict[str, Any] = {"softmax_scale": query.shape[-1] ** -0.5, "causal": True, "layout": "bshd"}
            sparse = headfold.sparse_attention(query, key, value, indices, **call)
            assert isinstance(sparse, Tensor)  # with return_lse it would be a pair
            attended = sparse
        hidden = hidden + self.out(attended.flatten(2))
        after: Tensor = hidden + self.mlp(self.before_mlp(hidden))
        return after


class Model(nn.Module):
    """A causal transformer over bytes; a short causal convolution shows every position the few bytes before it."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embed, self.stem = nn.Embedding(256, s.width), nn.Conv1d(s.width, s.width, 4, padding=3)
        self.blocks = nn.ModuleList(Block(s.width, s.heads) for _ in range(s.layers))
        self.norm, self.head = nn.RMSNorm(s.width), nn.Linear(s.width, 256)

    def forward(self, tokens: Tensor, select: Select | None = None) -> Tensor:
        """Return logits [b, s, 256] of tokens [b, s]."""
        hidden: Tensor = self.embed(tokens)
        hidden = hidden + self.stem(hidden.mT)[..., : tokens.shape[1]].mT
        for layer, block in enumerate(self.blocks):
            hidden = block(layer, hidden, select)
        logits: Tensor = self.head(self.norm(hidden))
        return logits


class Indexer(nn.Module):
    """What scores the keys of one layer: q, weights and k of `headfold.index_topk`, from what attention reads."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.dim = s.index_heads, s.index_dim
        self.q, self.weights = nn.Linear(s.width, self.heads * self.dim), nn.Linear(s.width, self.heads)
        self.k, self.norm = nn.Linear(s.width, self.dim), nn.LayerNorm(self.dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [b, s, h, d], weights [b, s, h] and k [b, s, d] of x [b, s, width]."""
        q = rope(self.q(x).unflatten(-1, (self.heads, self.dim)))
        k = rope(self.norm(self.k(x)).unsqueeze(2)).squeeze(2)
        return q, self.weights(x) * (self.heads * self.dim) ** -0.5, k


def text() -> tuple[Tensor, Tensor, str]:
    """Return the bytes to train on, the bytes held out, and what they are."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    both = [b"".join(f.read_bytes() for i, f in enumerate(files) if (i % HELD_OUT == 0) == held) for held in (0, 1)]
    if len(both[1]) < LEAST_BYTES // HELD_OUT:
        raise typer.BadParameter(
            f"The standard library's own source needs {LEAST_BYTES:,} bytes of *.py, found {sum(map(len, both)):,} in "
            f"{len(files)} files; use a Python that is installed with its source."
        )
    train, held = (torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in both)
    name = f"{len(files)} modules of Python {platform.python_version()}'s standard library"
    return train, held, f"{name}, sha256 {hashlib.sha256(b''.join(both)).hexdigest()}"


def sequences(data: Tensor, count: int, context: int, generator: torch.Generator) -> Tensor:
    """Return count random pieces of data, int64 [count, context + 1]: the tokens, and one more to predict."""
    first = torch.randint(len(data) - context, (count, 1), generator=generator)
    return data[first + torch.arange(context + 1)].long()


def next_byte_loss(logits: Tensor, tokens: Tensor, first: int = 0) -> Tensor:
    """Mean nats per byte of the predictions from row `first` on."""
    return F.cross_entropy(logits[:, first:].flatten(0, 1), tokens[:, first + 1 :].flatten())


def attention_mass(query: Tensor, key: Tensor) -> Tensor:
    """Return causal attention averaged over heads, [b, s, s]: what the loss teaches, held whole to measure by."""
    logits = torch.einsum("bshd,bthd->bhst", query, key) * query.shape[-1] ** -0.5
    future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    mass: Tensor = logits.masked_fill(future, NEG_INF).softmax(-1).mean(1)
    return mass


def recall(mass: Tensor, indices: Tensor) -> Tensor:
    """Return the share of mass [b, s, s] that falls on the keys in indices [b, s, topk], [b, s]; -1 is none."""
    kept = mass.gather(-1, indices.clamp(min=0).long())
    return kept.masked_fill(indices < 0, 0.0).sum(-1)


def train_model(s: Settings, data: Tensor, show: Console) -> tuple[Model, list[float]]:
    """Train the model with ordinary attention; return it frozen, and the loss of every step."""
    generator, model = torch.Generator().manual_seed(s.seed), Model(s)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=s.steps, pct_start=0.1)
    losses = []
    for _ in track(range(s.steps), "language model", console=show):
        tokens = sequences(data, s.batch, s.context, generator)
        loss = next_byte_loss(model(tokens[:, :-1]), tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.requires_grad_(False).eval(), losses


def warm_up(s: Settings, model: Model, indexers: nn.ModuleList, data: Tensor, show: Console) -> list[list[float]]:
    """Train the indexers against the frozen model's attention; return each step's loss of every layer."""
    generator = torch.Generator().manual_seed(s.seed + 1)
    optimizer = torch.optim.AdamW(indexers.parameters(), lr=5e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=s.warmup_steps, pct_start=0.1)
    losses: list[list[float]] = []

    def learn(layer: int, x: Tensor, query: Tensor, key: Tensor) -> None:
        """Leave the layer's attention dense, and take the gradients of its indexer on the way."""
        scale = query.shape[-1] ** -0.5
        q, weights, k = indexers[layer](x)
        loss, _ = headfold.indexer_loss(q, weights, k, query, key, softmax_scale=scale, causal=True, layout="bshd")
        loss.backward()
        losses[-1].append(loss.item())

    for _ in track(range(s.warmup_steps), "indexer", console=show):
        losses.append([])
        optimizer.zero_grad()
        model(sequences(data, s.warmup_batch, s.context, generator)[:, :-1], learn)
        optimizer.step()
        schedule.step()
    return losses


def ways_to_select(s: Settings, untrained: nn.ModuleList, trained: nn.ModuleList) -> dict[str, Select]:
    """Return what is compared."""

    def by(indexers: nn.ModuleList) -> Select:
        def select(layer: int, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
            q, weights, k = indexers[layer](x)
            return headfold.index_topk(q, weights, k, s.topk, causal=True, layout="bshd").indices

        return select

    def window(layer: int, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        rows = torch.arange(x.shape[1])[:, None] - torch.arange(s.topk)
        return rows.clamp(min=-1).expand(x.shape[0], -1, -1)

    def oracle(layer: int, x: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return attention_mass(query, key).topk(s.topk).indices  # keys of the future have no mass, and stay invisible

    return {
        "untrained indexer": by(untrained),
        "sliding window": window,
        "trained indexer": by(trained),
        "oracle": oracle,
    }


@torch.no_grad()
def evaluate(s: Settings, model: Model, ways: dict[str, Select], data: Tensor, show: Console) -> dict[str, Any]:
    """Return recall and loss of every way, and the loss with dense attention, on held-out text.

    Recall is read off the dense model's own rows, averaged over layers and rows; loss has every layer of the model
    select, each from what the sparse layers below made of the text.
    """
    generator = torch.Generator().manual_seed(s.seed + 2)
    held = sequences(data, s.evaluate, s.context, generator)
    losses: dict[str, list[float]] = {name: [] for name in ("dense", *ways)}
    recalls = {name: [0.0] * s.layers for name in ways}

    def watch(layer: int, x: Tensor, query: Tensor, key: Tensor) -> None:
        mass = attention_mass(query, key)
        for name, select in ways.items():
            indices = select(layer, x, query, key)
            assert indices is not None
            recalls[name][layer] += recall(mass, indices)[:, s.topk :].mean().item() / s.evaluate

    for tokens in track(held.split(1), "evaluation", console=show):
        for name, select in {"dense": watch, **ways}.items():
            logits = model(tokens[:, :-1], select)
            losses[name].append(next_byte_loss(logits, tokens, s.topk).item())
    return {
        "recall": {name: sum(layers) / s.layers for name, layers in recalls.items()},
        "recall of each layer": recalls,
        "loss": {name: sum(values) / s.evaluate for name, values in losses.items()},
        "loss of each sequence": losses,
    }


def run(s: Settings, show: Console) -> dict[str, Any]:
    """Train, freeze, warm up, evaluate; return every number, ready for JSON."""
    begin, (train, held, name) = time.perf_counter(), text()
    torch.manual_seed(s.seed)
    model, model_losses = train_model(s, train, show)
    untrained = nn.ModuleList(Indexer(s) for _ in range(s.layers)).requires_grad_(False)
    trained = copy.deepcopy(untrained).requires_grad_(True)
    middle = time.perf_counter()
    indexer_losses = warm_up(s, model, trained, train, show)
    warm = time.perf_counter()
    found = evaluate(s, model, ways_to_select(s, untrained, trained), held, show)
    end = time.perf_counter()
    return {
        "settings": asdict(s),
        "text": {"name": name, "training bytes": len(train), "held-out bytes": len(held), "bytes per token": 1},
        "environment": {
            "headfold": headfold.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        },
        "seconds": {
            "language model": middle - begin,
            "warm-up": warm - middle,
            "evaluation": end - warm,
            "all": end - begin,
        },
        **found,
        "curves": {"language model": model_losses, "indexer": indexer_losses},
    }


def table(numbers: dict[str, Any]) -> Table:
    """Show recall and loss of every way."""
    shown = Table(
        "attends to", "recall", "loss, nats per byte", "above dense", title=numbers["text"]["name"].split(",")[0]
    )
    dense = numbers["loss"]["dense"]
    for name, loss in numbers["loss"].items():
        shown.add_row(name, f"{numbers['recall'].get(name, 1.0):.3f}", f"{loss:.4f}", f"{loss - dense:+.4f}")
    return shown


def figure(numbers: dict[str, Any]) -> Figure:
    """Draw both trainings above, recall and loss below."""
    drawn = Figure(figsize=(9.6, 6.4), layout="constrained")
    (model, indexer), bars = drawn.subplots(2, 2)
    model.plot(numbers["curves"]["language model"], color="#555555", linewidth=0.8)
    model.set(title="Language model, dense attention", xlabel="step", ylabel="loss, nats per byte")
    for layer, losses in enumerate(zip(*numbers["curves"]["indexer"], strict=True)):
        indexer.plot(losses, color=COLORS[layer % len(COLORS)], linewidth=0.8, label=f"layer {layer}")
    indexer.set(title="Indexer, model frozen", xlabel="step", ylabel="indexer loss, nats per row", yscale="log")
    indexer.legend(frameon=False)
    topk, context = numbers["settings"]["topk"], numbers["settings"]["context"]
    parts = ("recall", "share of attention kept"), ("loss", "loss, nats per byte")
    for axes, (part, label) in zip(bars, parts, strict=True):
        found = numbers[part]
        names = [name.replace(" ", "\n") for name in found]
        colors = ["#0072B2" if name == "trained indexer" else "#BBBBBB" for name in found]
        axes.bar_label(axes.bar(names, list(found.values()), color=colors), fmt="%.3f", fontsize=8)
        axes.set(title=f"Held-out {part}, {topk} keys of up to {context}", ylabel=label)
        axes.tick_params(axis="x", labelsize=8)
    least, most = min(numbers["loss"].values()), max(numbers["loss"].values())
    room = max(most - least, 0.01)  # bars that differ by hundredths: the axis starts below the least, not at 0
    bars[1].set_ylim(least - 0.5 * room, most + 0.2 * room)
    for axes in (model, indexer, *bars):
        axes.spines[["top", "right"]].set_visible(False)
    return drawn


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="Folder for warmup.json and warmup.svg.")] = Path("warmup"),
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's default when not given.")] = None,
    steps: Annotated[int, typer.Option(min=20, help="Steps of the language model.")] = Settings.steps,
    warmup_steps: Annotated[int, typer.Option(min=20, help="Steps of the indexer.")] = Settings.warmup_steps,
    context: Annotated[int, typer.Option(min=2, max=8192, help="Bytes of a sequence.")] = Settings.context,
    topk: Annotated[int, typer.Option(min=1, help="Keys that a row keeps.")] = Settings.topk,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and batches.")] = Settings.seed,
) -> None:
    """Run it, write it, show it."""
    if topk >= context:
        raise typer.BadParameter(f"--topk must be less than --context ({context}), got {topk}.")
    if out.exists() and not out.is_dir():
        raise typer.BadParameter(f"--out must be a folder, got the file {out}.")
    if threads is not None:
        torch.set_num_threads(threads)
    show = Console()
    s = Settings(steps=steps, warmup_steps=warmup_steps, context=context, topk=topk, seed=seed)
    numbers = run(s, show)
    out.mkdir(parents=True, exist_ok=True)
    (out / "warmup.json").write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    with rc_context({"svg.hashsalt": "headfold"}):  # the same figure is the same file
        figure(numbers).savefig(out / "warmup.svg", metadata={"Date": None})
    show.print(table(numbers))
    show.print(f"{numbers['seconds']['all']:.0f} seconds; wrote warmup.json and warmup.svg in {out}.")


if __name__ == "__main__":
    app()
