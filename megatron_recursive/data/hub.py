"""Data sets of the Hugging Face hub: the files of a commit, by configuration and split."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_recursive.data.spans import insist
from megatron_recursive.errors import UserError

_NAME = re.compile(r"(?:datasets/)?([^/@]+(?:/[^/@]+)?)(?:@(refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(.*))?")
_SHARD = re.compile(r"(?:^|/)data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORD = re.compile(rf"(?<![a-z])({'|'.join(_WORDS)})(?![a-z])")


@dataclass(frozen=True)
class HubChoice:
    """The configurations and splits of ``--hf-config`` and ``--hf-split``; none where there is one only."""

    configs: tuple[str, ...] = ()
    splits: tuple[str, ...] = ()


def add_hub_flags(add: Callable[..., Any]) -> None:
    """The flags of :class:`HubChoice`."""
    add("--hf-config", nargs="+", metavar="NAME", help="configurations of the data sets of hf:// inputs")
    add("--hf-split", nargs="+", metavar="NAME", help="splits of them, such as train")


def hub_choice(args: argparse.Namespace) -> HubChoice | None:
    """What the flags choose; None without them."""
    given = args.hf_config or args.hf_split
    return HubChoice(tuple(args.hf_config or ()), tuple(args.hf_split or ())) if given else None


def hub_api() -> Any:
    """The hub's client, through which all questions to it go."""
    from huggingface_hub import HfApi

    return HfApi()


def find_on_hub(given: str, choice: HubChoice, wanted: Callable[[str], bool]) -> list[tuple[str, int]]:
    """URL, with the commit that the revision stands for now, and size of the files of ``hf://NAME[@REVISION][/GLOB]``.

    Configurations are those of the data set's card, splits those of the card or of the words train, validation and test
    in the path, as the library ``datasets`` finds them.

    Raises:
        UserError: the hub does not answer or has no such data set, or several configurations or splits are left of
            which none is chosen: validation text in training data would be contamination.
    """
    parsed = _NAME.fullmatch(given.removeprefix("hf://"))
    if parsed is None:
        raise UserError(f"--input {given} is no hf://NAME[@REVISION][/GLOB]")
    name, revision, pattern = parsed[1], (parsed[2] or "").replace("%2F", "/") or None, (parsed[3] or "").strip("/")
    api = hub_api()
    mend = "check the name and the network"
    info = insist(f"--input {given}", lambda: api.dataset_info(name, revision=revision), mend)
    commit = {"revision": info.sha, "repo_type": "dataset"}
    tree = insist(f"--input {given}", lambda: list(api.list_repo_tree(name, recursive=True, **commit)), mend)
    sizes = {entry.path: entry.size for entry in tree if getattr(entry, "size", None) is not None}
    paths = [path for path in sorted(sizes) if wanted(path) and (not pattern or _matches(pattern, path))]
    rules = list(_rules(info.card_data))
    groups = _group(paths, rules) or _group(paths, [("default", None, ["**"])])
    chosen = _choose(given, "configuration", "--hf-config", choice.configs, {group[0] for group in groups})
    groups = {group: found for group, found in groups.items() if group[0] in chosen}
    chosen = _choose(given, "split", "--hf-split", choice.splits, {group[1] for group in groups})
    kept = sorted({path for (_, split), found in groups.items() if split in chosen for path in found})
    return [(f"hf://datasets/{name}@{info.sha}/{path}", sizes[path]) for path in kept]


def revisions(paths: Iterable[str]) -> list[str]:
    """The data sets with their commits in URLs that :func:`find_on_hub` made."""
    found = (re.match(r"hf://datasets/[^@]+@[^/]+", path) for path in paths)
    return list(dict.fromkeys(match[0] for match in found if match))


def _rules(card: Any) -> Iterator[tuple[str, str | None, list[str]]]:
    """(configuration, split or None, patterns) of a card's metadata."""
    for config in (card.get("configs") if card is not None else None) or []:
        name, below = config.get("config_name", "default"), config.get("data_dir")
        entries = config.get("data_files", [below] if below else ["**"])
        for entry in [entries] if isinstance(entries, str) else entries:
            split, path = (entry.get("split"), entry["path"]) if isinstance(entry, dict) else (None, entry)
            yield name, split, [path] if isinstance(path, str) else path


def _group(paths: list[str], rules: list[tuple[str, str | None, list[str]]]) -> dict[tuple[str, str], list[str]]:
    """The paths by configuration and split; where no path says its split, all are of train."""
    groups: dict[tuple[str, str], list[str]] = {}
    unnamed = "train" if not any(map(_split_of, paths)) else "(no split)"
    for config, split, patterns in rules:
        for path in paths:
            if any(_matches(pattern, path) for pattern in patterns):
                groups.setdefault((config, split or _split_of(path) or unnamed), []).append(path)
    return groups


def _split_of(path: str) -> str | None:
    shard, words = _SHARD.search(path), _WORD.findall(path.lower())
    return shard[1] if shard else _WORDS[words[-1]] if words else None


def _matches(pattern: str, path: str) -> bool:
    from fsspec.utils import glob_translate

    pattern = pattern.removeprefix("./").strip("/")
    return path.startswith(f"{pattern}/") or re.fullmatch(glob_translate(pattern), path) is not None


def _choose(given: str, kind: str, flag: str, wanted: tuple[str, ...], there: set[str]) -> set[str]:
    names = ", ".join(sorted(there))
    for name in wanted:
        if name not in there:
            raise UserError(f"{flag} {name}: --input {given} has no such {kind} but {names or 'none'}; name one")
    if not wanted and len(there) > 1:
        raise UserError(f"--input {given} has several {kind}s, {names}; choose with {flag} {min(there)}")
    return set(wanted) or there
