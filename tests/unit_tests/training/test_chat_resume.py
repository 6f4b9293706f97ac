"""A run on conversations that is killed and started again reads every sample as if nothing had happened."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.chat_data import write_chat
from tests.forked_runs import RunServer, wait_until
from tests.unit_tests.training.runs import RECURSION, metrics_of, save_to
from tests.unit_tests.training.test_chat_runs import ON_CHAT

LENGTHS = [3 + number * 7 % 15 for number in range(90)]
EPOCHS, BATCH, EVERY = 3, 4, 5


def record_samples() -> None:
    """Write down which samples each process reads, beside the data. (In the server, before its runs.)"""
    from megatron_recursive.data.chat.dataset import ChatRows

    samples_at = ChatRows.samples_at

    def recorded(self: ChatRows, index: int) -> list[int]:
        samples = samples_at(self, index)
        with open(os.environ["CHAT_RECORD"], "a", encoding="utf-8") as stream:
            stream.write(json.dumps([os.getpid(), index, samples]) + "\n")
        return samples

    ChatRows.samples_at = recorded  # type: ignore[method-assign]


@pytest.mark.heavy
def test_no_sample_is_repeated_or_skipped_over_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "samples"
    monkeypatch.setenv("CHAT_RECORD", str(record))
    supervised = write_chat(tmp_path / "chat", LENGTHS)
    flags = ["--chat-data", str(tmp_path / "chat"), "--split", "1,0,0", "--train-epochs", str(EPOCHS)]
    server = RunServer(tmp_path, before=f"from {__name__} import record_samples; record_samples()")

    def argv(name: str) -> list[str]:
        return [*ON_CHAT, *RECURSION, *flags, *save_to(tmp_path / name, EVERY)]

    run = server.start(argv("calm"))
    assert run.wait() == [0], run.tail()
    calm = [json.loads(line) for line in record.read_text().splitlines()]
    run, tracker = server.start(argv("killed")), tmp_path / "killed" / "latest_checkpointed_iteration.txt"
    wait_until(lambda: tracker.exists() and len(record.read_text().splitlines()) > len(calm) + BATCH * 2 * EVERY, run)
    run.kill()
    saved = int(tracker.read_text())
    before = [json.loads(line) for line in record.read_text().splitlines()][len(calm) :]
    run = server.start(argv("killed"))
    assert run.wait() == [0], run.tail()
    after = [json.loads(line) for line in record.read_text().splitlines()][len(calm) + len(before) :]
    server.close()

    assert len({pid for pid, *_ in (*calm, *before, *after)}) == 3
    assert saved % EVERY == 0 and 0 < BATCH * saved < len(before)
    trained = [read[1:] for read in (*before[: BATCH * saved], *after)]
    assert trained == [read[1:] for read in calm]
    counts = [sum(number in samples for _, samples in trained) for number in range(len(LENGTHS))]
    assert counts == [EPOCHS] * len(LENGTHS)
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "calm")
    assert sum(each["supervised tokens"] for each in metrics_of(tmp_path / "calm").values()) == EPOCHS * supervised
