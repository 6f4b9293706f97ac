"""A whole report, made by the command of a model on disk, opened in a browser at the width of a phone and of a desk."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from megatron_recursive.commands import main
from tests.unit_tests.inference.folders import write_recursive
from tests.unit_tests.plots.records import start, train, valid, write
from tests.unit_tests.report.test_report import save

pytestmark = [pytest.mark.heavy, pytest.mark.browser]
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# A window is never narrower than 500 pixels, a frame in it may be.
FRAME = """<!doctype html><iframe src="probed.html" width="{0}" height="{1}" style="border: 0"></iframe>
<script>addEventListener("message", said => document.documentElement.dataset.seen = said.data)</script>"""
PROBE = """<script>addEventListener("load", () => {
  const all = (query, what) => [...document.querySelectorAll(query)].map(what);
  parent.postMessage(JSON.stringify({
    width: innerWidth, needed: document.scrollingElement.scrollWidth, height: innerHeight,
    pictures: all("img", each => each.naturalWidth), panels: all("figure:not(.wide) img", each => each.width),
    questions: all(".cards strong", each => each.getBoundingClientRect().bottom),
    smallest: Math.min(...all("p, td, th, small, h3", each => parseFloat(getComputedStyle(each).fontSize))),
  }), "*") })</script></body>"""


@pytest.fixture(scope="module")
def browser() -> str:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.fail("no browser: install Debian's package chromium, which .ci/run does where apt-get may")
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model with everything that a report can tell."""
    folder = write_recursive(tmp_path_factory.mktemp("report") / "model")
    write(folder / "metrics.jsonl", start(), *(train(n, 9.0 / n, **{"halt loss": 0.5}) for n in range(1, 9)),
          valid(8, 4.0, 3.0, 2.0, tokens=512))  # fmt: skip
    layers = [{"layer": n, "influence": 0.1, "distance": 0.2, "applied": 6} for n in range(2)]
    stacks = {"prelude": [], "core": [0, 1], "coda": [], "left_out": []}
    save(folder / "layers.json", "layers", {"model": str(folder), "samples": 2, "sequence_length": 8, "layers": layers,
                                            **stacks}, at=4e9)  # fmt: skip
    scores = [{"depth": n, "results": {"copa": {"acc,none": n / 9, "acc_stderr,none": 0.01}}} for n in (1, 3)]
    (folder / "depths_1.json").write_text(json.dumps(scores))
    words = ["--measure", "--num-samples", "4", "--seq-length", "24", "--prompt", "def", "--device", "cpu"]
    main(["report", str(folder), *words])
    return folder / "report.html"


def test_a_page_tells_all_that_is_there(report: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = unescape(report.read_text())
    parts = re.findall(r"<h3>(.*?)</h3>", text)
    assert parts[:3] == ["Is the recursion used?", "What does depth buy?", "What does it cost?"]
    assert [part.split(",")[0].split(":")[0] for part in parts[3:]] == [
        "Loss by depth", "Training", "Depths", "Health of the states", "Training in words", "Counts", "Plan", "Layers",
        "Tasks of lm-eval", "Samples",
    ]  # fmt: skip
    assert "Not here yet" not in text and "'def' goes on with" in text and "block 3</th>" in text
    for name in ("sweep.json", "health.json", "samples.jsonl"):
        made = report.parent / name
        before = made.stat().st_mtime_ns
        if name == "sweep.json":
            main(["report", str(report.parent), "--measure", "--json", "--output", str(report.parent / "again.html")])
            answers = json.loads(capsys.readouterr().out)[str(report.parent)]
        assert made.stat().st_mtime_ns == before, "what is there is not measured again"
    assert [each["question"] for each in answers] == parts[:3]


def opened(browser: str, page: Path, *words: str) -> str:
    """What the browser prints; a page that complains on the console fails."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--enable-logging=stderr",
             f"--user-data-dir={page.parent / 'profile'}", *words, page.as_uri()]  # fmt: skip
    result = subprocess.run([browser, *flags], capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in result.stderr, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize(("width", "height", "least"), [(390, 844, 300), (1280, 800, 350)])
def test_a_page_is_readable(browser: str, report: Path, tmp_path: Path, width: int, height: int, least: int) -> None:
    picture, frame = tmp_path / "page.png", tmp_path / "frame.html"
    opened(browser, report, f"--screenshot={picture}", f"--window-size={width},{height}")
    assert picture.stat().st_size > 20000
    text = re.sub('<meta http-equiv="Content-Security-Policy".*', "", report.read_text())
    (tmp_path / "probed.html").write_text(text.replace("</body>", PROBE))
    frame.write_text(FRAME.format(width, height))
    found = re.search(r'data-seen="(.*?)"', opened(browser, frame, "--dump-dom", "--virtual-time-budget=5000"))
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["width"] == width and seen["needed"] <= width, "no scrolling sideways"
    assert len(seen["pictures"]) >= 14 and min(seen["pictures"]) > 400 and min(seen["panels"]) >= least
    assert len(seen["questions"]) == 3 and max(seen["questions"]) < seen["height"], "answered on the first screen"
    assert seen["smallest"] >= 12
