from __future__ import annotations

from typing import Any

import pytest
import torch

from headfold.lanes.syncfree import DataRead, no_data_reads

READS: dict[str, Any] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "format": lambda x: f"{x[0]}",
    "item": lambda x: x[0].item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "in": lambda x: 1.0 in x,
    "bool of any": lambda x: bool((x > 0).any()),
    "branch on any": lambda x: 1 if (x < 0).any() else 2,
    "assert on all": lambda x: torch._assert((x > 0).all(), ""),
    "equal": lambda x: torch.equal(x, x),
    "allclose": lambda x: torch.allclose(x, x),
    "nonzero": torch.nonzero,
    "argwhere": torch.argwhere,
    "where": lambda x: torch.where(x > 0),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": torch.unique,
    "bincount": lambda x: torch.bincount(x.long()),
    "repeat_interleave": lambda x: x.repeat_interleave(x.long()),
    "boolean index": lambda x: x[x > 0],
    "bytes as index": lambda x: x[x.to(torch.uint8)],
    "boolean assignment": lambda x: x.__setitem__(x > 0, x),
    "index of one number": lambda x: x[x.long()[0]],
    "slice to a number": lambda x: x[: x.long()[0]],
    "range": lambda x: range(x.long()[0]),
    "a number as fill": lambda x: torch.full((2,), x[0]),
    "a number as factor": lambda x: torch.add(x, x, alpha=x[0]),
}
KEEPS: dict[str, Any] = {
    "where of three": lambda x: torch.where(x > 0, x, -x),
    "masked_fill": lambda x: x.masked_fill(x > 0, 1),
    "gather": lambda x: x.gather(0, x.long() - 1),
    "integer index": lambda x: x[x.long() - 1],
    "sort": torch.sort,
    "any": lambda x: (x > 0).any(),
    "comparison": lambda x: x == x,
}


@pytest.mark.parametrize("name", READS)
def test_the_mode_that_forbids_reads_catches_them(name: str) -> None:
    with pytest.raises(DataRead), no_data_reads():
        READS[name](torch.ones(1))


@pytest.mark.parametrize("name", KEEPS)
def test_what_stays_on_the_device_is_let_through(name: str) -> None:
    with no_data_reads():
        KEEPS[name](torch.ones(1))


def test_after_the_mode_data_is_read_again() -> None:
    with pytest.raises(DataRead), no_data_reads():
        torch.ones(1).item()
    assert torch.ones(1).item() == 1
