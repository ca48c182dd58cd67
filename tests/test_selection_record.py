from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from headfold import KeyRange, SelectionRecord, index_topk
from headfold.lanes.syncfree import DataRead, no_data_reads

B, SQ, SK, TOPK = 2, 5, 9, 3


def indices(dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.arange(B * SQ * TOPK, dtype=dtype).view(B, SQ, TOPK) % SK


def rows(value: int = 4) -> torch.Tensor:
    return torch.full((SQ,), value, dtype=torch.int32)


RANGES: dict[str, Callable[[], KeyRange | None]] = {
    "every key": lambda: None,
    "causal": lambda: KeyRange.causal(SQ, SK),
    "compressed": lambda: KeyRange(offset=40, ratio=4),
    "ends": lambda: KeyRange(end=rows()),
    "per batch": lambda: KeyRange(start=torch.zeros(B, SQ, dtype=torch.int32), end=rows(), offset=-1),
}


def call(**changes: Any) -> dict[str, Any]:
    return {"b": B, "sq": SQ, "sk": SK, "topk": TOPK, "keys": None, **changes}


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("scores", [None, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layer", [None, 3])
@pytest.mark.parametrize("name", RANGES)
def test_a_file_gives_back_every_bit(
    tmp_path: Path, name: str, layer: int | None, scores: torch.dtype | None, index_dtype: torch.dtype
) -> None:
    keys = RANGES[name]()
    values = None if scores is None else torch.randn(B, SQ, TOPK, dtype=scores)
    if values is not None:
        values[0, 0] = torch.tensor([float("nan"), -0.0, float("-inf")], dtype=scores)
    record = SelectionRecord(indices(index_dtype).where(indices() != 2, -1), SK, keys, values, layer)
    record.save(tmp_path / "selection")
    again = SelectionRecord.load(tmp_path / "selection")
    assert (again.sk, again.layer) == (SK, layer)
    assert again.indices.dtype == index_dtype
    assert torch.equal(again.indices, record.indices)
    if values is None or again.scores is None:
        assert values is again.scores
    else:
        kind = torch.int32 if scores == torch.float32 else torch.int64
        assert torch.equal(again.scores.view(kind), values.view(kind))
    if keys is None or again.keys is None:
        assert keys is again.keys
    else:
        assert (again.keys.offset, again.keys.ratio) == (keys.offset, keys.ratio)
    again.rebind(keys).check("here", **call(keys=keys))


def test_bounds_that_share_memory_and_views_are_saved(tmp_path: Path) -> None:
    bound = torch.tensor([4], dtype=torch.int32).expand(SQ)
    SelectionRecord(indices()[:, :, :2], SK, KeyRange(bound, bound)).save(tmp_path / "selection")
    assert torch.equal(SelectionRecord.load(tmp_path / "selection").indices, indices()[:, :, :2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"b": 3}, "needs a selection for b = 3, got the selection of layer 7 for b = 2"),
        ({"sq": 4}, "sq = 4, got the selection of layer 7 for sq = 5"),
        ({"sk": 10}, "sk = 10, got the selection of layer 7 for sk = 9"),
        ({"topk": 4}, "topk = 4, got the selection of layer 7 for topk = 3"),
        ({"keys": KeyRange.causal(SQ, SK)}, "offset = 4, ratio = 1 where the selection's are None and 1"),
        ({"keys": KeyRange(offset=4, ratio=4)}, "offset = 4, ratio = 4"),
        ({"keys": KeyRange(end=rows())}, "one end where the selection has none"),
    ],
)
def test_a_call_that_does_not_match_is_refused(change: dict[str, Any], said: str) -> None:
    record = SelectionRecord(indices(), SK, layer=7)
    record.check("here", **call())
    record.check("here", **call(keys=KeyRange()))
    with pytest.raises(ValueError, match=said):
        record.check("here", **call(**change))


def test_equal_tensors_are_not_the_same_range_until_bound() -> None:
    mine, theirs = KeyRange(end=rows()), KeyRange(end=rows())
    record = SelectionRecord(indices(), SK, mine)
    record.check("here", **call(keys=mine))
    assert mine.end is not None
    record.check("here", **call(keys=KeyRange(end=mine.end.detach())))  # as a checkpoint hands it on
    with pytest.raises(ValueError, match=r"another tensor for end. Make the range once"):
        record.check("here", **call(keys=theirs))
    with pytest.raises(ValueError, match="one start"):
        record.check("here", **call(keys=KeyRange(start=rows(), end=mine.end)))
    with pytest.raises(ValueError, match="no end"):
        record.check("here", **call(keys=None))
    record.rebind(theirs).check("here", **call(keys=theirs))


def test_rebind_compares_what_ops_read() -> None:
    record = SelectionRecord(indices(), SK, KeyRange(end=rows(SK + 5)))
    record.rebind(None)
    record.rebind(KeyRange(start=rows(-3), end=rows(SK)))
    record.rebind(KeyRange(end=rows(SK).expand(B, SQ)))
    other = rows(SK)
    other[2] = 1
    with pytest.raises(ValueError, match=r"keys.end must equal the selection's, got 2 rows that differ"):
        record.rebind(KeyRange(end=other))
    with pytest.raises(ValueError, match="keys must equal the range of the selection, got offset = 0"):
        record.rebind(KeyRange(offset=0))
    with pytest.raises(ValueError, match=r"keys.end must be \[sq\] = \[5\]"):
        record.rebind(KeyRange(end=other[:2]))


def test_a_check_reads_no_data() -> None:
    keys, others = KeyRange(end=rows()), KeyRange(end=rows())
    record = SelectionRecord(indices(), SK, keys)
    with no_data_reads():
        record.check("here", **call(keys=keys))
        with pytest.raises(ValueError, match="another tensor"):
            record.check("here", **call(keys=others))
        with pytest.raises(DataRead):
            record.rebind(others)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"indices": indices().float()}, TypeError, "indices must be an int32 or int64 tensor, got torch.float32"),
        ({"indices": [1]}, TypeError, "got list"),
        ({"indices": indices()[0]}, ValueError, r"indices must be \[b, sq, topk\], got shape \[5, 3\]"),
        ({"sk": -1}, ValueError, "sk must be at least 0, got -1"),
        ({"sk": 2.0}, TypeError, "sk must be an int, got float"),
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"scores": torch.zeros(B, SQ, 2)}, ValueError, r"scores must be floating and shaped as indices, \[2, 5, 3\]"),
        ({"scores": indices()}, ValueError, "got torch.int32"),
        ({"keys": 3}, TypeError, "keys must be a KeyRange or None, got int"),
        ({"keys": KeyRange(end=rows()[:2])}, ValueError, r"keys.end must be \[sq\] = \[5\] or .* got \[2\]"),
    ],
)
def test_a_breach_is_one_sentence(change: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SelectionRecord(**{"indices": indices(), "sk": SK, **change})


def altered(path: Path, metadata: dict[str, str | None] | None = None, **tensors: torch.Tensor | None) -> Path:
    """Write a good selection with some metadata or tensors replaced or left out."""
    SelectionRecord(indices(), SK, KeyRange(end=rows()), layer=1).save(path)
    with safe_open(path, framework="pt") as file:
        held = {name: file.get_tensor(name) for name in file.keys()} | tensors  # noqa: SIM118 - no dict
        said = (file.metadata() or {}) | (metadata or {})
    save_file(
        {name: x for name, x in held.items() if x is not None}, path, {n: v for n, v in said.items() if v is not None}
    )
    return path


@pytest.mark.parametrize(
    ("metadata", "tensors", "said"),
    [
        ({"version": "2"}, {}, "must have version 1 of its format, got '2'. Save it again"),
        ({"version": None}, {}, "got None"),
        ({"format": None}, {}, "must be a file of SelectionRecord.save, got one that holds end, indices"),
        ({}, {"indices": None}, "must be a file of SelectionRecord.save, got one that holds end"),
        ({"sk": None}, {}, "must hold one whole selection: metadata sk must be given"),
        ({"sk": "many"}, {}, "metadata sk of .* must be a whole number, got 'many'"),
        ({"ratio": "0"}, {}, "must hold one whole selection: KeyRange: ratio must be at least 1, got 0"),
        ({"layer": "-2"}, {}, "layer must be at least 0, got -2"),
        ({}, {"indices": indices().float()}, "indices must be an int32 or int64 tensor"),
        ({}, {"end": rows()[:1]}, "keys.end must be"),
        ({}, {"end": rows().long()}, "end must be an int32 tensor"),
        ({}, {"scores": torch.zeros(1)}, "scores must be floating"),
        ({}, {"indices": indices() + 1}, "must be from -1 to sk - 1 = 8, got 3 others"),
        ({}, {"indices": indices() - 2}, "from -1 to"),
    ],
)
def test_a_bad_file_is_refused_in_a_sentence(
    tmp_path: Path, metadata: dict[str, str | None], tensors: dict[str, torch.Tensor | None], said: str
) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        SelectionRecord.load(altered(tmp_path / "selection", metadata, **tensors))
    assert str(caught.value).startswith("SelectionRecord.load: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_what_does_not_open_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "selection"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"SelectionRecord.load: .* must be a safetensors file"):
        SelectionRecord.load(path)


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SelectionRecord.save: path must be a file that can be written"):
        SelectionRecord(indices(), SK).save(tmp_path / "absent" / "selection")


def test_without_safetensors_it_says_what_to_install() -> None:
    code = """
import sys
sys.modules["safetensors"] = None
import torch, headfold
record = headfold.SelectionRecord(torch.zeros(1, 2, 3, dtype=torch.int32), 4)
for use in (record.save, headfold.SelectionRecord.load):
    try:
        use("file")
    except ModuleNotFoundError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["SelectionRecord.save", "SelectionRecord.load"]
    assert all("pip install 'headfold[cli]'" in line for line in said)


def test_a_selection_of_index_topk_makes_the_round_trip(tmp_path: Path) -> None:
    q, weights, k = torch.randn(SQ, B, 2, 4), torch.randn(SQ, B, 2), torch.randn(SK, B, 4)
    chosen = index_topk(q, weights, k, TOPK, causal=True, with_scores=True)
    record = SelectionRecord(chosen.indices, SK, KeyRange.causal(SQ, SK), chosen.scores, 0)
    record.save(tmp_path / "selection")
    again = SelectionRecord.load(tmp_path / "selection")
    assert again.scores is not None
    assert chosen.scores is not None
    assert torch.equal(again.indices, chosen.indices)
    assert torch.equal(again.scores, chosen.scores)
