from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from headfold import IndexReuse, KeyRange, ReuseSchedule, SelectionRecord, TopK, index_topk
from headfold.lanes.syncfree import no_data_reads
from headfold.presets import find_preset

MEGATRON = "megatron.core.transformer.experimental_attention_variant.dsa"
B, S, D, H, TOPK = 2, 12, 8, 2, 4
# Layers 0, 1 and 4 compute; 2, 3 and 5 reuse.
SCHEDULE = ReuseSchedule.explicit([True, True, False, False, True, False])


def chosen(value: int = 0, b: int = B, sq: int = S, topk: int = TOPK) -> TopK:
    return TopK(torch.full((b, sq, topk), value, dtype=torch.int32), None)


def call(**changes: Any) -> dict[str, Any]:
    return {"b": B, "sq": S, "sk": S, "topk": TOPK, **changes}


def record(layer: int | None, value: int = 0, keys: KeyRange | None = None) -> SelectionRecord:
    return SelectionRecord(chosen(value).indices, S, keys, None, layer)


# Schedules


@settings(deadline=None)  # the first example imports Megatron
@given(st.integers(1, 90), st.integers(1, 9), st.integers(0, 12))
def test_every_n_is_what_megatron_skips(layers: int, n: int, offset: int) -> None:
    dsa = pytest.importorskip(MEGATRON)
    schedule = ReuseSchedule.every(layers, n, offset=offset)
    for layer in range(layers):
        assert schedule.computes(layer) == (not dsa.is_dsa_skip_topk_layer(layer + 1, offset, n))
        assert schedule.source(layer) + 1 == dsa.source_dsa_compute_layer(layer + 1, offset, n)


def indexer_types(name: str, **settings: Any) -> list[str]:
    """What a configuration of transformers makes of its settings."""
    pytest.importorskip("transformers")
    module, config = name.split(".")
    configs = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    types: list[str] = getattr(configs, config)(**settings).indexer_types
    return types


CONFIGS = ["glm_moe_dsa.GlmMoeDsaConfig", "mistral_large4.MistralLarge4TextConfig"]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("n", "offset"), [(1, 2), (4, 1), (4, 2), (4, 3), (3, 7)])
def test_indexer_types_are_what_transformers_makes_of_frequency_and_offset(name: str, n: int, offset: int) -> None:
    types = indexer_types(name, num_hidden_layers=11, index_topk_freq=n, index_skip_topk_offset=offset)
    assert ReuseSchedule.from_indexer_types(types) == ReuseSchedule.every(11, n, offset=offset)


def test_a_pattern_is_what_transformers_reads_it_as() -> None:
    types = indexer_types(CONFIGS[0], num_hidden_layers=6, index_topk_pattern="FFSSFS")
    assert ReuseSchedule.from_indexer_types("FFSSFS") == ReuseSchedule.from_indexer_types(types) == SCHEDULE


def test_at_offset_0_transformers_would_start_with_a_layer_that_reuses() -> None:
    types = indexer_types(CONFIGS[0], num_hidden_layers=6, index_topk_freq=4, index_skip_topk_offset=0)
    assert types[0] == "shared"
    with pytest.raises(ValueError, match="layer 0 must compute"):
        ReuseSchedule.from_indexer_types(types)
    assert ReuseSchedule.every(6, 4).computes(0)


def test_glm_5_2_computes_in_as_many_layers_as_its_preset_says() -> None:
    preset = find_preset("glm-5.2")
    schedule = ReuseSchedule.every(preset.layers, 4, offset=3)  # published as full at 0, 1, 2, 6, 10, ..., 74
    assert [layer for layer in range(12) if schedule.computes(layer)] == [0, 1, 2, 6, 10]
    assert sum(schedule.computing) == preset.indexers


