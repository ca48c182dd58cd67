"""Every row that is measured, group by group."""

from __future__ import annotations

from functools import partial

from measuring import calls, others
from measuring.rows import Row, Sizes

RATES = "rates"  # measured with every group, so that each file has its own
GROUPS = ("scores", "topk", "loss", "attention", "selected", "peers", "dtypes")
FULL: Sizes = {"b": 8, "s": 4096, "h": 32, "d": 128}
NARROW: Sizes = {"b": 8, "s": 4096, "h": 16, "d": 64}
LONG: Sizes = {"b": 1, "s": 32768, "h": 64, "d": 128}
CHUNK: Sizes = {"b": 1, "s": 32768, "h": 32, "d": 128}
TOPK = 2048


def catalog(groups: tuple[str, ...] = GROUPS) -> list[Row]:
    """Return the rows of the groups, the device's own rates first."""
    rows = [*_rates(), *_scores(), *_topk(), *_loss(), *_attention(), *_selected(), *_peers(), *_dtypes()]
    return [row for row in rows if row.group in (RATES, *groups)]


def _rates() -> list[Row]:
    product = [
        Row(RATES, "matrix product", {"n": n}, calls.product, dtype)
        for n, dtype in ((8192, "bfloat16"), (8192, "float16"), (4096, "float32"), (4096, "float64"))
    ]
    return [*product, Row(RATES, "copy", {"bytes": 4 << 30}, calls.copy, "uint8")]


def _both(name: str, shape: Sizes, *, by: calls.By = calls.ours, causal: bool = False) -> list[Row]:
    """Return a forward and its backward.   Those that compile are rehearsed."""
    call = f"index_scores, {name}{', causal' if causal else ''}"
    compiles = by is calls.ours or (by is calls.compiled and shape is FULL)  # LONG is out of memory before it runs
    ways = (("forward", calls.forward), ("backward", calls.backward))
    return [
        Row("scores", f"{call}, {way}", shape, partial(make, by=by, causal=causal), rehearsed=compiles)
        for way, make in ways
    ]


def _scores() -> list[Row]:
    rows = []
    for shape in (FULL, NARROW, LONG):
        for causal in (False, True):
            rows += _both("triton", shape, causal=causal)
        rows += _both("materialized", shape, by=calls.materialized)
        if shape is not NARROW:
            rows += _both("materialized, torch.compile", shape, by=calls.compiled)
            rows += _both("per-head loop", shape, by=calls.looped)
    return rows


def _topk() -> list[Row]:
    rows = []
    chunks = [{"b": 1, "sq": 32768, "sk": sk, "h": 32, "d": 128} for sk in (65536, 262144)]
    for shape in (FULL, CHUNK, *chunks):
        if shape is not FULL:  # the same call as a row of the scores
            small = shape is not chunks[-1]  # whose scores take 32 GiB
            scores = partial(calls.forward, causal=True)
            rows.append(Row("topk", "index_scores, triton, causal, forward", shape, scores, rehearsed=small))
        name, beside, in_no_order = f"index_topk {TOPK}, causal", {"topk": TOPK}, partial(calls.topk, in_order=False)
        rows += [
            Row("topk", name, shape, calls.topk, beside=beside, rehearsed=True),
            Row("topk", f"{name}, captured", shape, calls.captured, beside=beside),
            Row("topk", f"{name}, in no order", shape, in_no_order, beside=beside, rehearsed=True),
            Row(
                "topk",
                f"{name}, in no order, captured",
                shape,
                partial(calls.captured, make=in_no_order),
                beside=beside,
            ),
            Row(
                "topk", f"torch.topk {TOPK} of materialized scores, causal", shape, calls.topk_of_scores, beside=beside
            ),
        ]
    return rows


def _loss() -> list[Row]:
    rows = []
    for np, np_k, hn, s in ((16, 16, 64, 2048), (64, 64, 128, 4096), (128, 1, 256, 4096)):
        shape = {"s": s, "h": 32, "d": 128, "np": np, "np_k": np_k, "hn": hn}
        for impl in ("triton", "materialized"):
            ours, name = impl == "triton", f"indexer_loss with gradients, {impl}"
            rows.append(Row("loss", name, shape, partial(calls.loss, impl="" if ours else impl), rehearsed=ours))
    return rows


def _attention() -> list[Row]:
    rows = []
    shapes: list[Sizes] = [
        {"s": s, "topk": topk, "np": np, "np_k": np_k, "hn": hn}
        for np, np_k, hn, s, topk in ((16, 1, 64, 2048, 256), (16, 16, 64, 2048, 256), (64, 8, 128, 4096, 1024))
    ]
    shapes.append({"s": 4096, "topk": TOPK, "np": 128, "np_k": 1, "hn": 576, "v_dim": 512})
    for shape in shapes:
        ways = (("forward", calls.attention), ("backward", calls.attention_backward))
        rows += [Row("attention", f"sparse_attention, {way}", shape, make, rehearsed=True) for way, make in ways]
        rows += [
            Row("attention", f"sparse_attention, materialized, {way}", shape, partial(make, impl="materialized"))
            for way, make in ways
        ]
    return rows


def _selected() -> list[Row]:
    rows, shape = [], {"s": 4096, "topk": TOPK, "h": 32, "d": 128}
    for way, make in (("forward", calls.selected), ("backward", calls.selected_backward)):
        rows += [
            Row("selected", f"selected_scores, {way}", shape, make, rehearsed=True),
            Row("selected", f"selected_scores, materialized, {way}", shape, partial(make, impl="materialized")),
        ]
    return rows


def _peers() -> list[Row]:
    rows, beside = [], {"topk": TOPK}
    for shape in (FULL, CHUNK):
        rows += [Row("peers", name, shape, partial(others.peer, name=name), beside=beside) for name in others.NAMES]
        fused = "attn-gym lightning_indexer, fused, causal"
        rows.append(Row("peers", fused, shape, others.attn_gym_fused, beside=beside, rehearsed=True))
        rows.append(Row("peers", "cudnn indexer_forward, causal", shape, others.cudnn))
    return rows


def _dtypes() -> list[Row]:
    """Return scores in other dtypes and at the widest d; gradients where they run on tensor cores."""
    makes = {"forward": calls.forward, "backward": calls.backward}
    exact = [("forward", dtype, 128) for dtype in ("float32", "float64")]
    half = [(way, dtype, d) for dtype, d in (("float16", 128), ("float16", 256), ("bfloat16", 256)) for way in makes]
    return [
        Row(
            "dtypes",
            f"index_scores, triton, {way}",
            {"b": 1, "s": 4096, "h": 32, "d": d},
            makes[way],
            dtype,
            rehearsed=True,
        )
        for way, dtype, d in (*half, *exact)
    ]
