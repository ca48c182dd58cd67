"""examples/warmup.py in short: it trains what it says, measures what it says, and refuses what it can't."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

EXAMPLE = Path(__file__).parent.parent / "examples" / "warmup.py"
LEAST_RISE = 0.08  # of attention's mass; 0.14 was seen
SHORT = {"steps": 50, "warmup_steps": 40, "context": 128, "topk": 12}


@pytest.fixture(scope="module")
def warmup() -> Any:
    spec = importlib.util.spec_from_file_location("warmup", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["warmup"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def written(warmup: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("runs") / "made" / "here"
    options = [part for name, value in SHORT.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    done = CliRunner().invoke(warmup.app, [*options, "--out", str(out)], env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    return done.output, out


@pytest.fixture(scope="module")
def numbers(written: tuple[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((written[1] / "warmup.json").read_text(encoding="utf-8"))
    return found


def test_recall_rises_by_the_stated_margin_and_stays_under_the_oracle(numbers: dict[str, Any]) -> None:
    recall = numbers["recall"]
    assert recall["trained indexer"] >= recall["untrained indexer"] + LEAST_RISE
    assert recall["trained indexer"] <= recall["oracle"] <= 1.0
    assert all(
        x <= y
        for x, y in zip(*(numbers["recall of each layer"][n] for n in ("trained indexer", "oracle")), strict=True)
    )


def test_the_indexer_loss_falls_in_every_layer(numbers: dict[str, Any]) -> None:
    curves = torch.tensor(numbers["curves"]["indexer"])
    assert curves.shape == (SHORT["warmup_steps"], numbers["settings"]["layers"])
    assert (curves[-5:].mean(0) < 0.7 * curves[:5].mean(0)).all()


def test_the_language_model_learned_and_selecting_by_the_trained_indexer_costs_least(numbers: dict[str, Any]) -> None:
    curve, loss = numbers["curves"]["language model"], numbers["loss"]
    assert len(curve) == SHORT["steps"]
    assert curve[-1] < 3.0 < curve[0]
    assert set(loss) == {"dense", *numbers["recall"]}
    assert all(1.0 < value < 4.0 for value in loss.values())


def test_numbers_settings_table_and_figure_are_written(written: tuple[str, Path], numbers: dict[str, Any]) -> None:
    output, out = written
    assert {name: numbers["settings"][name] for name in SHORT} == SHORT
    assert numbers["text"]["bytes per token"] == 1
    assert numbers["environment"]["torch"] == torch.__version__
    assert numbers["seconds"]["all"] > 0
    for name, loss in numbers["loss"].items():
        line = next(line for line in output.splitlines() if line.startswith(f"│ {name} "))
        assert f"{loss:.4f}" in line
    drawing = (out / "warmup.svg").read_text(encoding="utf-8")
    assert drawing.startswith("<?xml")
    assert len(drawing) < 150_000


def small(warmup: Any, **change: int) -> Any:
    return warmup.Settings(
        **{**SHORT, "steps": 20, "warmup_steps": 20, "context": 32, "topk": 4, "evaluate": 2, **change}
    )


def test_warming_up_changes_the_indexers_and_leaves_the_model_as_it_was(warmup: Any) -> None:
    s, show = small(warmup), Console(quiet=True)
    train, _, _ = warmup.text()
    model, _ = warmup.train_model(s, train, show)
    indexers = torch.nn.ModuleList(warmup.Indexer(s) for _ in range(s.layers))
    before, first = copy.deepcopy(model.state_dict()), copy.deepcopy(indexers.state_dict())
    warmup.warm_up(s, model, indexers, train, show)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(value.requires_grad for value in model.parameters())
    changed = {name for name, value in indexers.state_dict().items() if not torch.equal(value, first[name])}
    assert changed == set(first)


def test_only_the_indexers_get_gradients(warmup: Any) -> None:
    s, show = small(warmup), Console(quiet=True)
    train, _, _ = warmup.text()
    model = warmup.Model(s).requires_grad_(False)
    indexers = torch.nn.ModuleList(warmup.Indexer(s) for _ in range(s.layers))
    warmup.warm_up(s, model, indexers, train, show)
    assert all(x.grad is None for x in model.parameters())
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in indexers.parameters())


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(warmup: Any) -> None:
    show = Console(quiet=True)
    one, again, other = (warmup.run(small(warmup, seed=seed), show) for seed in (3, 3, 4))
    for name in ("recall", "loss", "curves"):
        assert one[name] == again[name] != other[name]


def test_the_held_out_text_is_no_part_of_the_training_text(warmup: Any) -> None:
    train, held, _ = warmup.text()
    assert len(train) > 5 * len(held) > 0
    seen = bytes(train.tolist())
    parts = warmup.sequences(held, 32, 256, torch.Generator().manual_seed(0)).tolist()
    assert sum(bytes(part) in seen for part in parts) == 0


def test_recall_is_the_share_of_attention_that_a_direct_computation_finds(warmup: Any) -> None:
    b, s, heads, hn, topk = 2, 9, 3, 4, 3
    query, key = torch.randn(2, b, s, heads, hn, dtype=torch.float64)
    indices = torch.stack(
        [
            torch.stack(
                [torch.randperm(i + 1)[:topk].sort().values if i >= topk else torch.full((topk,), -1) for i in range(s)]
            )
            for _ in range(b)
        ]
    )
    indices[0, 1, 0], indices[1, 8, 2] = 1, -1
    found = warmup.recall(warmup.attention_mass(query, key), indices)
    for batch in range(b):
        for row in range(s):
            share = 0.0
            for head in range(heads):
                logits = [float(query[batch, row, head] @ key[batch, t, head]) / hn**0.5 for t in range(row + 1)]
                exps = torch.tensor(logits, dtype=torch.float64).exp()
                share += float(sum(exps[t] for t in indices[batch, row].tolist() if t >= 0) / exps.sum()) / heads
            assert float(found[batch, row]) == pytest.approx(share, abs=1e-12)


def test_every_way_selects_visible_keys_and_the_window_the_last_ones(warmup: Any) -> None:
    s = small(warmup)
    untrained, trained = (torch.nn.ModuleList(warmup.Indexer(s) for _ in range(s.layers)) for _ in range(2))
    ways = warmup.ways_to_select(s, untrained, trained)
    x, query, key = torch.randn(2, 7, s.width), *torch.randn(2, 2, 7, s.heads, s.width // s.heads)
    found: dict[str, Tensor] = {name: select(1, x, query, key) for name, select in ways.items()}
    for indices in found.values():
        assert indices.shape == (2, 7, s.topk)
        assert (indices[:, s.topk - 1 :] <= torch.arange(s.topk - 1, 7)[:, None]).all()
        assert (indices[:, s.topk - 1 :].sort().values.diff() > 0).all()
    assert found["sliding window"][1].tolist()[1] == [1, 0, -1, -1]
    assert found["sliding window"][1].tolist()[6] == [6, 5, 4, 3]
    best = warmup.attention_mass(query, key).sort(descending=True, stable=True).indices[..., : s.topk]
    assert torch.equal(found["oracle"][:, s.topk :].sort().values, best[:, s.topk :].sort().values)
    for name, indexers in (("untrained indexer", untrained), ("trained indexer", trained)):
        q, weights, k = indexers[1](x)
        scores = (torch.einsum("bshd,btd->bsht", q, k).relu() * weights.unsqueeze(-1)).sum(2)
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), float("-inf"))
        assert torch.equal(found[name][:, 6], scores.sort(descending=True, stable=True).indices[:, 6, : s.topk])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("--topk 600", "--topk must be less than --context (512), got 600."),
        ("--steps 0", "Invalid value for '--steps'"),
        (f"--out {EXAMPLE}", "--out must be a folder"),
    ],
)
def test_bad_options_are_refused_in_a_sentence(warmup: Any, options: str, sentence: str) -> None:
    done = CliRunner().invoke(warmup.app, options.split(), env={"COLUMNS": "300", "NO_COLOR": "1"})
    assert done.exit_code == 2
    assert sentence in done.output


def test_help_explains_every_option(warmup: Any) -> None:
    shown = CliRunner().invoke(warmup.app, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for name in (*SHORT, "seed", "out", "threads"):
        assert f"--{name.replace('_', '-')}" in shown
