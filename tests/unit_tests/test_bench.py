"""``make bench``: what the README says is what results/ holds, and a benchmark that fails leaves the others."""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RENEW = "run python benchmarks/bench.py --render"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "benchmarks" / "bench.py"))


def test_the_readmes_say_what_results_hold(bench: dict[str, Any]) -> None:
    assert (ROOT / "benchmarks" / "README.md").read_text() == bench["history"](), RENEW
    text = (ROOT / "README.md").read_text()
    assert bench["SHOWN"].search(text) and text == bench["readme"](text), RENEW
    changed = re.sub(r"(full gradient \| )\d\.\d\d", r"\g<1>9.99", text)
    assert changed != text and bench["readme"](changed) == text


def test_what_is_kept_of_a_benchmark_is_in_its_json(bench: dict[str, Any]) -> None:
    for name, columns in bench["FIGURES"].items():
        record = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text())
        assert set(bench["figures_of"](name, record)) == set(columns)


def test_a_machine_is_named_by_its_processor(bench: dict[str, Any]) -> None:
    assert re.fullmatch(r".+, \d+ CPU cores", bench["machine"]()) and "/" not in bench["machine"]()
    assert re.fullmatch(r"[a-z0-9-]+-cpu-cores\.json", bench["results_file"]().name)


@pytest.fixture
def clone(tmp_path: Path, bench: dict[str, Any]) -> Path:
    """A repository with benchmarks of a moment, one of which fails; its README shows this machine."""
    folder = tmp_path / "benchmarks"
    (folder / "results").mkdir(parents=True)
    shutil.copy(ROOT / "benchmarks" / "bench.py", folder)
    shutil.copy(ROOT / "benchmarks" / "results" / "nvidia-h200.json", folder / "results")
    this = bench["results_file"]().name
    shutil.copy(ROOT / "benchmarks" / "results" / "2-cpu-cores.json", folder / "results" / this)
    for name in bench["FIGURES"]:
        record = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) | {"full_speedup": 1.23456}
        (folder / f"{name}.py").write_text(
            f'"""It measures."""\nopen("benchmarks/{name}.json", "w").write({json.dumps(record)!r})\n'
        )
    (folder / "data.py").write_text('"""It fails."""\nimport sys\nsys.exit("no room on the disk")\n')
    mark = f"<!-- figures of benchmarks/results/{this}: as ever -->\nold\n<!-- end of figures -->\n"
    (tmp_path / "README.md").write_text(f"above\n{mark}below\n")
    settings = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*settings, "commit", "-qm", "all"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    return tmp_path


def test_a_failure_leaves_the_others(clone: Path, bench: dict[str, Any]) -> None:
    command = [sys.executable, "benchmarks/bench.py", "ring", "data", "data_memory"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode == 1 and "data failed: exit status 1\nno room on the disk" in done.stderr
    kept = json.loads((clone / "benchmarks" / "results" / bench["results_file"]().name).read_text())["runs"]
    head = subprocess.run(["git", "describe", "--always"], cwd=clone, capture_output=True, text=True).stdout.strip()
    old = json.loads((ROOT / "benchmarks" / "results" / "2-cpu-cores.json").read_text())["runs"]
    assert kept[:-2] == old
    assert [(run["benchmark"], run["command"], run["commit"]) for run in kept[-2:]] == [
        ("ring", "python benchmarks/ring.py", head), ("data_memory", "python benchmarks/data_memory.py", head),
    ]  # fmt: skip
    text = (clone / "README.md").read_text()
    assert "full gradient | 1.23 |" in text and "old" not in text and text.endswith("figures -->\nbelow\n")
    history = (clone / "benchmarks" / "README.md").read_text()
    assert f"| {head} | 2 CPU cores | 1.235 |" in history and "| cb13d8f |" in history


def test_what_the_readme_shows_must_be_there(clone: Path, bench: dict[str, Any]) -> None:
    path = clone / "benchmarks" / "results" / bench["results_file"]().name
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"runs": [run for run in kept["runs"] if run["benchmark"] != "ring"]}))
    command = [sys.executable, "benchmarks/bench.py", "--render"]
    done = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert done.returncode and f"{path.name} lacks 'ring'" in done.stderr and "Traceback" not in done.stderr