@given(st.lists(st.booleans(), max_size=20), st.data())
def test_a_stage_needs_what_the_stage_before_hands(rest: list[bool], data: st.DataObject) -> None:
    schedule = ReuseSchedule.explicit([True, *rest])
    layers = len(schedule)
    cuts = sorted(data.draw(st.sets(st.integers(1, layers - 1)))) if layers > 1 else []
    edges = [0, *cuts, layers]
    stages = [schedule.stage(first, end) for first, end in itertools.pairwise(edges)]
    assert stages[0].needs is None
    assert stages[-1].hands is None
    assert sorted(layer for stage in stages for layer in (*stage.computes, *stage.reuses)) == list(range(layers))
    for stage, after in itertools.pairwise(stages):
        assert stage.hands == after.needs
    for first, stage in zip(edges, stages, strict=False):
        # Those that wait are the reuse layers before the stage's first computing one.
        alone = [layer for layer in stage.reuses if not stage.computes or layer < stage.computes[0]]
        assert list(stage.waits) == alone
        assert (stage.needs is None) == (not alone)
        for layer in stage.waits:
            assert schedule.source(layer) == stage.needs
            assert stage.needs is not None
            assert stage.needs < first
            assert schedule.computes(stage.needs)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: ReuseSchedule.explicit([False, True]), ValueError, r"layer 0 must compute, got one .* handed=\.\.\."),
        (lambda: ReuseSchedule.explicit([]), ValueError, "computing must name at least one layer, got none"),
        (lambda: ReuseSchedule.explicit("FS"), TypeError, r"computing must be a tuple of bools, got \('F', 'S'\)"),  # type: ignore[arg-type]
        (lambda: ReuseSchedule.from_indexer_types(["full", "none"]), ValueError, "layer 1 must be one of .* 'none'"),
        (lambda: ReuseSchedule.every(0, 4), ValueError, "layers must be at least 1, got 0"),
        (lambda: ReuseSchedule.every(4, 0), ValueError, "n must be at least 1, got 0"),
        (lambda: ReuseSchedule.every(4, 4, offset=-1), ValueError, "offset must be at least 0, got -1"),
        (lambda: ReuseSchedule.every(4, 2.0), TypeError, "n must be an int, got float"),  # type: ignore[arg-type]
        (lambda: SCHEDULE.source(6), ValueError, "layer must be below the schedule's 6 layers, got 6"),
        (lambda: SCHEDULE.computes(-1), ValueError, "layer must be at least 0, got -1"),
        (lambda: SCHEDULE.stage(2, 2), ValueError, "end must be at least 3, got 2"),
        (lambda: SCHEDULE.stage(2, 7), ValueError, "layer must be below the schedule's 6 layers, got 6"),
        (lambda: IndexReuse(SCHEDULE, handed=record(2)), ValueError, "handed must name a layer that computes .* 2"),
        (lambda: IndexReuse(SCHEDULE, handed=record(None)), ValueError, "got layer None"),
        (lambda: IndexReuse(SCHEDULE, handed=chosen()), TypeError, "must be a SelectionRecord, got TopK"),  # type: ignore[arg-type]
        (lambda: IndexReuse.replay(SCHEDULE, [record(9)]), ValueError, "records must name a layer .* got layer 9"),
        (lambda: IndexReuse.replay(SCHEDULE, [record(1), record(1)]), ValueError, "a layer once, got layer 1 twice"),
    ],
)
def test_a_breach_is_one_sentence(make: Callable[[], Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


# The carrier


def test_a_layer_reads_its_source_and_computes_once() -> None:
    reuse, made = IndexReuse(SCHEDULE), []

    def compute(layer: int) -> Callable[[], TopK]:
        return lambda: made.append(layer) or chosen(layer)  # type: ignore[func-returns-value]

    read = [int(reuse.select(layer, compute(layer), **call()).indices[0, 0, 0]) for layer in range(6)]
    assert read == [0, 1, 1, 1, 4, 4]
    assert made == [0, 1, 4]
    assert [kept.layer for kept in reuse.records()] == made
    # Layer 3 again, after layer 4 computed: its own source, not the latest.
    assert int(reuse.select(3, **call()).indices[0, 0, 0]) == 1


def test_scores_travel_with_the_selection() -> None:
    scores = torch.randn(B, S, TOPK)
    reuse = IndexReuse(SCHEDULE)
    reuse.select(1, lambda: TopK(chosen().indices, scores), **call())
    assert reuse.select(2, **call()).scores is scores


def test_two_passes_share_nothing() -> None:
    one, two = IndexReuse(SCHEDULE), IndexReuse(SCHEDULE)
    one.select(1, lambda: chosen(1), **call())
    two.select(1, lambda: chosen(2), **call())
    assert [int(reuse.select(2, **call()).indices[0, 0, 0]) for reuse in (one, two)] == [1, 2]


def test_a_carrier_left_over_from_another_pass_is_refused() -> None:
    reuse = IndexReuse(SCHEDULE)
    reuse.select(0, chosen, **call())
    with pytest.raises(ValueError, match=r"layer 0: a carrier lives for one forward pass, got a second selection"):
        reuse.select(0, chosen, **call())


MISMATCHES = [
    ({"b": 1}, "b = 1"),
    ({"sq": 3}, "sq = 3"),
    ({"sk": S + 1}, "sk = 13"),
    ({"topk": 5}, "topk = 5"),
    ({"keys": KeyRange.causal(S, S)}, "keys must be the range"),
    ({"keys": KeyRange(end=torch.ones(S, dtype=torch.int32))}, "keys must be the range"),
]


@pytest.mark.parametrize(("change", "said"), MISMATCHES, ids=lambda x: x if isinstance(x, str) else "")
def test_reading_a_selection_of_another_call_raises(change: dict[str, Any], said: str) -> None:
    reuse = IndexReuse(SCHEDULE)
    reuse.select(1, chosen, **call())
    with pytest.raises(ValueError, match=f"IndexReuse.select, layer 2.*{said}"):
        reuse.select(2, chosen, **call(**change))
    with pytest.raises(ValueError, match=said):
        IndexReuse(SCHEDULE, handed=record(1)).select(2, chosen, **call(**change))
    with pytest.raises(ValueError, match=said):
        IndexReuse.replay(SCHEDULE, [record(1)]).select(1, chosen, **call(**change))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (chosen(sq=3), "sq = 12, got the selection of layer 0 for sq = 3"),
        (chosen(b=1), "b = 2, got"),
        (chosen(topk=3), "topk = 4, got"),
    ],
)
def test_a_selection_that_does_not_fit_its_own_call_is_not_kept(made: TopK, said: str) -> None:
    reuse = IndexReuse(SCHEDULE)
    with pytest.raises(ValueError, match=said):
        reuse.select(0, lambda: made, **call())
    assert reuse.records() == ()


