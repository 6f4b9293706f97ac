"""What a teacher says of the samples of a training set, of its most likely tokens alone: a folder of NumPy arrays.

A sample is known by a digest of its tokens. So neither order, seed, batches, layout nor a resume can give a sample the
words of another, and one that the teacher has not seen is refused.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_recursive.errors import UserError

FACTS = "teacher.json"
DTYPES = {"keys": "<i8", "ids": "<i4", "log_probs": "<f2"}


class TeacherFiles:
    """``keys`` [N], ``ids`` [N, S, K] and ``log_probs`` [N, S, K + 1] (losses/distillation.py), mapped into memory.

    ``facts``: what it was prepared with. Processes may :meth:`write` samples of their own at the same time.
    """

    def __init__(self, folder: Path, *, mode: Literal["r", "r+"] = "r") -> None:
        self.folder = folder
        try:
            self.facts: dict[str, str] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            arrays = [np.load(folder / f"{name}.npy", mmap_mode=mode) for name in DTYPES]
            self.keys, self.ids, self.log_probs = arrays
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} is no whole folder of --distill-prepare ({error}); prepare it again.") from error

    @classmethod
    def create(cls, folder: Path, facts: Mapping[str, str], samples: int, length: int, kept: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        if samples * length * (6 * kept + 2) > shutil.disk_usage(folder).free:  # a mapped file that does not fit kills
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        shapes = ((samples,), (samples, length, kept), (samples, length, kept + 1))
        for (name, dtype), shape in zip(DTYPES.items(), shapes, strict=True):
            np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(dtype), shape)
        (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")

    def write(self, row: int, tokens: np.ndarray, ids: np.ndarray, log_probs: np.ndarray) -> None:
        self.keys[row], self.ids[row], self.log_probs[row] = _key(tokens), ids, log_probs

    def flush(self) -> None:
        for array in (self.keys, self.ids, self.log_probs):
            array.flush()

    def read(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids and log-probabilities of samples [B, S].

        Raises:
            UserError: one is not there.
        """
        wanted, (known, order) = np.array([_key(sample) for sample in tokens]), self._index
        at = np.searchsorted(known, wanted).clip(max=len(known) - 1)
        if not (known[at] == wanted).all():
            raise UserError(
                f"{self.folder} lacks a sample of this run: it was prepared of other data, or with another --split, "
                "--seed or number of samples; give the flags that it was prepared with, or prepare it again."
            )
        return self.ids[order[at]], self.log_probs[order[at]]

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.argsort(self.keys, kind="stable")
        return self.keys[order], order


def _key(tokens: np.ndarray) -> int:
    digest = hashlib.blake2b(tokens.astype("<i8").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
