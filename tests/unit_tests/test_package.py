"""What an installation and a source distribution carry, as setuptools lists it."""

from __future__ import annotations

import configparser
import email
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_recursive import __version__, command_line
from tests.distributed import REPOSITORY

CARRIED = (
    "CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "CONTRIBUTING.md", "Makefile", "requirements/dev.txt",
    "tests/conftest.py",
    "tests/functional_tests/golden_losses.json", "tools/preprocess_data.py", "benchmarks/ring.py",
    "examples/recursive_gpt/pretrain_default.sh", "megatron_recursive/py.typed", "megatron_recursive/commands/plan.py",
    "megatron_recursive/report/page.html",
)  # fmt: skip


@pytest.fixture(scope="module")
def metadata(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("metadata")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(place)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, timeout=60)
    return place / "megatron_recursive.egg-info"


def test_the_source_distribution_is_whole(metadata: Path) -> None:
    listed = set((metadata / "SOURCES.txt").read_text().splitlines())
    assert set(CARRIED) <= listed
    assert {str(path.relative_to(REPOSITORY)) for path in (REPOSITORY / "tests").rglob("test_*.py")} <= listed
    assert not any(path.endswith(".pyc") for path in listed)


def test_one_command_is_installed(metadata: Path) -> None:
    entry_points = configparser.ConfigParser()
    entry_points.read(metadata / "entry_points.txt")
    assert dict(entry_points["console_scripts"]) == {command_line.PROGRAM: "megatron_recursive.commands:main"}


def test_a_missing_package_is_asked_for_by_the_extra_that_brings_it(metadata: Path) -> None:
    base, *extras = re.split(r"^\[(.*)\]$", (metadata / "requires.txt").read_text(), flags=re.MULTILINE)
    brought = {"": base} | dict(zip(extras[::2], extras[1::2], strict=True))
    for package, extra in command_line._EXTRA_OF.items():
        assert re.search(rf"^(py)?{package.replace('_', '-')}\b", brought[extra], re.MULTILINE), (package, extra)


def test_the_version_is_one_that_the_changelog_tells_of() -> None:
    assert re.search(rf"^## \[{re.escape(__version__)}\] - \d{{4}}-\d\d-\d\d$",
                     (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)  # fmt: skip


def test_the_citation_is_that_of_this_version(metadata: Path) -> None:
    cited = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= cited.keys(), "what the format asks for"
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    information = email.message_from_string((metadata / "PKG-INFO").read_text())
    assert [each["name"] for each in cited["authors"]] == [information["Author"]]
    license = information["License"] or information["License-Expression"]  # by the version of setuptools
    assert (cited["version"], cited["license"]) == (__version__, license)
    assert cited["title"].endswith(information["Summary"][1:])
    released = f"## [{__version__}] - {cited['date-released']}"
    assert f"\n{released}\n" in (REPOSITORY / "CHANGELOG.md").read_text()
