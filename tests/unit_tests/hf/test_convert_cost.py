"""What a conversion costs: memory well below twice the model, and no start without room on the disk."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_recursive.errors import UserError
from megatron_recursive.hf.convert import files
from megatron_recursive.hf.convert.mappings import FAMILIES, config_values, items, read_config
from megatron_recursive.hf.convert.safetensors_files import write_folder
from megatron_recursive.hf.convert.sources import config_object
from tests.distributed import run_command

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
