from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
