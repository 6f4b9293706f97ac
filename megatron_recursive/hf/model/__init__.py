"""The Hugging Face model: what ships with an export. These files import torch and transformers alone, and the plan."""

import shutil
from pathlib import Path

from megatron_recursive.plan import added_parameters as added_module
from megatron_recursive.plan import recursion_plan as plan_module

# What an export folder carries, so that it loads without this package (trust_remote_code).
REMOTE_CODE_FILES = (
    "configuration_recursive_gpt.py",
    "modeling_recursive_gpt.py",
    "outputs_recursive_gpt.py",
    "layers_recursive_gpt.py",
    "exits_recursive_gpt.py",
    "generation_recursive_gpt.py",
    "cache_recursive_gpt.py",
    "added_parameters.py",
    "recursion_plan.py",
)
_IMPORT = "from megatron_recursive.errors import UserError\n"
_WITHOUT_PACKAGE = "\n\nclass UserError(ValueError):\n    \"\"\"What a plan cannot be.\"\"\"\n\n"


def write_remote_code(folder: Path) -> None:
    """Put the files into an export. The plan's are the package's own, with an error that needs no package."""
    for name in REMOTE_CODE_FILES:
        shutil.copyfile(Path(__file__).parent / name, folder / name)
    shutil.copyfile(added_module.__file__, folder / "added_parameters.py")
    source = Path(plan_module.__file__).read_text(encoding="utf-8")
    assert _IMPORT in source, "the plan's one import of this package has changed"
    (folder / "recursion_plan.py").write_text(source.replace(_IMPORT, _WITHOUT_PACKAGE), encoding="utf-8")
