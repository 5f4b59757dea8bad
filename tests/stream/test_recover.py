"""A torn or damaged log becomes a whole one of what is intact; the log itself stays as it is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import actstore
from actstore.errors import ConfigError, FormatError, MissingFileError, StreamCorruptError
from actstore.stream.records import Opcode
from actstore.stream.writer import StreamWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
from oracle import capturing

VECTORS = Path(__file__).parents[2] / "schemas/vectors"


class Pair(nn.Module):
    """Returns its child's output, so that its own packet is an alias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Give a closed log of 6 passes, each followed by a token and a group of its own."""
    torch.manual_seed(0)
    model, path = Pair().eval(), tmp_path / "run.stream"
    with (
        torch.no_grad(),
        capturing(model, path, track_per_token=True, checkpoint_interval_tokens=1) as tracker,
    ):
        for step in range(6):
            model(torch.randn(3, 8))
            tracker.record_token(step, f"t{step}")
    return path


def packets(path: Path, errors: str = "raise") -> dict[int, tuple[Any, ...]]:
    """Give every packet by its number."""
    with actstore.open_stream(path, errors=errors) as reader:
        return {
            one.seq: (one.layer, one.pass_index, one.values.tobytes()) for one in reader.packets()
        }


def damage(path: Path, opcode: Opcode, number: int, *, inside: str) -> int:
    """Flip a bit in the number-th record of a kind; give its offset."""
    with actstore.open_stream(path) as reader:
        entries = [one for group in reader.scan.groups for one in group.entries]
    entry = [one for one in entries if one.opcode == opcode][number]
    data = bytearray(path.read_bytes())
    data[entry.payload_offset if inside == "payload" else entry.offset + 42] ^= 4
    path.write_bytes(data)
    return entry.offset


def unclose(path: Path) -> None:
    """Leave out the INDEX: the log of a writer that was killed."""
    with actstore.open_stream(path) as reader:
        end = reader.scan.groups[-1].end
    path.write_bytes(path.read_bytes()[:end])


def test_a_whole_log_needs_no_recovery(log: Path) -> None:
    report = actstore.recover(log)
    assert report.whole
    assert report.recovered == log
    assert (report.packets, report.passes, report.tokens) == (18, 6, 6)
    assert not list(log.parent.glob("*recovered*"))


@pytest.mark.parametrize("inside", ["payload", "header"])
def test_a_damaged_block_costs_its_packets_and_their_aliases_alone(log: Path, inside: str) -> None:
    before = packets(log)
    unclose(log)
    offset = damage(log, Opcode.BLOCK, 4, inside=inside)
    data = log.read_bytes()
    report = actstore.recover(log)
    assert log.read_bytes() == data
    assert report.recovered == log.with_name("run.recovered.stream")
    found = packets(report.recovered)
    lost = sorted(set(before) - set(found))
    assert found == {seq: one for seq, one in before.items() if seq not in lost}
    assert 1 <= len(lost) <= 2
    assert report.lost_packets == len(lost)
    assert set(report.lost_passes) == {before[seq][1] for seq in lost}
    assert offset in [one.offset for one in report.damage]
    if inside == "payload":
        assert report.lost_layers == {before[seq][0]: 1 for seq in lost}
    assert not report.whole
    assert f"lost {len(lost)} committed packets" in str(report)
    assert actstore.verify(report.recovered).ok
    with actstore.open_stream(report.recovered) as reader:
        assert reader.complete
        assert [one.token_text for one in reader.tokens] == [f"t{step}" for step in range(6)]


def test_a_damaged_frame_of_a_closed_log_costs_nothing(log: Path) -> None:
    before = packets(log)
    offset = damage(log, Opcode.BLOCK, 4, inside="header")
    report = actstore.recover(log)
    assert packets(report.recovered) == before
    assert [one.offset for one in report.damage] == [offset]
    assert report.lost_packets == 0
    assert actstore.verify(report.recovered).ok


def test_every_cut_of_a_log_is_recovered_up_to_its_last_commit(log: Path, tmp_path: Path) -> None:
    data, torn = log.read_bytes(), tmp_path / "torn.stream"
    with actstore.open_stream(log) as reader:
        ends = [group.end for group in reader.scan.groups]
    for length in {*range(ends[0], len(data), 97), *ends, len(data) - 1}:
        torn.write_bytes(data[:length])
        wanted = packets(torn)
        report = actstore.recover(torn, tmp_path / "whole.stream")
        assert packets(tmp_path / "whole.stream") == wanted
        assert report.uncommitted_bytes == length - max(end for end in ends if end <= length)
        assert report.whole
        (tmp_path / "whole.stream").unlink()


def test_a_damaged_header_costs_what_it_says_alone(log: Path) -> None:
    before = packets(log)
    data = bytearray(log.read_bytes())
    data[60] ^= 1
    log.write_bytes(data)
    with pytest.raises(StreamCorruptError):
        actstore.open_stream(log)
    report = actstore.recover(log)
    assert packets(report.recovered) == before
    assert report.lost_packets == 0
    assert not report.whole
    assert [one.reason for one in report.damage] == ["the HEADER is damaged"]


def test_lost_tokens_and_passes_are_named(log: Path) -> None:
    unclose(log)
    damage(log, Opcode.TOKEN, 2, inside="header")
    report = actstore.recover(log)
    assert report.lost_steps == (2,)
    assert report.tokens == 5


def test_a_recovered_log_compacts_and_is_not_recovered_again(log: Path, tmp_path: Path) -> None:
    damage(log, Opcode.BLOCK, 4, inside="payload")
    report = actstore.recover(log)
    again = actstore.recover(report.recovered)
    assert again.recovered == report.recovered
    archive = actstore.compact(report.recovered, tmp_path / "run.zarr")
    assert archive.rows["token"] == 18


def test_nothing_is_overwritten_and_names_are_free(log: Path) -> None:
    damage(log, Opcode.BLOCK, 4, inside="payload")
    first, second = actstore.recover(log).recovered, actstore.recover(log).recovered
    assert [first.name, second.name] == ["run.recovered.stream", "run.recovered.1.stream"]
    with pytest.raises(ConfigError, match="exists, and is not overwritten"):
        actstore.recover(log, first)


def test_a_log_that_is_being_written_is_refused(log: Path) -> None:
    with StreamWriter(log), pytest.raises(ConfigError, match="is being written"):
        actstore.recover(log)


@pytest.mark.parametrize(("data", "error"), [(b"", FormatError), (b"\x00" * 99, FormatError)])
def test_what_is_no_log_is_refused(data: bytes, error: type[Exception], tmp_path: Path) -> None:
    (tmp_path / "x.stream").write_bytes(data)
    with pytest.raises(error):
        actstore.recover(tmp_path / "x.stream")
    with pytest.raises(MissingFileError):
        actstore.recover(tmp_path / "missing.stream")


@pytest.mark.parametrize("path", sorted(VECTORS.glob("bad/*.stream")), ids=lambda path: path.stem)
def test_a_bad_vector_is_refused_or_becomes_a_whole_log(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run.stream"
    shutil.copyfile(path, copy)
    try:
        report = actstore.recover(copy)
    except FormatError:
        with pytest.raises(FormatError):
            actstore.open_stream(copy, errors="skip")
        return
    assert packets(report.recovered) == packets(copy, errors="skip")
    assert actstore.verify(report.recovered).ok
    assert copy.read_bytes() == path.read_bytes()
