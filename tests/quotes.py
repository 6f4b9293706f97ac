"""Code that the documents quote: ``<!-- quote FILE:NAME -->`` stands above a copy of that function or class.

``python -m tests.quotes`` renews the copies, ``--check`` says which are old; a test holds them equal to the source.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md", "RECURSIVE_GPT_IMPLEMENTATION_GUIDE.md", "CONTRIBUTING.md", "examples/recursive_gpt/README.md",
)  # fmt: skip
QUOTE = re.compile(r"(<!-- quote (?P<file>[\w./]+):(?P<name>\w+) -->\n)(```python\n.*?\n```\n)?", re.DOTALL)


def source_of(file: str, name: str) -> str:
    """The source of a top-level function or class, without its docstring."""
    text = (ROOT / file).read_text()
    node = next(n for n in ast.parse(text).body if getattr(n, "name", None) == name)
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    lines = text.split("\n")[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        first = node.body[0]
        assert first.end_lineno is not None
        del lines[first.lineno - node.lineno : first.end_lineno - node.lineno + 1]
    return "\n".join(line for number, line in enumerate(lines) if line or lines[number - 1])


def renewed(document: str) -> str:
    """The document's text with every quote as the source has it now."""
    text = (ROOT / document).read_text()
    return QUOTE.sub(lambda m: f"{m[1]}```python\n{source_of(m['file'], m['name'])}\n```\n", text)


if __name__ == "__main__":
    old = [name for name in DOCUMENTS if (ROOT / name).read_text() != renewed(name)]
    if "--check" in sys.argv[1:] and old:
        sys.exit(f"quoted code has changed in {', '.join(old)}; run python -m tests.quotes")
    for name in old:
        (ROOT / name).write_text(renewed(name))
