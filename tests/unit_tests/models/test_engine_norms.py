"""Every norm placement on Transformer Engine's modules, through Megatron's wrappers and stand-ins for the kernels.

``tests/stand_ins/transformer_engine`` is imported in place of Transformer Engine by processes of this file alone. That
the stand-ins are called as the real modules are is shown by the source in Transformer Engine's own wheel, which is
Python alone; it is fetched, read and not installed. No GPU has run the real modules under these norms.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import REPOSITORY, WorkerPool, run_distributed
from tests.models import Case, Layout, Training, build_model, start_parallel, train
from tests.unit_tests.models.comparing import worst_error
from tests.unit_tests.models.test_norm_placement import TRAINED, train_all

pytestmark = pytest.mark.grid  # a pool of its own

NAMES = ("olmo2", "sandwich-layernorm", "sandwich-residual", "post-residual")
STAND_INS = REPOSITORY / "tests" / "stand_ins" / "transformer_engine"


@pytest.fixture(scope="module")
def engine() -> Iterator[WorkerPool]:
    pool = WorkerPool("engine")
    yield pool
    pool.close()


def named(case: Case, layout: Layout) -> tuple[list[Any], list[str]]:
    """The keys of a checkpoint with their shapes, and the classes that a layer is made of."""
    start_parallel(layout.tp)
    model = build_model(case, layout)
    state = [value for key, value in model.sharded_state_dict().items() if not key.endswith("_extra_state")]
    classes = {type(module).__name__ for module in model.decoder.layers[0].modules()}
    return sorted((value.key, *value.data.shape) for value in state), sorted(classes)


@pytest.fixture(scope="module")
def trained(engine: WorkerPool) -> tuple[dict[str, Training], list[dict[str, Training]]]:
    local = run_distributed(train_all, 1, [*NAMES], Layout(), {}, timeout=120)[0]
    layout = Layout(tp=2, sequence_parallel=True, engine=True)
    return local, run_distributed(train_all, 2, [*NAMES], layout, {}, timeout=120, pool=engine)


@pytest.mark.parametrize("name", NAMES)
def test_engine_modules_train_as_the_local_ones(trained: Any, name: str) -> None:
    expected = trained[0][name]
    for rank in (rank[name] for rank in trained[1]):
        for mine, theirs in zip(rank.metrics, expected.metrics, strict=True):
            assert mine == pytest.approx(theirs, rel=5e-6, abs=1e-6)
        for mine_of, theirs_of in zip(rank.gradients, expected.gradients, strict=True):
            assert worst_error(mine_of, theirs_of)[0] <= 1e-5
        assert worst_error(rank.parameters, expected.parameters)[0] <= 1e-5


def trained_on_documents(layout: Layout, masked: bool) -> Training:
    case = Case(documents=True, masked=masked, transformer={"num_query_groups": 2}, steps=2, optimizer={"lr": 1e-3})
    return train(case, layout)


def test_packed_sequences_train_as_a_mask(engine: WorkerPool) -> None:
    """Transformer Engine is given documents as Megatron hands it packed sequences. No GPU has run its kernels so."""
    (expected,) = run_distributed(trained_on_documents, 1, Layout(), True)
    layout = Layout(tp=2, sequence_parallel=True, engine=True)
    for rank in run_distributed(trained_on_documents, 2, layout, False, timeout=120, pool=engine):
        assert rank.metrics[1] == pytest.approx(expected.metrics[1], rel=5e-6, abs=1e-6)
        assert worst_error(rank.gradients[1], expected.gradients[1])[0] <= 1e-5


def test_checkpoints_have_the_same_keys(engine: WorkerPool) -> None:
    for name in NAMES:
        local, _ = run_distributed(named, 1, TRAINED[name], Layout())[0]
        theirs, made_of = run_distributed(named, 1, TRAINED[name], Layout(engine=True), pool=engine)[0]
        assert theirs == local
        assert not {"RowParallelLinear", "ColumnParallelLinear", "SequenceParallelNorm"} & set(made_of)
    assert "TEColumnParallelLinear" in run_distributed(
        named, 1, TRAINED["olmo2"], Layout(engine=True), pool=engine)[0][1]  # fmt: skip


# --- the stand-ins --------------------------------------------------------------------------------------------------

# Class of the stand-ins -> where the wheel has it, and which methods are called.
STOOD_IN_FOR = {
    "Linear": ("module/linear.py", ("__init__", "forward")),
    "LayerNormLinear": ("module/layernorm_linear.py", ("__init__", "forward")),
    "LayerNorm": ("module/layernorm.py", ("__init__",)),
    "RMSNorm": ("module/rmsnorm.py", ("__init__",)),
    "DotProductAttention": ("attention/dot_product_attention/dot_product_attention.py", ("__init__", "forward")),
}


def signatures(source: str, name: str, methods: tuple[str, ...]) -> dict[str, list[tuple[str, str]]]:
    """Method -> its arguments in order, each with its default as written ("" for none)."""
    (cls,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == name)
    found = {}
    for node in cls.body:
        if isinstance(node, ast.FunctionDef) and node.name in methods:
            assert not node.args.kwonlyargs and not node.args.vararg
            names = [argument.arg for argument in node.args.args]
            defaults = [""] * (len(names) - len(node.args.defaults)) + [ast.unparse(d) for d in node.args.defaults]
            more = node.args.kwarg.arg if node.args.kwarg else ""
            found[node.name] = [*zip(names, defaults, strict=True), ("**", more)]
    return found


def wheel(folder: Path) -> zipfile.ZipFile:
    lines = (STAND_INS / "__init__.py").read_text().splitlines()
    (version,) = (line.split('"')[1] for line in lines if line.startswith("__version__ = "))
    command = [getattr(sys, "_base_executable", sys.executable), "-m", "pip", "download", "--quiet", "--no-deps",
               "--only-binary", ":all:", "--dest", str(folder), f"transformer_engine=={version}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no pip"])[-1]
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the wheel cannot be fetched: {why}")
    return zipfile.ZipFile(next(folder.glob("*.whl")))


@pytest.mark.heavy
def test_the_stand_ins_have_the_signatures_of_transformer_engines_wheel(tmp_path: Path) -> None:
    ours, theirs = (STAND_INS / "pytorch" / "modules.py").read_text(), wheel(tmp_path)
    for name, (place, methods) in STOOD_IN_FOR.items():
        source = theirs.read(f"transformer_engine/pytorch/{place}").decode()
        expected = signatures(source, name, methods)
        assert set(expected) == set(methods)
        assert signatures(ours, name, methods) == expected, name
    for place, parameters in (("linear", ("weight", "bias")), ("layernorm_linear", ("layer_norm_weight", "weight"))):
        source = theirs.read(f"transformer_engine/pytorch/module/{place}.py").decode()
        assert all(f"self.{parameter}" in source or f'"{parameter}"' in source for parameter in parameters)
