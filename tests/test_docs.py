from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def test_the_pages_say_what_was_measured() -> None:
    command = [sys.executable, "-W", "ignore", str(ROOT / "docs" / "regenerate.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_example_runs_and_both_halves_agree() -> None:
    import torch

    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    before, after = code.split("# after")
    q, weights, k = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3), torch.randn(5, 2, 4)
    names = {"torch": torch, "q": q, "weights": weights, "k": k, "future": torch.ones(5, 5, dtype=torch.bool).triu(1)}
    exec(before, names)
    expected = names["scores"]
    exec("# after" + after, names)
    torch.testing.assert_close(names["scores"], expected)


def test_the_readme_s_carrier_runs_and_computes_where_its_schedule_says() -> None:
    import torch

    import headfold

    code = (ROOT / "README.md").read_text(encoding="utf-8").split("```python\n")[3].split("```")[0]
    q, weights, k = torch.randn(5, 2, 3, 4), torch.randn(5, 2, 3), torch.randn(7, 2, 4)
    names: dict[str, Any] = {"headfold": headfold, "q": q, "weights": weights, "k": k}
    names |= {"b": 2, "sq": 5, "sk": 7, "topk": 3}
    exec(code, names)
    assert len(names["reuse"].records()) == 21
    assert torch.equal(names["indices"], headfold.index_topk(q, weights, k, 3, causal=True).indices)
