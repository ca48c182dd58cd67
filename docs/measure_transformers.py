"""Measure what transformers takes before and after headfold, for the table of docs/transformers.md.

    python docs/measure_transformers.py --threads 2     # writes docs/results/transformers.json
    python docs/regenerate.py                           # writes it into the page

The model has one layer of DeepSeek-V3.2: its published indexer, 16 attention heads of published width, small other
dimensions, random float32 weights. Every row runs in a fresh process, which gives two peaks of one call, both beyond
what was alive before it: growth of the resident set, and the allocator's bytes in a second run. A row whose plan is
larger than 24 GiB, or than this machine has free, is not started and says what it would need.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track

from headfold.integrations.transformers import apply
from headfold.integrations.transformers.masks import NAME, visible_keys
from headfold.lanes.measure import allocator_peak, environment, free_memory, in_fresh_process, process_peak
from headfold.lanes.record import show_bytes
from headfold.model_plan import plan_model
from headfold.transformers_plan import from_config, stock_step

OUT = Path(__file__).parent / "results" / "transformers.json"
CPU = torch.device("cpu")
LIMIT = 24 << 30
LENGTHS = (2048, 8192)
PHASES = ("indexer", "forward", "training step")
PATHS = ("stock", "headfold")
SIZES: dict[str, Any] = {
    "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 1,
    "hidden_size": 1024, "intermediate_size": 2048, "q_lora_rank": 512, "kv_lora_rank": 512, "vocab_size": 256,
    "mlp_layer_types": ["dense"],
}  # fmt: skip


def config() -> Any:
    """Return the model's configuration."""
    return transformers.DeepseekV32Config(**SIZES)


def planned(phase: str, path: str, s: int) -> int:
    """Return what the plan bills for the layer, attention included."""
    shape = from_config(config().to_dict(), "config", dtype="float32")
    bill = plan_model(replace(shape, training=phase == "training step"), s, stock=stock_step)
    return bill.stock if path == "stock" else bill.headfold


def call(model: Any, phase: str, s: int) -> Callable[[], Any]:
    """Return what a row runs."""
    ids = torch.randint(0, SIZES["vocab_size"], (1, s), generator=torch.Generator().manual_seed(0))
    if phase == "training step":

        def step() -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        return step
    if phase == "forward":
        return torch.no_grad()(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))
    indexer = model.model.layers[0].self_attn.indexer
    hidden, latent = torch.randn(1, s, SIZES["hidden_size"]), torch.randn(1, s, SIZES["q_lora_rank"])
    places = torch.arange(s)[None]
    turns = model.model.rotary_emb(hidden, places)
    mask: Any = torch.ones(1, s, s, dtype=torch.bool).tril()
    if model.config._attn_implementation == NAME:
        mask = visible_keys(1, s, s)  # what stands for it there
    return torch.no_grad()(lambda: indexer(hidden, latent, turns, mask, places))


def peaks(phase: str, path: str, s: int, threads: int) -> tuple[int, int]:
    """Return the growth of this process's resident set over a call, and the allocator's peak over another."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32, attn_implementation="sdpa")
    model.train(phase == "training step")
    if path == "headfold":
        apply(model, indexer_loss_coeff=1.0 if model.training else None)
    call(model, phase, 64)()  # what libraries take once
    run = call(model, phase, s)
    return process_peak(run), allocator_peak(run, CPU).peak


def row(phase: str, path: str, s: int, threads: int) -> dict[str, Any]:
    """Measure a row, or say what it would need."""
    found: dict[str, Any] = {"s": s, "phase": phase, "path": path, "planned": planned(phase, path, s)}
    if found["planned"] > min(LIMIT, free_memory(CPU)):
        return found | {"note": f"needs {show_bytes(found['planned'])}"}
    measured = in_fresh_process(peaks, phase, path, s, threads)
    if measured is None:
        return found | {"note": "the process was killed"}
    return found | dict(zip(("process", "allocator"), measured, strict=True))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and write the file."""
    parser = argparse.ArgumentParser(description="Measure what transformers takes before and after headfold.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="file to write (docs/results/transformers.json)")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="sequence lengths (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    err = Console(stderr=True)
    cells = [(phase, path, s, args.threads) for s in args.lengths for phase in PHASES for path in PATHS]
    rows = []
    for cell in track(cells, "peaks", console=err):
        rows.append(row(*cell))
        err.print(rows[-1])
    facts = environment(CPU) | {"transformers": transformers.__version__}
    tree = {"environment": facts, "settings": SIZES | {"b": 1, "dtype": "float32"}, "rows": rows}
    args.out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
