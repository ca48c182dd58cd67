from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from headfold import KeyRange, SelectionRecord, cli, index_scores, index_topk, selection_agreement
from headfold import __main__ as command
from headfold.bills import Bill
from headfold.geometry import IndexerGeometry
from headfold.lanes import measure
from headfold.lanes import parity as parity_lane
from headfold.lanes import speed as speed_lane
from headfold.lanes import training_parity as training_parity_lane
from headfold.lanes.problem import Problem, from_file
from headfold.lanes.record import show
from headfold.lanes.residency import Measured
from headfold.presets import SHAPES

TINY = ["--shape", "b=1,sq=32,h=2,d=16"]
LANES = ["plan", "parity", "residency", "speed", "capture", "prove", "gpu", "agree", "doctor", "tune"]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Done:
    """What the command left: its exit status and both streams."""

    status: int
    out: str
    err: str

    @property
    def lanes(self) -> list[dict[str, Any]]:
        """The lanes that the JSON on stdout holds."""
        found: list[dict[str, Any]] = json.loads(self.out)["lanes"]
        return found


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command as the console script does, in this process."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["headfold", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            command.main()
        out, err = capsys.readouterr()
        return Done(0 if left.value.code is None else int(left.value.code), out, err)

    return run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes long and has tests of its own: most of parity, large products, fresh processes."""
    monkeypatch.setattr(parity_lane, "DTYPES", (torch.float32,))
    monkeypatch.setattr(parity_lane, "gradcheck_cases", lambda device: {"causal": {"causal": True}})
    monkeypatch.setattr(training_parity_lane, "DTYPES", (torch.float32,))
    train = IndexerGeometry(1, 48, 48, 2, 16, 8, np=2, np_k=2, hn=16, v_dim=16)
    monkeypatch.setitem(SHAPES, "train", train)
    monkeypatch.setattr(measure, "RATE_SIZE", 64)
    monkeypatch.setattr(measure, "in_fresh_process", lambda row, *call: (row(*call)[0], 0))


def capture(path: Path, metadata: dict[str, str] | None = None, **changes: torch.Tensor | None) -> Path:
    """Write a capture, with some tensors replaced or left out."""
    tensors: dict[str, torch.Tensor | None] = {
        "q": torch.randn(8, 1, 2, 16),
        "weights": torch.randn(8, 1, 2),
        "k": torch.randn(8, 1, 16),
    }
    found = {name: x for name, x in {**tensors, **changes}.items() if x is not None}
    save_file(found, path, metadata)
    return path


def assert_refused(done: Done, *said: str) -> None:
    """Hold a refusal to one sentence on stderr, nothing on stdout, and status 2."""
    assert done.status == 2
    assert done.out == ""
    assert "Traceback" not in done.err
    assert done.err.startswith("headfold: ")
    assert done.err.count("\n") == 1
    for part in said:
        assert part in done.err


@pytest.mark.parametrize(
    ("arguments", "lanes"),
    [
        (["plan", "--preset", "glm-5"], ["plan"]),
        (["plan", *TINY, "--causal", "--dtype", "bfloat16"], ["plan"]),
        (["plan", *TINY, "--backend", "triton"], ["plan"]),
        (["parity", *TINY], ["parity"]),
        (["residency", *TINY, "--no-process"], ["residency"]),
        (["speed", *TINY, "--rounds", "1"], ["speed"]),
        (["capture"], ["capture"]),
        (["agree", *TINY, "--topk", "4"], ["agree"]),
        (["doctor"], ["doctor"]),
    ],
    ids=lambda x: " ".join(x[:2]),
)
@pytest.mark.usefixtures("quick")
def test_json_is_all_of_stdout(run: Run, arguments: list[str], lanes: list[str]) -> None:
    done = run(*arguments, "--json")
    assert (done.status, done.err) == (0, "")
    assert [lane["name"] for lane in done.lanes] == lanes
    assert all(lane["rows"] and lane["passed"] for lane in done.lanes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", *TINY], ["materialized", "per-head loop", "headfold", "GFLOP"]),
        (["parity", *TINY], ["gradcheck, causal", "dweights", "pass"]),
        (["residency", *TINY, "--no-process"], ["forward + backward", "held for backward", "beyond results", "pass"]),
        (["speed", *TINY, "--rounds", "1"], ["materialized", "of matrix-product rate", "1 interleaved rounds"]),
        (["capture"], ["branch on any()", "DataRead", "equal to eager", "key 0", "--device cuda", "18 pass"]),
        (
            ["agree", *TINY, "--topk", "4"],
            ["bfloat16", "float32", "members that agree", "tied at a's cut", "rows that differ"],
        ),
        (["doctor"], ["cpu, float64", "eager", "memory free"]),
    ],
    ids=lambda x: x[0],
)
@pytest.mark.usefixtures("quick")
def test_tables_say_it_to_people(run: Run, arguments: list[str], said: list[str]) -> None:
    done = run(*arguments)
    assert done.status == 0
    assert [part for part in said if part not in done.out] == []


@pytest.mark.usefixtures("quick")
def test_prove_prints_json_alone_and_names_its_report_on_stderr(run: Run, tmp_path: Path) -> None:
    done = run("prove", *TINY, "--rounds", "1", "--report", tmp_path / "new" / "report", "--json")
    assert done.status == 0
    pairs = [name for lane in ("parity", "residency", "speed") for name in (lane, f"training {lane}")]
    assert [lane["name"] for lane in done.lanes] == ["plan", *pairs, "capture"]
    assert "report.md" in done.err
    assert (tmp_path / "new" / "report" / "report.json").exists()


def test_a_failed_verdict_leaves_with_1_and_says_why(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexerGeometry, "bill", lambda *_, **__: Bill(1000, 0, 1000))
    done = run("residency", *TINY, "--no-process")
    assert done.status == 1
    assert "bytes above planned" in done.out
    assert "fail" in done.out


def test_a_failed_verdict_is_in_the_json(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IndexerGeometry, "bill", lambda *_, **__: Bill(1 << 30, 0, 1 << 30))
    done = run("residency", *TINY, "--no-process", "--json")
    assert done.status == 1
    assert json.loads(done.out)["passed"] is False
    assert done.lanes[0]["rows"][0]["note"] == "below 0.8 of planned"


def test_a_process_peak_above_its_bound_fails(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "in_fresh_process", lambda *_: (Measured(0, 0), 1 << 30))
    done = run("residency", *TINY, "--json")
    assert done.status == 1
    failed = {row["path"] for row in done.lanes[0]["rows"] if row["verdict"] == "fail"}
    assert failed == {"headfold", "headfold, 16 MiB workspace"}
    assert "above its bound" in next(row["note"] for row in done.lanes[0]["rows"] if row["verdict"] == "fail")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan", "--preset", "gpt-2"], ["--preset: needs one of deepseek-v3.2", "'gpt-2'"]),
        (["plan", "--shape", "huge"], ["--shape", "small, prod, full", "'huge'"]),
        (["plan", "--shape", "sq=8,h=2"], ["--shape", "without d"]),
        (["plan", "--shape", "sq=8,h=x,d=4"], ["--shape: h needs a whole number", "'x'"]),
        (["plan", "--shape", "sq=8,h=0,d=4"], ["heads must be an integer of at least 1", "got 0"]),
        (["plan", "--preset", "glm-5", *TINY], ["--preset: excludes --shape", "sq=32"]),
        (["plan", *TINY, "--tokens", "64"], ["--tokens", "--preset", "64"]),
        (["plan", *TINY, "--dtype", "int8"], ["dtype must be one of", "'int8'"]),
        (["plan", *TINY, "--backend", "cuda"], ["plan: --backend must be one of 'eager', 'triton'", "'cuda'"]),
        (["plan", "--model", "a.json", "--backend", "triton"], ["--model: excludes --backend", "triton"]),
        (["plan", *TINY, "--memory", "4"], ["--memory: needs --megatron", "got 4"]),
        (["plan", *TINY, "--megatron", "a.yaml"], ["--megatron: excludes --shape"]),
        (["plan", "--megatron", "absent.yaml"], ["--megatron: needs a file of arguments", "absent.yaml"]),
        (["residency", "--full", *TINY], ["--full: excludes --shape"]),
        (["speed", "--sweep", "--preset", "glm-5"], ["--sweep: excludes --preset"]),
        (["parity", *TINY, "--impl", "fast"], ["--impl must be one of", "'fast'"]),
        (["parity", *TINY, "--device", "tpu"], ["--device: needs cpu, cuda or cuda:N", "'tpu'"]),
        (["parity", *TINY, "--device", "mps"], ["--device: needs cpu, cuda or cuda:N", "'mps'"]),
        (["capture", "--device", "tpu"], ["--device: needs cpu, cuda or cuda:N", "'tpu'"]),
        (["residency", *TINY, "--workspace", "100"], ["--workspace: needs at least", "bytes", "got 100"]),
        (["speed", *TINY, "--workspace", "-1"], ["--workspace: needs at least", "got -1"]),
        (["agree", *TINY], ["--topk: needs the number of keys to compare", "got none from the inputs"]),
        (["agree", *TINY, "--dtypes", "float32"], ["--dtypes: needs two of", "'float32'"]),
        (["agree", *TINY, "--dtypes", "float32,int8"], ["--dtypes: needs two of", "'float32,int8'"]),
        (["agree", "a", "b", "c"], ["agree: needs at most two files, got 3"]),
        (["agree", "a", "b", "--dtypes", "float32,float64"], ["agree FILE FILE: excludes --dtypes"]),
        (["agree", "a", "--causal"], ["agree FILE: excludes --causal"]),
        (["agree", "absent"], ["agree: needs a safetensors file", "absent"]),
    ],
    ids=lambda x: " ".join(x),
)
def test_bad_arguments_are_refused_in_a_sentence(run: Run, arguments: list[str], said: list[str]) -> None:
    assert_refused(run(*arguments), *said)


def test_cuda_without_cuda_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert_refused(run("speed", *TINY, "--device", "cuda:1"), "--device", "'cuda:1'", "no CUDA")
    assert_refused(run("capture", "--device", "cuda"), "--device", "'cuda'", "no CUDA")


def test_a_report_that_names_a_file_is_refused_before_anything_runs(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "report"
    file.write_text("mine")
    assert_refused(run("prove", *TINY, "--report", file), "--report: needs a folder", str(file))
    assert file.read_text() == "mine"


def test_a_report_below_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_refused(run("prove", *TINY, "--report", tmp_path / "file" / "report"), "--report: needs a folder")


@pytest.mark.parametrize(
    ("changes", "metadata", "said"),
    [
        ({"k": None}, {}, ["must hold tensors q, weights and k", "missing k"]),
        ({"q": torch.zeros(8, 2, 16)}, {}, ["q in", "[sq, b, h, d]", "[8, 2, 16]"]),
        ({"weights": torch.zeros(8, 1, 3)}, {}, ["must agree", "weights [8, 1, 3]"]),
        ({"k": torch.zeros(8, 1, 15)}, {}, ["must agree", "k [8, 1, 15]"]),
        ({"q": torch.zeros(8, 1, 2, 16, dtype=torch.int32)}, {}, ["q in", "floating dtype", "torch.int32"]),
        ({}, {"layout": "hbsd"}, ["metadata layout", "sbhd, bshd, thd", "'hbsd'"]),
        ({}, {"scale": "large"}, ["metadata scale", "a number", "'large'"]),
        ({}, {"scale": "nan"}, ["metadata scale", "'nan'"]),
        ({}, {"topk": "-1"}, ["metadata topk", "at least 0", "'-1'"]),
        ({}, {"causal": "yes"}, ["metadata causal", '"true" or "false"', "'yes'"]),
    ],
)
def test_a_bad_capture_is_refused_in_a_sentence(
    run: Run, tmp_path: Path, changes: dict[str, Any], metadata: dict[str, str], said: list[str]
) -> None:
    file = capture(tmp_path / "capture.safetensors", metadata, **changes)
    assert_refused(run("speed", "--inputs", file), "--inputs", "capture.safetensors", *said)


def test_a_missing_capture_is_refused(run: Run, tmp_path: Path) -> None:
    assert_refused(run("parity", "--inputs", tmp_path / "absent"), "--inputs: needs a safetensors file", "absent")


@pytest.mark.parametrize("content", [b"", b"not safetensors at all"])
def test_a_capture_in_another_format_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "capture").write_bytes(content)
    assert_refused(run("residency", "--inputs", tmp_path / "capture"), "--inputs", "must be a safetensors file")


@pytest.mark.parametrize(
    ("more", "name"),
    [
        (TINY, "--shape"),
        (["--preset", "glm-5"], "--preset"),
        (["--dtype", "float32"], "--dtype"),
        (["--tokens", "8"], "--tokens"),
        (["--causal"], "--causal"),
    ],
)
def test_a_capture_excludes_what_it_holds_itself(run: Run, tmp_path: Path, more: list[str], name: str) -> None:
    file = capture(tmp_path / "capture.safetensors")
    assert_refused(run("speed", "--inputs", file, *more), f"--inputs: excludes {name}")


@pytest.mark.usefixtures("quick")
def test_a_capture_in_another_layout_is_read(run: Run, tmp_path: Path) -> None:
    swapped = {
        "q": torch.randn(1, 6, 2, 16),
        "weights": torch.randn(1, 6, 2),
        "k": torch.randn(1, 9, 16),
    }
    file = capture(tmp_path / "c.safetensors", {"layout": "bshd", "causal": "true", "scale": "0.25"}, **swapped)
    done = run("parity", "--inputs", file, "--json")
    assert done.status == 0
    assert "c.safetensors: no source given" in done.lanes[0]["notes"][-1]


REAL = Path(__file__).parent / "data" / "deepseek_v32_indexer.safetensors"


def select(file: Path, layer: int, *, cut: int = 0) -> Path:
    """Save what the real capture selects, 40 keys a row; the first `cut` rows lose their last key."""
    q, weights, k = from_file(REAL).tensors(CPU)
    indices, _ = index_topk(q, weights, k, 40, causal=True)
    indices[:, :cut, -1] = -1
    sq, sk = q.shape[0], k.shape[0]
    SelectionRecord(indices, sk, KeyRange.causal(sq, sk), layer=layer).save(file)
    return file


def test_agree_compares_two_saved_selections(run: Run, tmp_path: Path) -> None:
    one, two = select(tmp_path / "one", 0), select(tmp_path / "two", 3, cut=16)
    (lane,) = run("agree", one, two, "--json").lanes
    (row,) = lane["rows"]
    assert (row["a"], row["b"], row["topk"], row["rows"]) == ("one", "two", 40, 64)
    assert row["rows_agree"] == 48 / 64
    assert row["members_agree"] == pytest.approx(1 - 16 / (64 * 80 - 16), abs=1e-12)
    assert (row["worst"], row["worst_row"]) == (pytest.approx(78 / 79), "[0, 0]")
    assert (row["ties_a"], row["ties_b"]) == (None, None)
    assert not any("may not see" in note for note in lane["notes"])
    # The best 39 keys are the same.
    assert run("agree", one, two, "--topk", "39", "--json").lanes[0]["rows"][0]["rows_agree"] == 1


def test_agree_selects_from_a_capture_and_counts_its_ties(run: Run, tmp_path: Path) -> None:
    (lane,) = run("agree", REAL, select(tmp_path / "saved", 1), "--topk", "40", "--json").lanes
    (row,) = lane["rows"]
    assert (row["rows_agree"], row["members_agree"], row["worst"]) == (1, 1, 1)
    q, weights, k = from_file(REAL).tensors(CPU)
    best = index_scores(q, weights, k, causal=True).sort(-1, descending=True).values
    assert row["ties_a"] == int((best[..., 39] == best[..., 40]).sum())
    assert row["ties_b"] is None


def test_ties_at_the_cut_are_counted(run: Run, tmp_path: Path) -> None:
    # Row s scores k[t] for every key; the best two of 3, 2, 2, 1, 0 tie with the third, the best three with none.
    ones = torch.ones(4, 1, 1, 1)
    keys = torch.tensor([1.0, 2.0, 3.0, 2.0, 0.0]).view(5, 1, 1)
    file = capture(tmp_path / "capture", {}, q=ones, weights=ones[..., 0].clone(), k=keys)
    for topk, ties in ((1, 0), (2, 4), (3, 0), (4, 0), (5, 0), (6, 0)):
        row = run("agree", file, "--topk", str(topk), "--json").lanes[0]["rows"][0]
        assert (row["ties_a"], row["ties_b"]) == (ties, ties)
    # Keys that a row may not see do not tie: rows 0 to 3 see 2 to 5 keys, so only the last two see the second 2.
    file = capture(tmp_path / "capture", {"causal": "true"}, q=ones, weights=ones[..., 0].clone(), k=keys)
    assert run("agree", file, "--topk", "2", "--json").lanes[0]["rows"][0]["ties_a"] == 2


def test_agree_scores_what_the_dtypes_round_to(run: Run) -> None:
    small = ["--shape", "sq=64,sk=300,h=4,d=16,topk=20"]
    (row,) = run("agree", *small, "--dtypes", "bfloat16,float32", "--json").lanes[0]["rows"]
    q, weights, k = Problem(IndexerGeometry(1, 64, 300, 4, 16)).tensors(CPU)
    one, two = (index_topk(q.to(x), weights.to(x), k.to(x), 20) for x in (torch.bfloat16, torch.float32))
    agreed = selection_agreement(one, two)
    assert row["rows_agree"] == float(agreed.rows) < 1
    assert row["members_agree"] == float(agreed.members) < 1
    same = run("agree", *small, "--dtypes", "float64,float64", "--json").lanes[0]["rows"][0]
    assert (same["rows_agree"], same["members_agree"]) == (1, 1)


def test_a_capture_is_told_that_rounding_changes_nothing(run: Run) -> None:
    (lane,) = run("agree", REAL, "--topk", "40", "--json").lanes
    assert any("holds bfloat16, so no value is rounded" in note for note in lane["notes"])
    (lane,) = run("agree", REAL, "--topk", "40", "--dtypes", "float16,float32", "--json").lanes
    assert not any("no value is rounded" in note for note in lane["notes"])


@pytest.mark.parametrize(("share", "status", "verdict"), [("0.5", 0, "pass"), ("1", 1, "fail")])
def test_agree_judges_only_when_asked(run: Run, tmp_path: Path, share: str, status: int, verdict: str) -> None:
    files = select(tmp_path / "one", 0), select(tmp_path / "two", 0, cut=1)
    assert "verdict" not in run("agree", *files, "--json").lanes[0]["rows"][0]
    done = run("agree", *files, "--at-least", share, "--json")
    assert done.status == status
    assert done.lanes[0]["rows"][0]["verdict"] == verdict


def test_agree_doubts_what_says_less_than_it_seems(run: Run, tmp_path: Path) -> None:
    file = select(tmp_path / "saved", 0)
    SelectionRecord(SelectionRecord.load(file).indices, 3072).save(tmp_path / "blind")
    (lane,) = run("agree", file, tmp_path / "blind", "--json").lanes
    assert any("may not see the same keys" in note for note in lane["notes"])
    (lane,) = run("agree", *TINY, "--topk", "32", "--json").lanes
    assert any("keeps every one of the 32 keys" in note for note in lane["notes"])
    files = [capture(tmp_path / name, {"causal": name}) for name in ("true", "false")]
    (lane,) = run("agree", *files, "--topk", "3", "--json").lanes
    assert any("one is causal, the other is not" in note for note in lane["notes"])


def test_sides_that_cannot_be_compared_are_refused(run: Run, tmp_path: Path) -> None:
    saved, small = select(tmp_path / "saved", 0), capture(tmp_path / "small")
    assert_refused(run("agree", saved, small), "agree: both sides must have one sq, got 64 in saved and 8 in small")
    assert_refused(run("agree", saved, REAL), "--topk: needs the number of keys to compare, got 40 and 2048")
    assert_refused(run("agree", saved, REAL, "--topk", "41"), "--topk: must be at most the width of saved, 40, got 41")
    assert_refused(run("agree", saved, tmp_path / "absent"), "agree: needs a safetensors file")
    assert_refused(run("agree", saved), "agree: saved must hold tensors q, weights and k", "indices")
    (tmp_path / "empty").touch()
    assert_refused(run("agree", saved, tmp_path / "empty"), "agree: empty must be a safetensors file")


@pytest.mark.parametrize(
    "arguments",
    [["fly"], ["plan", "--fast"], ["speed", "--rounds", "0"], ["agree", "--at-least", "2"], ["plan", "--batch", "x"]],
)
def test_bad_usage_leaves_with_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli.app, arguments).exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["plan", *TINY, "--json"], 0), (["plan", "--shape", "huge"], 2), (["fly"], 2)],
    ids=lambda x: str(x),
)
def test_the_installed_command_leaves_with_the_same_status(arguments: list[str], status: int) -> None:
    done = subprocess.run([sys.executable, "-m", "headfold", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr


def test_without_its_extra_the_command_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; from headfold.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "typer" in done.stderr
    assert "pip install 'headfold[cli]'" in done.stderr


@pytest.mark.parametrize("name", LANES)
def test_help_names_every_option(name: str) -> None:
    group: Any = typer.main.get_command(cli.app)
    options = [option for parameter in group.commands[name].params for option in parameter.opts]
    shown = CliRunner().invoke(cli.app, [name, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    assert "--json" in options
    assert [option for option in options if option not in shown] == []


def test_a_sweep_row_times_both_paths() -> None:
    row = speed_lane._sweep_row(IndexerGeometry(1, 16, 16, 2, 16), CPU, rounds=1)
    assert row["shape"] == "s=16, h=2, d=16"
    assert row["ours"] > 0
    assert row["speedup"] == pytest.approx(row["theirs"] / row["ours"])


def test_a_sweep_row_that_does_not_fit_says_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda _: 1000)
    row = speed_lane._sweep_row(IndexerGeometry(1, 16, 16, 2, 16), CPU, rounds=1)
    assert "needs" in row["note"]
    assert "ours" not in row


@pytest.mark.parametrize(("rate", "verdict"), [(1.0, "pass"), (1e30, "fail")])
def test_targets_are_judged_only_when_asked_for(monkeypatch: pytest.MonkeyPatch, rate: float, verdict: str) -> None:
    monkeypatch.setattr(measure.MatrixProduct, "rate", lambda _: rate)
    problem = Problem(IndexerGeometry(1, 16, 16, 2, 16))
    asked = speed_lane.speed(problem, CPU, rounds=1, targets=True)
    verdicts = {row["phase"]: row["verdict"] for row in asked.rows if row["path"] == "headfold" and "verdict" in row}
    assert verdicts["backward"] == verdict
    assert not any("verdict" in row for row in speed_lane.speed(problem, CPU, rounds=1).rows)


def test_only_all_is_shown_as_all() -> None:
    assert [show(share, "share") for share in (1.0, 1 - 1e-9, 0.5, 0.0)] == ["1", "0.999999", "0.5", "0"]
