"""Imports inside the package point one way: the table below, checked from the syntax trees of all its files."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_recursive"
OURS = PACKAGE.name
MAX_LINES = 500

# Folder or module -> what its files may import besides the standard library, megatron_recursive.errors,
# megatron_recursive.command_line, megatron_recursive.figures and itself.
# A name stands for the module and for all below it.
ALLOWED: dict[str, tuple[str, ...]] = {
    "errors": (),
    "command_line": (),
    "figures": (),
    "plan": (),
    "accounting": (f"{OURS}.plan",),
    "plots": (f"{OURS}.plan", f"{OURS}.data.files", "matplotlib", "tensorboard", "wandb"),
    "backends": ("torch",),
    "data": (
        "numpy", "pyarrow", "orjson", "zstandard", "tokenizers", "transformers", "sentencepiece", "datatrove", "dill",
        "loguru", "tqdm", "fsspec", "huggingface_hub", "jinja2", "megatron.core.datasets",
    ),
    "losses": (f"{OURS}.plan", "torch", "megatron.core"),
    "models": (f"{OURS}.plan", f"{OURS}.losses", "torch", "megatron.core"),
    "optimizers": (f"{OURS}.plan", f"{OURS}.models", "torch", "megatron.core"),
    "pipeline": (f"{OURS}.plan", f"{OURS}.accounting", f"{OURS}.models", "torch", "megatron.core"),
    "hf": (
        *(f"{OURS}.{module}" for module in ("plan", "accounting", "backends", "models", "data.chat", "data.preparation",
                                            "data.progress", "data.tokenizer", "plots.runs")),
        "torch", "tokenizers", "transformers", "accelerate", "safetensors", "huggingface_hub", "gguf", "megatron.core",
    ),
    "training": (
        *(f"{OURS}.{folder}" for folder in ("plan", "accounting", "backends", "data", "losses", "models", "optimizers",
                                            "pipeline", "hf.convert.teacher")),
        "torch", "megatron.core", "megatron.training",
    ),
    "inference": (
        *(f"{OURS}.{folder}" for folder in ("plan", "backends", "data", "losses", "models", "hf")), "torch",
        "transformers", "megatron.core", "sacrebleu", "tqdm",
    ),
    "evaluation": (
        *(f"{OURS}.{folder}" for folder in ("backends", "data.files", "data.tokenizer", "hf")), "torch", "transformers",
        "accelerate", "lm_eval",
    ),
    "analysis": (
        *(f"{OURS}.{folder}" for folder in ("plan", "accounting", "backends", "data", "hf", "losses", "models",
                                            "inference")),
        "torch", "transformers", "kneed", "safetensors",
    ),
    "ablation": (f"{OURS}.plots", f"{OURS}.data.files", "numpy", "tqdm", "yaml"),
    "report": (f"{OURS}.plan", f"{OURS}.plots", f"{OURS}.data.tokenizer", "jinja2"),
    "commands": (
        *(f"{OURS}.{module}" for module in ("plan", "accounting", "pipeline", "backends", "data", "hf", "inference",
                                            "plots", "ablation", "analysis", "evaluation", "launch", "report",
                                            "__version__")),
        "torch", "transformers", "lm_eval", "tqdm",
    ),
    "launch": (f"{OURS}.training.pretrain", "torch"),
    "pretrain": (f"{OURS}.training.pretrain",),
    "__main__": (f"{OURS}.commands",),
}  # fmt: skip


def imports_of(source: str, module: str, *, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of everything that a module imports, anywhere in it.

    ``from a import b`` yields ``a.b``: whether b is a module is for the reader of the name to say. Imports for the type
    checker count too: they are dependencies all the same.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                keep = len(parts) - node.level + is_package
                base = ".".join([*parts[:keep], *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def is_within(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module of the package imports against the table, a line each."""
    parts = module.split(".")
    folder = parts[1] if len(parts) > 1 else ""
    if folder and folder not in ALLOWED:
        return [f"{module}: the folder '{folder}' has no line in the table of {Path(__file__).name}"]
    everywhere = (f"{OURS}.errors", f"{OURS}.command_line", f"{OURS}.figures")
    allowed = (*everywhere, *ALLOWED.get(folder, ()), *([f"{OURS}.{folder}"] if folder else []))
    found = []
    for line, name in imports_of(source, module, is_package=is_package):
        if name.split(".")[0] in sys.stdlib_module_names or any(is_within(name, each) for each in allowed):
            continue
        found.append(f"{module}:{line} imports {name}")
    return found


def module_of(path: Path) -> tuple[str, bool]:
    parts = [OURS, *path.relative_to(PACKAGE).with_suffix("").parts]
    is_package = parts[-1] == "__init__"
    return ".".join(parts[:-1] if is_package else parts), is_package


