"""The end of preprocessing: the parts become one dataset, or a dataset each with a list of them for training."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_recursive.data.files import cannot_write, replacing_folder, sync
from megatron_recursive.data.hub import revisions
from megatron_recursive.data.indexed import check_indexed_dataset, read_lengths, token_type, write_index
from megatron_recursive.data.preparation import SUFFIX, Preparation, digest
from megatron_recursive.data.progress import Progress
from megatron_recursive.data.statistics import Statistics, add_malformed, lengths_of, most_frequent
from megatron_recursive.data.tokenizer import StoredTokenizer
from megatron_recursive.data.work_folder import PartReport, WorkFolder, write_replacing
from megatron_recursive.errors import UserError

Lengths = Callable[[], Iterator[Any]]
"""The tokens of each document, as arrays, anew at each call."""
SUPERVISED, TOKENIZER = "_supervised", "_tokenizer"
"""Behind the prefix of a chat dataset: which of its tokens the loss counts (uint8), and the tokenizer's folder."""
MARK_BYTES = 2**30
"""After so many bytes the join notes how far it is, and goes on from there."""
_COPY_BYTES = 2**24


def data_args_file(prefix: str) -> Path:
    """The file for ``--data-args-path``: a line ``TOKENS PREFIX`` for each part, so that shares are by tokens."""
    return Path(f"{prefix}.data_args")


def finish(work: WorkFolder, prefix: str, tokenizer: StoredTokenizer, join: bool) -> PartReport:
    """Join the parts, in order, into ``PREFIX.bin`` and ``PREFIX.idx``, or publish each as ``PREFIX_NUMBER``.

    What proves the rest complete comes last: ``.idx``, or the list of the parts. Returns the sums of the reports.

    Raises:
        UserError: a part is missing or damaged, there is no document in all, or the files cannot be written.
    """
    reports = [_complete_report(work, rank, prefix) for rank in range(work.count_parts())]
    total = add_reports(reports)
    if not total.documents:
        also = "".join(f" ({count:,} malformed; the first: {first})" for count, first in total.malformed.values())
        also += "".join(f" ({count:,} {why})" for why, count in total.dropped.items())
        raise UserError(f"--input holds nothing to train on{also}; name files with documents in them")
    try:
        (_join if join else _publish)(work, prefix, tokenizer, reports)
    except OSError as error:
        raise cannot_write(Path(f"{prefix}.bin"), error) from error
    return total


def add_reports(reports: Sequence[PartReport]) -> PartReport:
    """Documents, tokens and malformed ones of all parts."""
    total = PartReport(malformed=add_malformed(report.malformed for report in reports))
    for report in reports:
        total.documents += report.documents
        total.tokens += report.tokens
        total.supervised += report.supervised
        total.skipped += report.skipped
        for why, count in report.dropped.items():
            total.dropped[why] = total.dropped.get(why, 0) + count
    return total


def listed_parts(prefix: str) -> list[str]:
    """The prefixes in the list of an earlier run; none without one."""
    file = data_args_file(prefix)
    words = file.read_text("utf-8").split() if file.is_file() else []
    return [name for name in words[1::2] if re.fullmatch(rf"{re.escape(prefix)}_\d{{5,}}", name)]


def _join(work: WorkFolder, prefix: str, tokenizer: StoredTokenizer, reports: list[PartReport]) -> None:
    parts = [work.part(rank) for rank, report in enumerate(reports) if report.documents]
    joined_bin, joined_idx, record = (work.path / f"joined.{end}" for end in ("bin", "idx", "json"))

    def lengths() -> Iterator[Any]:
        return itertools.chain.from_iterable(read_lengths(part.with_suffix(".idx")) for part in parts)

    _join_tokens([part.with_suffix(".bin") for part in parts], joined_bin)
    write_index(joined_idx, token_type(tokenizer.id_range), lengths)
    made = _record(work, tokenizer, add_reports(reports), joined_bin, lengths)
    record.write_text(made.to_json(), "utf-8")
    for file in (joined_idx, record):
        sync(file)
    # An old .idx must not stand beside a new .bin, not even for a moment.
    Path(f"{prefix}.idx").unlink(missing_ok=True)
    if made.kind == "chat":
        _join_supervised(work, prefix, parts, lengths)
    os.replace(joined_bin, f"{prefix}.bin")
    os.replace(record, f"{prefix}{SUFFIX}")
    os.replace(joined_idx, f"{prefix}.idx")


