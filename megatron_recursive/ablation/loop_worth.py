"""phi, the recurrence-equivalence exponent of arXiv 2604.21106: how many unique layers r loops of one are worth.

Over arms of several sizes and numbers of loops it fits

    L = E + A N(phi)^-alpha + B D^-beta,    N(phi) = sum over the stacks of (passes through it)^phi x its parameters

to held-out losses L and training tokens D. Of prelude, core and coda, N is the paper's N_once + r^phi N_rec. Embeddings
and heads do not count; what joins a state with the input counts with the core. At phi = 1 a loop is worth a layer of
its own, at 0 nothing. As there, the objective is the Huber loss (delta 1e-3) of the residuals of log L, from many
starts within the same bounds (here by Levenberg and Marquardt's steps). The interval is that of fits to arms drawn with
replacement, all seeds of an arm with it; the paper draws its cells of budget and r, each of several sizes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_recursive.errors import UserError

type Array = NDArray[np.float64]
# Bounds of log A, log B, log E, alpha, beta, phi.
LOW, HIGH = np.array([[-5.0, 35], [-5, 35], [-3, 2], [0, 2.5], [0, 2.5], [-3, 3]]).T
HUBER = 1e-3
STARTS, OF_A_DRAW, STEPS = 300, 6, 300  # fits of the whole; of each draw, which begin where those ended


class Losses(NamedTuple):
    """Of each run its arm, loss and tokens [P], and parameters of its stacks and passes through them [P, S]."""

    arms: Array
    loss: Array
    tokens: Array
    held: Array
    passes: Array


def read_losses(files: Sequence[str | Path]) -> Losses:
    """The runs of results.json files of ``ablate``, or of the folders around them, at the best rate of each arm."""
    runs: list[tuple[str, float, float, list[list[float]]]] = []
    for given in files:
        file = Path(given) / "results.json" if Path(given).is_dir() else Path(given)
        try:
            for arm in json.loads(file.read_text(encoding="utf-8"))["arms"]:
                stacks = ([*arm["stacks"].values()] + 8 * [[0, 1]])[:8]
                runs += [(f"{file}: {arm['arm']}", loss, arm["tokens"], stacks) for loss in arm["losses"]]
        except OSError as error:
            raise UserError(f"Cannot read {file} ({error.strerror}); name a folder of ablate's results.") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{file} is no results.json of this version ({type(error).__name__}: {error}); the command "
                            "ablate, started again, renews it.") from error  # fmt: skip
    for arm, loss, *_ in runs:
        if not 0 < loss < math.inf:
            raise UserError(f"phi is fitted to finite losses above 0, but a run of {arm} ended at {loss}; leave that "
                            "rate or seed out, and start ablate again.")  # fmt: skip
    arms, sizes = {run[0] for run in runs}, {sum(held for held, _ in run[3]) for run in runs}
    if len(arms) < len(LOW) or len(sizes) < 3 or len({max(n for _, n in run[3]) for run in runs}) < 2:
        raise UserError(f"phi needs at least {len(LOW)} arms that are done, of three sizes and two numbers of loops, "
                        f"but {' '.join(map(str, files))} hold {len(arms)}; benchmarks/phi.yaml has such.")  # fmt: skip
    columns = [np.array(column) for column in zip(*runs, strict=True)]
    return Losses(*columns[:3], *np.moveaxis(columns[3].astype(float), -1, 0))


def fit_phi(losses: Losses, *, draws: int, seed: int) -> dict[str, Any]:
    """phi with its 95% interval over ``draws`` resamples, the other constants, and R2 of log L."""
    random, loops = np.random.default_rng(seed), losses.passes.max(-1)
    ends, values = _fit(losses, np.ones((1, len(loops))), _starts(losses, random))
    ends = ends[values.argsort()]
    arms, weights = np.unique(losses.arms), np.empty((0, len(loops)))
    while len(weights) < draws:
        weight = (losses.arms[:, None] == random.choice(arms, len(arms))).sum(-1)
        weights = np.vstack([weights, *([weight] if len(set(loops[weight > 0])) > 1 else [])])  # else it tells nothing
    starts = np.tile(ends[np.linspace(0, STARTS - 1, OF_A_DRAW).astype(int)], (draws, 1))
    drawn, values = _fit(losses, np.repeat(weights, OF_A_DRAW, 0), starts)
    best = values.reshape(draws, OF_A_DRAW).argmin(-1) + np.arange(draws) * OF_A_DRAW
    log, (log_a, log_b, log_e, alpha, beta, phi) = np.log(losses.loss), map(float, ends[0])
    return {
        "phi": phi, "interval": np.quantile(drawn[best, -1], (0.025, 0.975)).tolist(), "draws": draws,
        "E": float(np.exp(log_e)), "A": float(np.exp(log_a)), "B": float(np.exp(log_b)), "alpha": alpha, "beta": beta,
        "R2": 1 - float(((log - _law(losses, ends[:1])[0]) ** 2).sum() / ((log - log.mean()) ** 2).sum()),
        "worth": {f"{r:g}": float(r**phi) for r in sorted(set(loops)) if r > 1}, "arms": len(arms), "runs": len(loops),
    }  # fmt: skip


def _starts(losses: Losses, random: np.random.Generator) -> Array:
    """[F, 6]: exponents at random, and the three terms as random shares of the mean loss at the middle of the runs."""
    shares = np.log(random.dirichlet((1, 1, 1), STARTS) * losses.loss.mean())
    alpha, beta, phi = random.uniform(0.05, 1.0, (3, STARTS))
    shares[:, 0] += alpha * np.log(losses.held.sum(-1)).mean()
    shares[:, 1] += beta * np.log(losses.tokens).mean()
    return np.clip(np.column_stack([shares, alpha, beta, phi]), LOW, HIGH)


def _law(losses: Losses, at: Array) -> tuple[Array, Array]:
    """log L [F, P] at each of [F, 6] constants, and its derivatives [F, P, 6]."""
    a, b, e, alpha, beta, phi = at.T[..., None]
    log_passes, log_tokens = np.log(losses.passes), np.log(losses.tokens)
    worth = losses.held * np.exp(phi[..., None] * log_passes)
    log_size = np.log(worth.sum(-1))
    terms = np.stack([a - alpha * log_size, b - beta * log_tokens, e + 0 * log_size])
    total = np.logaddexp.reduce(terms)
    of_a, of_b, of_e = np.exp(terms - total)
    of_phi = -of_a * alpha * (worth * log_passes).sum(-1) / worth.sum(-1)
    return total, np.stack([of_a, of_b, of_e, -of_a * log_size, -of_b * log_tokens, of_phi], -1)


def _fit(losses: Losses, weights: Array, at: Array) -> tuple[Array, Array]:
    """The constants [F, 6] that each start ends in, and the objective there [F]; weights [F or 1, P] count the runs."""
    value, damping, moved = np.full(len(at), np.inf), np.full(len(at), 1e-2), at
    off, slope = np.zeros((len(at), len(losses.loss))), np.zeros((len(at), len(losses.loss), 6))
    for _ in range(STEPS):
        off_there, slope_there = _law(losses, moved)
        off_there = off_there - np.log(losses.loss)
        size = np.abs(off_there)
        reached = (weights * np.where(size < HUBER, size**2 / 2, HUBER * (size - HUBER / 2))).sum(-1)
        better = reached < value
        damping = np.clip(damping * np.where(better, 0.3, 4), 1e-9, 1e9)
        at, off, slope, value = (np.where(better.reshape(-1, *[1] * (old.ndim - 1)), new, old) for new, old in (
            (moved, at), (off_there, off), (slope_there, slope), (reached, value)))  # fmt: skip
        weighted = slope * (weights * np.minimum(1, HUBER / np.maximum(np.abs(off), 1e-12)))[..., None]
        pull = (off[..., None] * weighted).sum(1)
        stays = ((at <= LOW) & (pull > 0)) | ((at >= HIGH) & (pull < 0))  # at a bound, while the rest moves
        square = np.swapaxes(weighted, 1, 2) @ slope * ~(stays[:, None] | stays[..., None])
        square[:, range(6), range(6)] += damping[:, None] * np.einsum("fii->fi", square) + 1e-12 + stays
        moved = np.clip(at - np.linalg.solve(square, np.where(stays, 0, pull)[..., None])[..., 0], LOW, HIGH)
    return at, value
