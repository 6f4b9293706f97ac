"""The command ``phi``: the law that it fits, its interval, and what it reads."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_recursive.ablation import loop_worth
from megatron_recursive.ablation.loop_worth import read_losses
from megatron_recursive.commands import main

E, ALPHA, BETA = 1.57, 0.199, 0.369  # the paper's, as the phi of 0.46 is


@pytest.fixture(autouse=True)
def few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_worth, "STARTS", 30)


def arms(phi: float, noise: float = 0.0, seeds: int = 1) -> list[dict[str, Any]]:
    """Results of arms as ``ablate`` writes them, whose losses follow the law."""
    random, found = np.random.default_rng(1), []
    for width in (128, 192, 256, 384):
        for tokens in (1e6, 4e6, 16e6):
            for r in (1, 2, 4):
                once, core, joins = 24 * width**2, 12 * width**2 * 4 // r, 2 * width**2
                size = once + r**phi * (core + joins)
                loss = E + 24 * size**-ALPHA + 270 * tokens**-BETA
                stacks = {"prelude": [once, 1], "core": [core, r], "injection": [joins, r]}
                losses = [loss * math.exp(noise * random.standard_normal()) for _ in range(seeds)]
                found.append({"arm": f"{width}, {r}, {tokens}", "tokens": tokens, "stacks": stacks, "losses": losses})
    return found


def write(folder: Path, arms: list[dict[str, Any]]) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps({"arms": arms}))
    return str(folder)


def phi_of(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main(["phi", *words, "--json"])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("phi", "other"), [(0.46, 0.8), (0.8, 0.46)])
def test_it_recovers_phi_within_its_interval(
    phi: float, other: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = arms(phi, noise=0.003)
    folders = [write(tmp_path / "a", half[::2]), write(tmp_path / "b", half[1::2])]
    found = phi_of(capsys, *folders, "--draws", "40")
    low, high = found["interval"]
    assert low < phi < high and not low < other < high and high - low < 0.3, found
    assert (found["arms"], found["draws"], found["results"]) == (36, 40, folders) and found["R2"] > 0.998
    assert found["worth"]["4"] == pytest.approx(4 ** found["phi"])


def test_without_noise_it_finds_every_constant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["phi", write(tmp_path, arms(0.46)), "--draws", "20"])
    said = capsys.readouterr().out
    assert said.startswith("phi = 0.460, 95% interval 0.4") and "2 loops 1.38, 4 loops 1.89" in said
    assert "L = 1.570 + 24 N^-0.199 + 270 D^-0.369" in said


def test_its_derivatives_are_those_of_the_law(tmp_path: Path) -> None:
    losses, at = read_losses([write(tmp_path, arms(0.3))]), np.array([[3.0, 5.0, 0.5, 0.2, 0.4, 0.6]])
    _, slopes = loop_worth._law(losses, at)
    for constant, step in enumerate(np.eye(6) * 1e-6):
        above, below = (loop_worth._law(losses, at + sign * step)[0] for sign in (1, -1))
        assert np.allclose((above - below) / 2e-6, slopes[..., constant], rtol=1e-6, atol=1e-8)


def test_noise_widens_the_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noisy = [arm for arm in arms(0.46, noise=0.03, seeds=2) if arm["tokens"] == 1e6]
    low, high = phi_of(capsys, write(tmp_path, noisy), "--draws", "20")["interval"]
    assert high - low > 0.5


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda found: found[:5], "needs at least 6 arms that are done, of three sizes and two numbers of loops, but"),
    (lambda found: found[::3], "two numbers of loops"),
    (lambda found: [], "hold 0; benchmarks/phi.yaml has such"),
    (lambda found: [{**found[0], "losses": [2.0, math.nan]}, *found[1:]],
     "a run of {file}: 128, 1, 1000000.0 ended at nan"),
    (lambda found: [{**arm, "stacks": None} for arm in found], "is no results.json of this version (AttributeError"),
    (lambda found: [{"arm": "a", "losses": [1.0], "tokens": 1}], "(KeyError: 'stacks'); the command ablate, started"),
    (None, "Cannot read"),
])  # fmt: skip
def test_what_does_not_determine_it_is_refused(
    change: Any, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path, change(arms(0.46))) if change else str(tmp_path / "absent.json")
    with pytest.raises(SystemExit) as stop:
        main(["phi", folder])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert sentence.replace("{file}", f"{folder}/results.json") in err
