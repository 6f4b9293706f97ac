"""Transformers' own common tests, from the source distribution of the installed version, on the exported model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import transformers

from tests.distributed import run_command

pytestmark = pytest.mark.heavy

SHIPPED = ("test_modeling_common.py", "test_configuration_common.py", "test_training_mixin.py")
# Neighbours that they import, but that are not in the distribution.
STUBS = {
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def download(folder: Path) -> Path:
    """The source distribution. The environment has no pip of its own, so that one is made."""
    subprocess.run([sys.executable, "-m", "venv", str(folder / "pip")], check=True, capture_output=True, timeout=300)
    command = [folder / "pip" / "bin" / "python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary",
               "transformers", "--dest", folder, f"transformers=={transformers.__version__}"]  # fmt: skip
    done = run_command(command, timeout=580)
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no registry is reached: {done.stderr[-500:]}")
    return next(folder.glob("transformers-*.tar.gz"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package ``transformers_tests``."""
    folder = tmp_path_factory.mktemp("sources")
    package = folder / "transformers_tests"
    package.mkdir()
    (package / "__init__.py").touch()
    with tarfile.open(download(folder)) as archive:
        for member in archive:
            path = Path(member.name)
            if path.parent.name == "tests" and path.name in SHIPPED:
                stream = archive.extractfile(member)
                assert stream is not None
                (package / path.name).write_bytes(stream.read())
    for name, text in STUBS.items():
        (package / name).parent.mkdir()
        (package / name).parent.joinpath("__init__.py").touch()
        (package / name).write_text(text)
    return folder


# FullGradient computes what Detached does, with other gradients; all plans share one process and its imports.
PLANS = ("Plain", "Detached", "Huginn", "Gated", "Hierarchical")
CHOSEN = " or ".join([*(f"{plan}Test" for plan in PLANS), "(FullGradientTest and (training or grad))"])


def test_common_tests_pass(sources: Path) -> None:
    repository = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "tests/unit_tests/hf/transformers_common.py", "-k", CHOSEN,
               "--override-ini=addopts=", "-p", "no:cacheprovider", "-W", "ignore", "--tb=short", "-q"]  # fmt: skip
    path = [str(sources), str(repository), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = run_command(command, timeout=590, env={"PYTHONPATH": os.pathsep.join(path)})
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed[1]) > 100 * len(PLANS), done.stdout[-500:]