def test_a_range_in_tensors_is_the_pass_s_own() -> None:
    keys = KeyRange(end=torch.arange(1, S + 1, dtype=torch.int32))
    assert keys.end is not None
    reuse = IndexReuse(SCHEDULE)
    reuse.select(1, chosen, **call(keys=keys))
    reuse.select(2, **call(keys=keys))
    with pytest.raises(ValueError, match="another tensor for end"):
        reuse.select(2, **call(keys=KeyRange(end=keys.end.clone())))


def test_without_its_source_a_reuse_layer_fails_closed() -> None:
    computed: list[int] = []

    def compute() -> TopK:
        computed.append(1)
        return chosen()

    reuse = IndexReuse(SCHEDULE)
    with pytest.raises(ValueError, match=r"layer 2 reuses the selection of layer 1, got selections of layers: none"):
        reuse.select(2, compute, **call())
    assert computed == []
    reuse.select(0, compute, **call())
    with pytest.raises(ValueError, match=r"layer 1, got selections of layers: 0; handed over: none\. Run that layer"):
        reuse.select(2, compute, **call())
    assert computed == [1]
    with pytest.raises(ValueError, match="handed over: 0"):
        IndexReuse(SCHEDULE, handed=record(0)).select(2, compute, **call())
    with pytest.raises(ValueError, match="compute must be given for a layer that computes, got None"):
        reuse.select(1, **call())


def test_stages_hand_over_what_the_next_one_needs() -> None:
    schedule = ReuseSchedule.from_indexer_types("FFSSSSFS")
    whole = IndexReuse(schedule)
    wanted = [int(whole.select(i, lambda i=i: chosen(i), **call()).indices[0, 0, 0]) for i in range(8)]  # type: ignore[misc]
    handed, read = None, []
    for first, end in ((0, 3), (3, 5), (5, 6), (6, 8)):  # the middle two only reuse: they pass on what they got
        stage = schedule.stage(first, end)
        assert (handed is None) == (stage.needs is None)
        reuse = IndexReuse(schedule, handed=handed)
        read += [int(reuse.select(i, lambda i=i: chosen(i), **call()).indices[0, 0, 0]) for i in range(first, end)]  # type: ignore[misc]
        handed = reuse.hand_over(end) if end < 8 else None
        assert (None if handed is None else handed.layer) == stage.hands
    assert read == wanted