def sources() -> dict[str, tuple[str, bool]]:
    """Module name -> (source, whether it is a package)."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        module, is_package = module_of(path)
        found[module] = path.read_text(encoding="utf-8"), is_package
    return found


SOURCES = sources()


@pytest.mark.parametrize("module", SOURCES)
def test_imports_follow_the_table(module: str) -> None:
    source, is_package = SOURCES[module]
    assert violations(source, module, is_package=is_package) == []


PLANTED = [
    ("megatron_recursive.plan.builders", "import torch", "torch"),
    ("megatron_recursive.plan.builders", "from megatron_recursive.models import x", "megatron_recursive.models.x"),
    ("megatron_recursive.plan.builders", "def f():\n    from ..models.layer_specs import x", "models.layer_specs.x"),
    ("megatron_recursive.accounting.flops", "import megatron.core.utils", "megatron.core.utils"),
    ("megatron_recursive.data.files", "from megatron.core import parallel_state", "megatron.core.parallel_state"),
    ("megatron_recursive.models.added_modules", "import megatron.training", "megatron.training"),
    ("megatron_recursive.models.added_modules", "from megatron import training", "megatron.training"),
    ("megatron_recursive.models.x", "importlib.import_module('megatron.training')", "megatron.training"),
    ("megatron_recursive.losses.x", "if TYPE_CHECKING:\n    from megatron_recursive.models import y", "models.y"),
    ("megatron_recursive.training.report", "import megatron_recursive.plots.loss_curve", "plots.loss_curve"),
    ("megatron_recursive.training.report", "from tests import models", "tests.models"),
    ("megatron_recursive.data.files", "import tools.build_corpus", "tools.build_corpus"),
    ("megatron_recursive.plots.x", "import megatron_recursive.planner", "megatron_recursive.planner"),
    ("megatron_recursive.errors", "import numpy", "numpy"),
    ("megatron_recursive.novel.thing", "", "'novel' has no line"),
]


@pytest.mark.parametrize(("module", "source", "name"), PLANTED)
def test_a_planted_violation_is_found(module: str, source: str, name: str) -> None:
    (found,) = violations(source, module)
    assert module in found and name in found


def patches_in(source: str, *packages: str) -> list[int]:
    """Lines in which something imported from one of these packages gets another attribute."""
    tree = ast.parse(source)
    foreign = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in packages
    }  # fmt: skip

    def is_foreign(target: ast.expr) -> bool:
        while isinstance(target, ast.Attribute):
            target = target.value
        return isinstance(target, ast.Name) and target.id in foreign

    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Attribute) and is_foreign(target) for target in targets):
            found.append(node.lineno)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Call) and _called(node) in ("setattr", "wrap") and is_foreign(node.args[0]):
            found.append(node.lineno)
    return found


def test_patches_of_megatron_live_where_the_guide_says() -> None:
    guide = (PACKAGE.parent / "RECURSIVE_GPT_IMPLEMENTATION_GUIDE.md").read_text(encoding="utf-8")
    table = guide.split("## 10. Patches of Megatron")[1].split("\n## ")[0]
    listed = {path.replace("/", ".") for path in re.findall(r"^\| `(\S+)\.py` \|", table, re.MULTILINE)}
    patching = {module for module, (source, _) in SOURCES.items() if patches_in(source, "megatron")}
    assert patching - listed == set(), "a patch that the guide does not list"
    home = f"{OURS}.training.patches"
    of_training = {module for module in SOURCES if is_within(module, f"{OURS}.training")}
    assert of_training & listed == {module for module in of_training if module.startswith(f"{home}.")}
    assert all(is_within(m, home) for m in of_training if patches_in(SOURCES[m][0], "megatron", "torch"))
    assert patches_in("from megatron.training import training as t\nt.train = 1", "megatron") == [2]
    assert patches_in("import torch\nsetattr(torch.Tensor, 'cuda', 1)\nx = torch.Tensor", "torch") == [2]


def test_one_adapter_brings_megatron_checkpoints_to_inference() -> None:
    found = {
        module
        for module, (source, is_package) in SOURCES.items()
        for _, name in imports_of(source, module, is_package=is_package)
        if is_within(module, f"{OURS}.inference") and any(is_within(name, x) for x in ("megatron", f"{OURS}.models"))
    }
    assert found == {f"{OURS}.inference.megatron_model", f"{OURS}.inference.pass_contexts"}


def test_relative_imports_of_a_package_are_resolved() -> None:
    assert violations("from .builders import build_plan", "megatron_recursive.plan", is_package=True) == []
    assert violations("from ..models import x", "megatron_recursive.plan", is_package=True) != []
    assert violations("from .recursion_plan import x\nimport json", "megatron_recursive.plan.builders") == []


def graph() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports. A parent package is left out: it is always loaded first."""
    edges = {}
    for module, (source, is_package) in SOURCES.items():
        names = [name for _, name in imports_of(source, module, is_package=is_package)]
        # "from a import b": the module a.b where there is one, or else a.
        targets = {name if name in SOURCES else name.rpartition(".")[0] for name in names}
        edges[module] = {name for name in targets if name in SOURCES and not is_within(module, name)}
    return edges


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, or nothing. Leaves are taken off until a ring remains."""
    remaining = {module: set(targets) for module, targets in edges.items()}
    while leaves := [module for module, targets in remaining.items() if not targets & set(remaining)]:
        for module in leaves:
            del remaining[module]
    return sorted(remaining)


def test_no_module_imports_itself_by_a_detour() -> None:
    assert find_cycle(graph()) == []
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == ["a", "b", "c"]


def test_files_are_of_a_size_that_one_can_read() -> None:
    lengths = {module: source.count("\n") for module, (source, _) in SOURCES.items()}
    assert {module: length for module, length in lengths.items() if length > MAX_LINES} == {}
