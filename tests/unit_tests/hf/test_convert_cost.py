"""What a conversion costs: memory well below twice the model, and no start without room on the disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert import files
from megatron_recursive.hf.convert.configs import config_values, read_config
from megatron_recursive.hf.convert.mappings import FAMILIES, items
from megatron_recursive.hf.convert.sources import config_object
from tests.distributed import run_command, run_distributed
from tests.unit_tests.hf.donors import save_donor, write_folder
from tests.unit_tests.inference.folders import write_tokenizer

# Peak resident memory above what the imports took, of an import and of an export, in bytes.
MEASURE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from megatron_recursive.backends import cpu
cpu.install()
import transformers.models.llama.modeling_llama
from megatron_recursive.hf.convert import donor_import as convert, export, proof
from megatron_recursive.models import recursive_gpt_model
peak = lambda: int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0]) * 1024
hf, ckpt, back = sys.argv[1:]
before = peak()
knobs = {"enable_recursive_refinement": False}
first = convert.import_model(hf, ckpt, convert.ImportOptions(recursion=knobs)).summary()
imported = peak() - before
second = export.export_model(ckpt, back).summary()
print(json.dumps({"import": imported, "export": peak() - before,
                  "errors": [first["max_logit_error"], second["max_logit_error"]]}))
"""