def test_a_stage_without_the_selection_cannot_hand_it_over() -> None:
    with pytest.raises(ValueError, match=r"IndexReuse.hand_over: layer 3 reuses the selection of layer 1"):
        IndexReuse(SCHEDULE).hand_over(3)
    assert IndexReuse(SCHEDULE).hand_over(4) is None


def test_a_handed_selection_of_the_layer_itself_is_refused() -> None:
    with pytest.raises(ValueError, match=r"handed must come from a layer before this stage.*layer_number - 1"):
        IndexReuse(SCHEDULE, handed=record(4)).select(4, chosen, **call())


# Replay


def test_saved_selections_replay_through_the_same_calls(tmp_path: Path) -> None:
    keys = KeyRange(end=torch.arange(1, S + 1, dtype=torch.int32))
    reuse = IndexReuse(SCHEDULE)
    forward = [reuse.select(layer, lambda layer=layer: chosen(layer), **call(keys=keys)) for layer in range(6)]  # type: ignore[misc]
    for kept in reuse.records():
        kept.save(tmp_path / f"layer-{kept.layer}")
    loaded = [SelectionRecord.load(path).rebind(keys) for path in sorted(tmp_path.iterdir())]
    again = IndexReuse.replay(SCHEDULE, loaded)

    def compute() -> TopK:
        raise AssertionError("replay computed")

    for _ in range(2):  # replay has no passes
        for layer, wanted in enumerate(forward):
            assert torch.equal(again.select(layer, compute, **call(keys=keys)).indices, wanted.indices)


def test_replay_without_a_record_fails_closed() -> None:
    replay = IndexReuse.replay(SCHEDULE, [record(0)])
    for layer in (1, 2):
        with pytest.raises(
            ValueError, match=rf"layer {layer} needs its record of layer 1, got selections of layers: 0"
        ):
            replay.select(layer, chosen, **call())


# Recomputation, CUDA graphs and compilation


class Layer(nn.Module):
    """Attention of one head over selected keys, with an indexer of its own where the schedule computes."""

    def __init__(self, index: int, computed: list[int]) -> None:
        super().__init__()
        self.index, self.computed = index, computed
        self.attention = nn.Linear(D, 3 * D, dtype=torch.float64)
        self.indexer = nn.Linear(D, H * D + H + D, dtype=torch.float64) if SCHEDULE.computes(index) else None

    def select(self, x: Tensor, keys: KeyRange) -> TopK:
        assert self.indexer is not None
        self.computed.append(self.index)
        q, weights, k = self.indexer(x).split([H * D, H, D], dim=-1)
        return index_topk(q.unflatten(-1, (H, D)), weights, k, TOPK, keys=keys, layout="bshd")

    def forward(self, x: Tensor, reuse: IndexReuse, keys: KeyRange) -> Tensor:
        compute = None if self.indexer is None else lambda: self.select(x, keys)
        indices, _ = reuse.select(self.index, compute, b=B, sq=S, sk=S, topk=TOPK, keys=keys)
        query, key, value = self.attention(x).chunk(3, dim=-1)
        chosen_rows = indices.clamp(min=0).long().unsqueeze(-1).expand(-1, -1, -1, D)
        key, value = (z.unsqueeze(1).expand(-1, S, -1, -1).gather(2, chosen_rows) for z in (key, value))
        logits = (query.unsqueeze(2) * key).sum(-1).masked_fill(indices < 0, float("-inf"))
        out: Tensor = x + (logits.softmax(-1).unsqueeze(-1) * value).sum(2)
        return out


def stack() -> tuple[list[Layer], list[int]]:
    torch.manual_seed(0)
    computed: list[int] = []
    return [Layer(index, computed) for index in range(len(SCHEDULE))], computed


