"""Runs of which TensorBoard or W&B tell, beside those that wrote metrics.jsonl."""

import json
import struct
import sys
import types

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from wandb import errors
from wandb.proto.wandb_internal_pb2 import Record

from megatron_recursive.commands import main
from megatron_recursive.errors import UserError
from megatron_recursive.plots.event_files import BLOCK, HEAD
from megatron_recursive.plots.runs import read_runs
from tests.unit_tests.plots.records import train, valid, write

LOGGED = {1: {"lm loss": 5.0, "lm loss block 1": 6.0}, 2: {"lm loss": 4.0, "lm loss validation": 4.5}}
TOLD = [train(1, 5.0, **{"lm loss block 1": 6.0}), train(2, 4.0), valid(2, 4.5)]


def tensorboard_of(folder):
    writer = EventFileWriter(str(folder))
    for step, values in LOGGED.items():
        for name, value in {**values, "lm loss vs samples": 9.0, "lm loss validation ppl": 90.0}.items():
            summary = Summary(value=[Summary.Value(tag=name, simple_value=value)])
            writer.add_event(Event(wall_time=1.0, step=step, summary=summary))
    writer.close()
    return folder


def wandb_of(folder, ahead=0):
    """An offline run; a record of so many bytes lies ahead of its history, and one that was being written behind."""
    record = Record()
    record.output.line = "x" * ahead
    records = [record.SerializeToString()]
    for step, values in LOGGED.items():
        record = Record()
        record.history.step.num = step
        for name, value in {**values, "_timestamp": 1.0, "note": "text"}.items():
            record.history.item.add(nested_key=[name], value_json=json.dumps(value))
        records.append(record.SerializeToString())
    data = bytearray(b":W&B" + struct.pack("<HB", 0xBEE1, 0))
    for content in [*records, records[-1]]:
        first = True
        while content or first:
            room = BLOCK - len(data) % BLOCK
            if room < HEAD:
                data += bytes(room)
                room = BLOCK
            piece, content = content[: room - HEAD], content[room - HEAD :]
            kind = (1 if not content else 2) if first else (4 if not content else 3)
            data += struct.pack("<IHB", 0, len(piece), kind) + piece
            first = False
    folder.mkdir(parents=True)
    (folder / "run-a1.wandb").write_bytes(data[:-5])
    return folder


def test_tensorboard_and_wandb_tell_what_the_metrics_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "own/metrics.jsonl", *TOLD)
    given = [tmp_path / "own", tensorboard_of(tmp_path / "events"), wandb_of(tmp_path / "offline-run-1")]
    own, events, offline = read_runs(given)
    assert own.records == tuple(TOLD) and [own.name, events.name] == ["own", "events"]
    assert sorted(map(str, events.records)) == sorted(map(str, offline.records)) == sorted(map(str, own.records))
    for ahead in (BLOCK - 2 * HEAD - 10, BLOCK - 2 * HEAD - 14, 3 * BLOCK):  # no room for a head, and several blocks
        (crossing,) = read_runs([wandb_of(tmp_path / f"offline-run-{ahead}", ahead)])
        assert crossing.records == offline.records
    main(["plot", *map(str, given), "--output", "all.svg"])
    main(["plot", str(given[2] / "run-a1.wandb")])
    assert capsys.readouterr().out == f"all.svg\n{given[2]}/run-a1.png\n"


def test_a_run_online_is_asked_through_the_api(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"_step": step, **values, "none": None} for step, values in LOGGED.items()]

    class Api:
        def run(self, path):
            if path != "me/project/a1":
                raise errors.CommError("no such run\nat all")
            return types.SimpleNamespace(scan_history=lambda: iter(rows))

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(Api=Api, errors=errors))
    (run,) = read_runs(["wandb:me/project/a1"])
    assert sorted(map(str, run.records)) == sorted(map(str, TOLD))
    main(["plot", "wandb:me/project/a1"])
    assert [path.name for path in tmp_path.iterdir()] == ["a1.png"]
    with pytest.raises(UserError, match=r"W&B does not tell of wandb:a/b \(no such run\); give wandb:ENT"):
        read_runs(["wandb:a/b"])


def test_what_cannot_be_read_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.wandb").write_bytes(b"else")
    folder = tensorboard_of(tmp_path / "events")
    for path, said in ((tmp_path / "x.wandb", "is no file of W&B"), (tmp_path / "y.wandb", "cannot read")):
        with pytest.raises(UserError, match=said):
            read_runs([path])
    for package, path in (("tensorboard.backend.event_processing.event_accumulator", folder),
                          ("wandb.proto.wandb_internal_pb2", wandb_of(tmp_path / "run")),
                          ("wandb", "wandb:a/b/c")):  # fmt: skip
        with monkeypatch.context() as without:
            without.setitem(sys.modules, package, None)
            with pytest.raises(SystemExit):
                main(["plot", str(path)])
        assert f"error: The package {package.partition('.')[0]} is not installed; " in capsys.readouterr().err