@pytest.fixture
def gigabyte_model(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A random Llama of about 1 GB in bf16, written a tensor at a time."""
    shape = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8,
             "num_hidden_layers": 10, "vocab_size": 16384, "max_position_embeddings": 128, "head_dim": 64}  # fmt: skip
    family = FAMILIES["llama"]
    arch = read_config(family, config_object(family, shape, "here"), "here")
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_values(family, arch)))
    shapes = {name: shape for item in items(family, arch) for name, shape in item.hf.items()}
    promised = {name: torch.empty(shape, dtype=torch.bfloat16, device="meta") for name, shape in shapes.items()}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            tensor = torch.randn(shape, generator=generator) * (1.0 if len(shape) == 1 else 0.03)
            yield name, tensor.to(torch.bfloat16)

    write_folder(folder, promised, tensors())
    yield folder, sum(tensor.nbytes for tensor in promised.values())
    shutil.rmtree(tmp_path)


@pytest.mark.heavy
def test_memory_stays_below_one_point_three_times_the_weights(gigabyte_model: tuple[Path, int]) -> None:
    folder, nbytes = gigabyte_model
    assert nbytes > 0.95e9
    arguments = [str(folder), str(folder.parent / "ckpt"), str(folder.parent / "back")]
    result = run_command([sys.executable, "-c", MEASURE, *arguments], timeout=500)
    assert result.returncode == 0, result.stderr[-2000:]
    measured = json.loads(result.stdout.splitlines()[-1])
    print(measured, nbytes)
    assert max(measured["errors"]) < 1e-4
    assert measured["import"] <= 1.3 * nbytes and measured["export"] <= 1.3 * nbytes, (measured, nbytes)


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs .* GB, but its disk has .* GB left"), files.new_folder(
        tmp_path / "out", shutil.disk_usage(tmp_path).free
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(UserError, match="exists already"), files.new_folder(tmp_path, 0):
        pass
    assert (tmp_path / "kept").read_text() == "mine"


# --- what is read -----------------------------------------------------------------------------------------------------

PLAIN = {"enable_recursive_refinement": False}
SIZES = {"hidden_size": 240, "vocab_size": 3000, "intermediate_size": 512, "max_position_embeddings": 64}
ROUND = 1.03  # headers of the pieces of a file, which larger tensors do not notice


def _bytes_read(folder: Path) -> dict[str, tuple[float, float]]:
    """Bytes that imports and exports read, over the bytes of the weights: what they say, and what their files saw."""
    from megatron_recursive.hf.convert import donor_import, export, safetensors_files, torch_dist

    seen = [0]

    def counted(original: Any, size: Any) -> Any:
        def wrapper(self: Any, what: Any) -> Any:
            found = original(self, what)
            seen[0] += size(what, found)
            return found

        return wrapper

    kinds = ((safetensors_files.SafetensorsFolder, "get", lambda _, tensor: tensor.nbytes),
             (torch_dist.TorchDistCheckpoint, "_load", lambda info, _: info.length))  # fmt: skip
    originals = [(kind, name, getattr(kind, name)) for kind, name, _ in kinds]
    for kind, name, size in kinds:
        setattr(kind, name, counted(getattr(kind, name), size))
    found = {}

    def measure(name: str, nbytes: int, run: Any) -> None:
        seen[0] = 0
        summary = run().summary()
        found[name] = (summary["bytes_read"] / nbytes, seen[0] / nbytes)

    try:
        for kind, knobs in (("qwen3", PLAIN), ("qwen2, tied", PLAIN), ("qwen3", {"num_refinement_blocks": 2})):
            place = folder / f"{kind}{len(found)}"
            donor = save_donor(kind, place / "hf", **SIZES)
            write_tokenizer(donor)
            weights = (donor / "model.safetensors").stat().st_size
            options = donor_import.ImportOptions(recursion=knobs)
            measure(f"{kind} in {knobs}", weights,
                    lambda: donor_import.import_model(str(donor), str(place / "ckpt"), options, _quiet))  # noqa: B023
            measure(f"{kind} out {knobs}", weights,
                    lambda: export.export_model(str(place / "ckpt"), str(place / "back"), say=_quiet))  # noqa: B023
        unproven = dataclasses.replace(options, proof_dtype=None)
        measure("unproven", weights, lambda: donor_import.import_model(str(donor), str(folder / "o"), unproven, _quiet))
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)
    return found


@pytest.mark.grid
def test_a_conversion_reads_its_weights_twice_at_most(tmp_path: Path) -> None:
    """Once to convert them and once to prove them, whatever passes the plan has, since its layers fit in memory."""
    (found,) = run_distributed(_bytes_read, 1, tmp_path, timeout=200)
    for name, (said, seen) in found.items():
        assert said == seen and 1.9 < said <= 2 * ROUND, (name, found)


def _quiet(_: str) -> None:
    pass


def test_what_does_not_fit_is_read_again_and_what_is_in_stays() -> None:
    from megatron_recursive.hf.convert.reading import remembering

    asked: list[str] = []
    fetch = remembering(lambda name: asked.append(name) or torch.zeros(4), room=40, always=("tied",))
    for _ in range(3):
        for name in ("a", "b", "c", "d", "tied"):
            fetch(name)
    assert {name: asked.count(name) for name in asked} == {"a": 1, "b": 1, "c": 3, "d": 3, "tied": 1}


def _disk_that_lies(donor: Path, out: Path) -> str:
    """An import whose file changes between writing and reading it."""
    from megatron_recursive.hf.convert import donor_import

    close = donor_import.TorchDistWriter.close

    def close_and_spoil(self: Any) -> None:
        close(self)
        file = self.folder / donor_import.DATA_FILE
        raw = bytearray(file.read_bytes())
        raw[len(raw) // 2] ^= 1
        file.write_bytes(raw)

    donor_import.TorchDistWriter.close = close_and_spoil
    try:
        donor_import.import_model(str(donor), str(out), donor_import.ImportOptions(proof_dtype=None), _quiet)
    except UserError as error:
        return str(error)
    finally:
        donor_import.TorchDistWriter.close = close
    return "no error"


def test_a_bit_that_changes_on_the_disk_fails_the_conversion_even_unproven(tmp_path: Path) -> None:
    donor = save_donor("qwen3", tmp_path / "hf")
    (message,) = run_distributed(_disk_that_lies, 1, donor, tmp_path / "out", timeout=200)
    assert "reads back otherwise than it was written; check the disk of --out" in message, message
    assert not (tmp_path / "out").exists()