def through(layers: list[Layer], x: Tensor, reuse: IndexReuse, keys: KeyRange) -> Tensor:
    for layer in layers:
        x = layer(x, reuse, keys)
    return x


def run(
    layers: list[Layer], reuse: IndexReuse, keys: KeyRange, segments: list[slice], reentrant: bool | None
) -> tuple[Tensor, ...]:
    """Output and gradients; checkpointed by segments unless reentrant is None."""
    x = torch.randn(B, S, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y: Tensor = x
    for segment in segments:

        def part(y: Tensor, segment: slice = segment) -> Tensor:
            return through(layers[segment], y, reuse, keys)

        y = part(y) if reentrant is None else checkpoint(part, y, use_reentrant=reentrant)
    used = [p for layer in layers for name, p in layer.named_parameters() if name.startswith("attention")]
    (y.square().sum()).backward()
    grads = [x.grad, *(p.grad for p in used)]
    assert all(grad is not None for grad in grads)
    return (y.detach(), *(grad for grad in grads if grad is not None))


SEGMENTS = {
    "one a layer": [slice(i, i + 1) for i in range(6)],
    "source and reader apart": [slice(0, 2), slice(2, 3), slice(3, 5), slice(5, 6)],
    "all in one": [slice(0, 6)],
}
RANGES = {
    "causal": lambda: KeyRange.causal(S, S),
    "ends": lambda: KeyRange(end=torch.arange(1, S + 1, dtype=torch.int32)),
}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize("visible", RANGES)
def test_recomputation_reads_what_the_forward_pass_selected(visible: str, segments: str, reentrant: bool) -> None:
    keys = RANGES[visible]()
    layers, computed = stack()
    wanted = run(layers, IndexReuse(SCHEDULE), keys, SEGMENTS[segments], None)
    assert computed == [0, 1, 4]
    layers, computed = stack()
    reuse = IndexReuse(SCHEDULE)
    got = run(layers, reuse, keys, SEGMENTS[segments], reentrant)
    assert computed == [0, 1, 4]
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_a_selection_that_changed_in_between_would_show() -> None:
    """The gradients above depend on the selection: another one gives others."""
    layers, _ = stack()
    wanted = run(layers, IndexReuse(SCHEDULE), KeyRange.causal(S, S), SEGMENTS["all in one"], None)
    layers, _ = stack()
    backwards = torch.arange(S, dtype=torch.int32).view(1, S, 1) - torch.arange(TOPK, dtype=torch.int32)
    others = [SelectionRecord(backwards.clamp(min=-1).expand(B, S, TOPK), S, KeyRange.causal(S, S), None, layer)
              for layer in (0, 1, 4)]  # fmt: skip
    got = run(layers, IndexReuse.replay(SCHEDULE, others), KeyRange.causal(S, S), SEGMENTS["all in one"], None)
    assert not torch.allclose(got[1], wanted[1])


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_range_handed_through_a_checkpoint_is_still_the_same(reentrant: bool) -> None:
    reuse = IndexReuse(SCHEDULE)
    end = torch.arange(1, S + 1, dtype=torch.int32)

    def part(x: Tensor, end: Tensor) -> Tensor:
        for layer in (1, 2):
            reuse.select(layer, chosen, **call(keys=KeyRange(end=end)))
        return x * 2

    x = torch.ones(3, requires_grad=True)
    checkpoint(part, x, end, use_reentrant=reentrant).sum().backward()
    reuse.select(3, **call(keys=KeyRange(end=end)))


def test_a_pass_reads_no_data() -> None:
    keys = KeyRange(end=torch.arange(1, S + 1, dtype=torch.int32))
    with no_data_reads():
        reuse = IndexReuse(SCHEDULE, handed=record(0))
        for layer in range(1, 6):
            reuse.select(layer, chosen, **call(keys=keys))
        reuse.hand_over(5)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("given", [True, False], ids=["carrier given", "carrier made inside"])
def test_a_pass_compiles_with_fullgraph(given: bool) -> None:
    layers, computed = stack()
    keys = KeyRange(end=torch.arange(1, S + 1, dtype=torch.int32))
    x = torch.randn(B, S, D, dtype=torch.float64)

    def model(x: Tensor, keys: KeyRange, reuse: IndexReuse | None) -> Tensor:
        reuse = IndexReuse(SCHEDULE) if reuse is None else reuse
        return through(layers, x, reuse, keys)

    wanted = model(x, keys, None)
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counted)
    for _ in range(2):
        computed.clear()  # or its length would be guarded
        reuse = IndexReuse(SCHEDULE) if given else None
        torch.testing.assert_close(compiled(x, keys, reuse), wanted)
        if reuse is not None:
            assert [kept.layer for kept in reuse.records()] == [0, 1, 4]
            assert reuse.hand_over(5) is reuse.records()[-1]
    assert counted.frame_count == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_pass_compiles_once_for_all_sizes() -> None:
    def model(q: Tensor, weights: Tensor, k: Tensor) -> Tensor:
        (sq, b), sk = q.shape[:2], k.shape[0]
        reuse, keys = IndexReuse(SCHEDULE), KeyRange.causal(sq, sk)

        def read(layer: int, compute: Callable[[], TopK] | None = None) -> Tensor:
            return reuse.select(layer, compute, b=b, sq=sq, sk=sk, topk=3, keys=keys).indices

        return read(1, lambda: index_topk(q, weights, k, 3, keys=keys)) + read(2)

    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counted)
    frames = []
    for sq, sk in ((5, 7), (6, 9), (10, 13)):  # none equal to another size, which the compiler would guard
        inputs = torch.randn(sq, B, H, D), torch.randn(sq, B, H), torch.randn(sk, B, D)
        assert torch.equal(compiled(*inputs), model(*inputs))
        frames.append(counted.frame_count)
    assert len(set(frames)) == 1


