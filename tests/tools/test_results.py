"""What benchmarks report."""

from pathlib import Path

import pytest

from tools.benchmark_lazy import cases, traced
from tools.comparison import CASES, Case
from tools.results import Result, Results, read


def test_ratios_and_limits() -> None:
    result = Result(figure="a", what="a", ours=[1, 3, 2], others=[8, 8, 1], limit=0.25)
    assert result.value == 0.25
    assert result.kept
    assert Result(figure="a", what="a", ours=[3], others=[8], limit=0.25).kept is False
    assert Result(figure="a", what="a", ours=[3], others=[8]).kept is None
    assert Result(figure="a", what="a", ours=[3], limit=0.25).kept is None
    assert Result(figure="a", what="a", others=[3], limit=0.25).kept is None
    assert Result(figure="a", what="a", ours=[3], ratio=False, limit=3).kept


def test_the_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    results = Results()
    results.add(Result(figure="a", what="A", image="85", ours=[3, 1, 2], others=[20], limit=0.05))
    results.add(
        Result(figure="b", what="B", traced="b", unit="MB", ours=[3], ratio=False, limit=60)
    )
    _, first, second = capsys.readouterr().out.splitlines()
    fields = [" ".join(line.split()) for line in (first, second)]
    assert fields[0] == "A 85 loopback 2.000 s (1.000-3.000) 20.0 s 0.100 0.05 MISSED"
    assert fields[1] == "B, traced loopback 3.000 MB - 60 MB ok"
    results.write(tmp_path / "results.json")
    assert read(tmp_path / "results.json") == results.all


def test_the_other_side_of_an_earlier_run() -> None:
    old = Result(figure="a", what="A", image="85", link="slow", others=[1], limit=1)
    assert old.same(Result(figure="a", what="A", image="85", link="slow", format="estargz"))
    assert not old.same(Result(figure="a", what="A", image="85"))
    assert not old.same(Result(figure="a", what="A", image="150", link="slow"))


def test_cases_of_a_command_line() -> None:
    assert cases(None, None, None) == list(CASES)
    assert cases("150", None, ["numpy", "ls"]) == [Case("numpy", "150"), Case("ls", "150")]
    assert cases("150", "slow", ["numpy"]) == [Case("numpy", "150", "slow")]
    assert {case.link for case in cases(None, "slow", None)} == {"slow"}


def test_whose_trace_an_image_is_converted_with() -> None:
    assert traced(Case("numpy", "85"), "estargz", "own") == "numpy"
    assert traced(Case("ls", "800"), "estargz", "own") == ""
    assert traced(Case("numpy", "85"), "estargz", "print") == "print"
    assert traced(Case("numpy", "85"), "estargz", "none") == ""
    assert traced(Case("numpy", "85"), "gzip", "own") == ""