def _join_supervised(work: WorkFolder, prefix: str, parts: list[Path], lengths: Lengths) -> None:
    """Which tokens the loss counts, as a dataset of its own, and the tokenizer's folder."""
    joined_bin, joined_idx = work.path / "supervised.bin", work.path / "supervised.idx"
    _join_tokens([part.with_suffix(".supervised") for part in parts], joined_bin)
    write_index(joined_idx, "u1", lengths)
    sync(joined_idx)
    os.replace(joined_bin, f"{prefix}{SUPERVISED}.bin")
    os.replace(joined_idx, f"{prefix}{SUPERVISED}.idx")
    with replacing_folder(Path(f"{prefix}{TOKENIZER}")) as folder:
        shutil.copytree(work.path / "tokenizer", folder, dirs_exist_ok=True)
        shutil.rmtree(f"{prefix}{TOKENIZER}", ignore_errors=True)


def _join_tokens(parts: list[Path], joined: Path) -> None:
    stamps = [[part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
    sizes = [size for size, _ in stamps]
    mark = joined.with_suffix(".mark")
    done = _joined_before(mark, joined, stamps)
    start = sum(sizes[:done])
    with Progress("joining", sum(sizes), done_bytes=start, things="parts") as progress:
        with open(joined, "r+b" if done else "wb") as out:
            out.truncate(start)
            out.seek(start)
            marked = start
            for number, part in enumerate(parts[done:], start=done + 1):
                with open(part, "rb") as stream:
                    shutil.copyfileobj(stream, out, _COPY_BYTES)
                progress.advance(1, sizes[number - 1])
                if out.tell() - marked >= MARK_BYTES or number == len(parts):
                    out.flush()
                    os.fsync(out.fileno())
                    write_replacing(mark, json.dumps({"parts": number, "of": digest(stamps[:number])}))
                    marked = out.tell()


def _joined_before(mark: Path, joined: Path, stamps: list[list[int]]) -> int:
    """How many parts, the same as now, an interrupted run has joined."""
    try:
        noted: dict[str, Any] = json.loads(mark.read_text("utf-8"))
        done = int(noted["parts"])
        whole = joined.stat().st_size >= sum(size for size, _ in stamps[:done])
        return done if whole and noted["of"] == digest(stamps[:done]) else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _publish(work: WorkFolder, prefix: str, tokenizer: StoredTokenizer, reports: list[PartReport]) -> None:
    before, lines = listed_parts(prefix), []
    data_args_file(prefix).unlink(missing_ok=True)
    for rank, report in enumerate(reports):
        if not report.documents:
            continue
        part, target = work.part(rank), _published(prefix, rank)
        if part.with_suffix(".idx").exists():  # otherwise an interrupted run has moved it
            Path(f"{target}.idx").unlink(missing_ok=True)
            if part.with_suffix(".bin").exists():
                os.replace(part.with_suffix(".bin"), f"{target}.bin")
            lengths = functools.partial(read_lengths, part.with_suffix(".idx"))
            made = _record(work, tokenizer, report, Path(f"{target}.bin"), lengths)
            write_replacing(Path(f"{target}{SUFFIX}"), made.to_json())
            os.replace(part.with_suffix(".idx"), f"{target}.idx")
        lines.append(f"{report.tokens} {target}\n")
    write_replacing(data_args_file(prefix), "".join(lines))
    for name in set(before) - {line.split()[1] for line in lines}:
        for end in (".idx", ".bin", SUFFIX):
            Path(f"{name}{end}").unlink(missing_ok=True)


def _published(prefix: str, rank: int) -> str:
    return f"{prefix}_{rank:05d}"


def _record(
    work: WorkFolder, tokenizer: StoredTokenizer, report: PartReport, bin_file: Path, lengths: Lengths
) -> Preparation:
    key = work.key() or {}
    chat = key.get("chat")
    supervised = report.supervised if chat else None
    statistics = Statistics(report.documents, report.tokens, lengths_of(lengths()), supervised, report.dropped,
                            most_frequent(report.malformed))  # fmt: skip
    return Preparation(
        tokenizer.id_range, tokenizer.vocabulary, tokenizer.name, digest(key), report.documents, report.tokens,
        report.skipped, bin_file.stat().st_size, tokenizer.special,
        revisions(file["path"] for file in key.get("files", [])), "chat" if chat else "text", supervised,
        chat["seq_length"] if chat else None, statistics.to_dict(),
    )  # fmt: skip


def _complete_report(work: WorkFolder, rank: int, prefix: str) -> PartReport:
    report = work.report(rank)
    if report is None or report.finished is None:
        work.forget(rank)
        raise UserError(f"part {rank} in {work.parts} is missing; run the same command again")
    if report.documents:
        part = work.part(rank)
        if part.with_suffix(".idx").exists() and not part.with_suffix(".bin").exists():
            return report  # its .bin was published when the run was interrupted
        try:
            check_indexed_dataset(part if part.with_suffix(".idx").exists() else _published(prefix, rank))
        except UserError as error:
            work.forget(rank)
            raise UserError(f"part {rank} in {work.parts} is damaged; run the same command again") from error
    return report