@pytest.mark.usefixtures("fresh_dynamo")
def test_checkpoints_inside_a_compiled_pass_train_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # The compiler has to be told that what a checkpoint keeps is not to be kept again in backward.
    flag = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if not hasattr(torch._dynamo.config, flag):
        pytest.skip(f"torch {torch.__version__} has no {flag}")
    monkeypatch.setattr(torch._dynamo.config, flag, True)
    layers, _ = stack()
    keys = KeyRange.causal(S, S)
    x = torch.randn(B, S, D, dtype=torch.float64).requires_grad_()

    def model(x: Tensor, checkpointed: bool) -> Tensor:
        reuse = IndexReuse(SCHEDULE)
        for layer in layers:
            x = checkpoint(layer, x, reuse, keys, use_reentrant=False) if checkpointed else layer(x, reuse, keys)
        return x

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for checkpointed in (True, False):
        (got,) = torch.autograd.grad(compiled(x, checkpointed).square().sum(), x)
        (wanted,) = torch.autograd.grad(model(x, checkpointed).square().sum(), x)
        assert torch.equal(got, wanted)


@pytest.mark.usefixtures("fresh_dynamo")
def test_replay_compiles_with_fullgraph() -> None:
    records = [record(layer, layer) for layer in (0, 1, 4)]
    replay = IndexReuse.replay(SCHEDULE, records)

    def read(replay: IndexReuse, x: Tensor) -> Tensor:
        return x + sum(replay.select(layer, **call()).indices for layer in range(6))

    compiled = torch.compile(read, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(replay, torch.zeros(())), torch.full((B, S, TOPK), 11.0))


@pytest.mark.usefixtures("fresh_dynamo")
def test_another_range_is_refused_while_compiling_too() -> None:
    end = torch.arange(S, dtype=torch.int32)

    def model(one: Tensor, two: Tensor) -> Tensor:
        reuse = IndexReuse(SCHEDULE)
        reuse.select(1, chosen, **call(keys=KeyRange(end=one)))
        return reuse.select(2, **call(keys=KeyRange(end=two))).indices

    whole = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(whole(end, end), chosen().indices)
    with pytest.raises(RuntimeError, match="another tensor for end"):
        whole(end, end.clone())
    broken = torch.compile(model, backend="eager")  # may leave the graph for what tracing cannot tell
    assert torch.equal(broken(end, end.detach()), chosen().indices)
    with pytest.raises(ValueError, match="another tensor for end"):
        broken(end, end.clone())
