"""Groups that are written past the page cache: the same log, in whole pages."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from actstore import codecs
from actstore.packet import LayerInfo
from actstore.stream import direct, writer
from actstore.stream.direct import PAGE, PAGED_BYTES, DirectFile
from actstore.stream.reader import open_stream
from actstore.stream.records import Block, Layer, Opcode, Record, Run
from actstore.stream.scan import LogFile, Scan, walk
from actstore.stream.writer import CommitPoint, StreamWriter

HEADER = {"codecs": {str(key): one for key, one in codecs.CODECS.items()}, "models": []}


def at_page(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Give a copy that begins at a page."""
    memory = np.empty(values.nbytes + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    memory[start : start + values.nbytes] = values
    return memory[start : start + values.nbytes]


def noise(seed: int, count: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, count, np.uint8)


def block(seq: int, values: NDArray[np.uint8]) -> Record:
    run = Run(seq, 0, 0, 1, 0, 0, 0, 0, 0)
    head = Block(0, 0, 2, 0, values.nbytes, ((values.nbytes,),), (run,))
    return Record.of(Opcode.BLOCK, head.encode(), values)


def written(path: Path, groups: Sequence[Sequence[NDArray[np.uint8]]]) -> None:
    """Write a log of groups of packets, each a block."""
    seq = 0
    with StreamWriter(path) as one:
        one.start(HEADER)
        layer = Record(Opcode.LAYER, Layer(LayerInfo(0, "layer", "site")).encode())
        for index, group in enumerate(groups):
            blocks = [block(seq + at, values) for at, values in enumerate(group)]
            seq += len(blocks)
            one.append([layer, *blocks] if not index else blocks, CommitPoint(seq))
        one.finish({})


GROUPS = {
    "large ones at pages": [[at_page(noise(1, 3 << 20)), at_page(noise(2, PAGED_BYTES))]],
    "large ones anywhere": [[noise(1, 3 << 20), noise(2, 9 << 20)]],
    "odd ones at pages": [[at_page(noise(1, (1 << 20) + 1)), at_page(noise(2, 400_003))]],
    "many little ones": [[noise(at, 30_000 + at) for at in range(60)]],
    "little groups between": [
        [noise(1, 100)],
        [at_page(noise(2, 2 << 20)), noise(3, 7)],
        [noise(4, 100)],
        [noise(5, 1), at_page(noise(6, 5 << 20))],
        [noise(7, 1 << 20)],
    ],
}


@pytest.mark.parametrize("name", GROUPS)
def test_what_is_written_directly_reads_back_and_leaves_no_gap(name: str, tmp_path: Path) -> None:
    path, wanted = tmp_path / "run.stream", [one for group in GROUPS[name] for one in group]
    written(path, GROUPS[name])
    with open_stream(path) as reader:
        assert reader.complete
        found = list(reader.packets())
    assert [one.seq for one in found] == list(range(len(wanted)))
    for one, values in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one.values, values)
    file = LogFile(path)
    scan = Scan({}, file.read(8, 16))
    ends = [8, *(entry.end for entry in walk(file, scan, 8))]
    assert scan.damage == []
    assert ends[-1] == file.size - 8
    file.close()


@pytest.mark.parametrize("name", GROUPS)
def test_a_log_is_the_same_but_for_padding_where_there_are_no_direct_writes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def packets(path: Path) -> list[tuple[Any, ...]]:
        with open_stream(path) as reader:
            return [(one.seq, one.layer, one.values.tobytes()) for one in reader.packets()]

    written(tmp_path / "direct", GROUPS[name])
    monkeypatch.setattr(writer, "DIRECT_BYTES", 1 << 60)
    written(tmp_path / "buffered", GROUPS[name])
    assert packets(tmp_path / "direct") == packets(tmp_path / "buffered")


def test_groups_of_direct_writes_begin_and_end_at_pages(tmp_path: Path) -> None:
    path = tmp_path / "run.stream"
    written(path, [[at_page(noise(1, 2 << 20))], [noise(0, 5), at_page(noise(2, 3 << 20))]])
    with open_stream(path) as reader:
        _, first, second = reader.scan.groups
    assert first.end % PAGE == second.end % PAGE == 0
    assert second.commit.start == first.end
    large = [one for one in (*first.entries, *second.entries) if one.payload_length > 1 << 20]
    assert [one.payload_offset % PAGE for one in large] == [0, 0]


class Calls:
    """Notes what ``os.writev`` is given, and may refuse it."""

    def __init__(self, patch: pytest.MonkeyPatch, refuse: Callable[[int], bool]) -> None:
        self.sizes: list[int] = []
        self.aligned: list[bool] = []
        self._real, self._refuse = os.writev, refuse
        patch.setattr(os, "writev", self)

    def __call__(self, descriptor: int, buffers: Any) -> int:
        sizes = [len(one) for one in buffers]
        if self._refuse(sum(sizes)):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self.sizes.append(sum(sizes))
        places = [np.frombuffer(one, np.uint8).ctypes.data for one in buffers if len(one)]
        self.aligned.append(all(one % PAGE == 0 for one in [*sizes, *places]))
        return self._real(descriptor, buffers)


def test_large_groups_are_few_aligned_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch, lambda _: False)
    written(tmp_path / "run.stream", [[at_page(noise(at, 1 << 20)) for at in range(40)]])
    large = [size for size in calls.sizes if size > 1 << 20]
    assert sum(large) > 40 << 20
    assert min(large[:-1]) >= 8 << 20
    assert all(ok for ok, size in zip(calls.aligned, calls.sizes, strict=True) if size > 1 << 20)


def test_a_file_system_that_takes_the_flag_and_no_such_write_is_written_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, refused = tmp_path / "run.stream", []

    def refuse(size: int) -> bool:
        refused.append(size > 1 << 20 and not refused.count(True))
        return refused[-1]

    Calls(monkeypatch, refuse)
    wanted = [noise(1, 2 << 20), noise(2, 3 << 20)]
    written(path, [[wanted[0]], [wanted[1]]])
    assert refused.count(True) == 1
    with open_stream(path) as reader:
        assert all(
            (one.values == values).all()
            for one, values in zip(reader.packets(), wanted, strict=True)
        )
        assert reader.complete


def test_short_direct_writes_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "file", os.writev
    lengths = iter([PAGE, 3 * PAGE, 1000, 5, 70_001])

    def short(descriptor: int, buffers: Any) -> int:
        data = b"".join(bytes(one) for one in buffers)
        length = next(lengths, len(data))
        return os.pwrite(descriptor, at_page(np.frombuffer(data[:length], np.uint8)), 0)

    monkeypatch.setattr(os, "writev", short)
    data = noise(1, 64 * PAGE)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    file = DirectFile(descriptor)
    file.write([memoryview(data[:5000]), memoryview(data[5000:])])
    os.close(descriptor)
    monkeypatch.setattr(os, "writev", real)
    assert path.read_bytes() == data.tobytes()
    assert not file.works  # one didn't end at a page


def test_another_error_of_a_direct_write_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int, _buffers: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    descriptor = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    file = DirectFile(descriptor)
    monkeypatch.setattr(direct.os, "writev", full)
    with pytest.raises(OSError, match="No space"):
        file.write([memoryview(noise(1, PAGE))])
    os.close(descriptor)
