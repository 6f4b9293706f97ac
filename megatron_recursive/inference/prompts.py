"""Prompts from the command line and from files."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_recursive.errors import UserError


def read_prompts(prompts: list[str], file: str | None) -> list[tuple[str, str]]:
    """(what to call it in an error, prompt) of each prompt, those of the file last.

    A file holds a prompt a line, or, as ``.jsonl``, objects with a "prompt"; blank lines are passed over. Lines end at
    ``\\n`` or ``\\r\\n``: what else Unicode counts as a line's end belongs to the prompt.

    Raises:
        UserError: the file is missing, holds no prompt, or a line is none.
    """
    named = [("--prompt" if len(prompts) == 1 else f"--prompt {n}", prompt) for n, prompt in enumerate(prompts, 1)]
    if file is None:
        return named
    try:
        lines = Path(file).read_bytes().decode("utf-8-sig").replace("\r\n", "\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--prompt-file {file} cannot be read ({reason}); name a text file.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"--prompt-file {file}, line {number},"
            found.append((where, _from_json(line, where) if file.endswith(".jsonl") else line))
    if not found:
        raise UserError(f"--prompt-file {file} holds no prompt.")
    return named + found


def _from_json(line: str, where: str) -> str:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}).") from error
    prompt = values.get("prompt") if isinstance(values, dict) else None
    if not isinstance(prompt, str):
        raise UserError(f'{where} must be an object with a text under "prompt".')
    return prompt
