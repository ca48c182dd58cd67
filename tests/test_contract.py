from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from headfold import IndexerGeometry, KeyRange, UnsupportedError, index_scores
from headfold.tiles import MIB

Q, W, K = torch.ones(5, 2, 3, 4), torch.ones(5, 2, 3), torch.ones(7, 2, 4)
META = torch.ones(7, 2, 4, device="meta")
RANGE = KeyRange.causal(5, 7)


def row(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.int32)


BREACHES: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    ({"q": Q[0]}, ValueError, "q must be [sq, b, h, d], got shape [2, 3, 4]"),
    ({"q": Q.int()}, TypeError, "q must be float16, bfloat16, float32 or float64, got torch.int32"),
    ({"q": Q.to(torch.complex64)}, TypeError, "q must be float16, bfloat16, float32 or float64, got torch.complex64"),
    (
        {"q": Q[:, :, :0], "weights": W[:, :, :0]},
        ValueError,
        "q needs at least one head and one channel, got h = 0, d = 4",
    ),
    ({"q": Q[..., :0], "k": K[..., :0]}, ValueError, "q needs at least one head and one channel, got h = 3, d = 0"),
    ({"weights": W[0]}, ValueError, "weights must be [sq, b, h], got shape [2, 3]"),
    ({"weights": W[:, :, :2]}, ValueError, "weights must be [sq, b, h] = [5, 2, 3] to match q, got [5, 2, 2]"),
    ({"weights": W.bool()}, TypeError, "weights must be float16, bfloat16, float32 or float64, got torch.bool"),
    ({"weights": W.to("meta")}, ValueError, "weights must be on q's device cpu, got meta"),
    ({"k": K[0]}, ValueError, "k must be [sk, b, d], got shape [2, 4]"),
    ({"k": K[:, :1]}, ValueError, "k must have q's batch size b = 2, got 1"),
    ({"k": K[..., :3]}, ValueError, "k must have q's width d = 4, got 3"),
    ({"k": K.double()}, TypeError, "k must have q's dtype torch.float32, got torch.float64. Cast one of them"),
    ({"k": META}, ValueError, "k must be on q's device cpu, got meta"),
    ({"layout": "bhsd"}, ValueError, "layout must be one of 'sbhd', 'bshd', 'thd', got 'bhsd'"),
    ({"impl": "cuda"}, ValueError, "impl must be one of 'auto', 'eager', 'triton', 'materialized', got 'cuda'"),
    ({"activation": "gelu"}, ValueError, "activation must be one of 'relu', None, got 'gelu'"),
    ({"scale": "2"}, TypeError, "scale must be a Python number, got str"),
    ({"scale": True}, TypeError, "scale must be a Python number, got bool"),
    ({"causal": 1}, TypeError, "causal must be True or False, got int"),
    (
        {"causal": True, "keys": RANGE},
        ValueError,
        "causal=True excludes keys, got both. Use keys=keys & KeyRange.causal",
    ),
    ({"keys": 3}, TypeError, "keys must be a KeyRange or None, got int"),
    ({"keys": KeyRange(row(4))}, ValueError, "keys.start must be [sq] = [5] or [b, sq] = [2, 5], got [4]"),
    (
        {"keys": KeyRange(end=row(5).expand(3, 5))},
        ValueError,
        "keys.end must be [sq] = [5] or [b, sq] = [2, 5], got [3, 5]",
    ),
    ({"keys": KeyRange(end=row(5).to("meta"))}, ValueError, "keys.end must be on q's device cpu, got meta"),
    ({"bias": torch.zeros(5, 7)}, ValueError, "bias must be [b or 1, sq, sk] = [2 or 1, 5, 7], got [5, 7]"),
    ({"bias": torch.zeros(2, 7, 5)}, ValueError, "bias must be [b or 1, sq, sk] = [2 or 1, 5, 7], got [2, 7, 5]"),
    (
        {"bias": torch.ones(1, 5, 7, dtype=torch.bool)},
        TypeError,
        "bias must be float16, bfloat16, float32 or float64, got torch.bool",
    ),
    ({"bias": torch.zeros(1, 5, 7, requires_grad=True)}, ValueError, "bias must not require grad, got one that does"),
    ({"workspace": -1}, ValueError, "workspace must be at least 0 bytes, got -1"),
    ({"workspace": 1e6}, TypeError, "workspace must be a number of bytes (int) or None, got float"),
    (
        {"layout": "thd", "q": Q[:, 0], "weights": W[:, 0], "k": K[:, 0]},
        ValueError,
        'layout "thd" needs keys=KeyRange.packed(...)',
    ),
    ({"layout": "thd", "keys": RANGE}, ValueError, "q must be [tq, h, d], got shape [5, 2, 3, 4]"),
]


@pytest.mark.parametrize("impl", ["eager", "materialized"])
@pytest.mark.parametrize(("change", "error", "said"), BREACHES, ids=[said[:60] for *_, said in BREACHES])
def test_a_breach_is_one_sentence_that_names_argument_need_and_value(
    change: dict[str, Any], error: type[Exception], said: str, impl: str
) -> None:
    call = {"q": Q, "weights": W, "k": K, "impl": impl, **change}
    with pytest.raises(error, match=re.escape(said)) as caught:
        index_scores(**call)
    assert str(caught.value).startswith("index_scores: ")
    assert "\n" not in str(caught.value)


def test_a_breach_is_found_before_anything_is_allocated() -> None:
    from headfold.lanes.measure import allocator_peak

    def breach() -> None:
        with pytest.raises(ValueError, match="workspace must be at least"):
            index_scores(Q, W, K, workspace=10)

    assert allocator_peak(breach, torch.device("cpu")).peak == 0


@pytest.mark.parametrize("grad", [False, True])
def test_too_small_a_workspace_names_the_smallest_that_works_and_that_one_works(grad: bool) -> None:
    geometry = IndexerGeometry(2, 5, 7, 3, 4)
    least = geometry.backward_scratch if grad else geometry.forward_scratch
    q = Q.clone().requires_grad_(grad)
    with pytest.raises(ValueError, match=f"workspace must be at least {least} bytes for this shape, got {least - 1}"):
        index_scores(q, W, K, workspace=least - 1)
    scores = index_scores(q, W, K, workspace=least)
    if grad:
        scores.sum().backward()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_at_the_model_shape_16_mib_of_workspace_is_enough(dtype: str) -> None:
    assert IndexerGeometry(1, 4096, 4096, 32, 128, dtype=dtype).backward_scratch <= 16 * MIB


def test_a_decode_step_over_a_long_cache_does_not_stage_all_of_it() -> None:
    assert IndexerGeometry(1, 1, 1 << 17, 64, 128, dtype="bfloat16").forward_scratch <= 16 * MIB


def test_unsupported_is_a_runtime_error() -> None:
    assert issubclass(UnsupportedError, RuntimeError)
