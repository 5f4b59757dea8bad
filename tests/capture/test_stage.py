"""The stage and the pipeline, without torch, under an injected clock and a stalled writer."""

from __future__ import annotations

import errno
import mmap
import random
import subprocess
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import actstore
from actstore import codecs, dtypes
from actstore.capture.encoding import Calls, encode
from actstore.capture.group import ALIAS, Group, Kind
from actstore.capture.memory import Memory
from actstore.capture.pipeline import Pipeline
from actstore.capture.stage import FLUSH_SECONDS, Stage
from actstore.errors import CaptureError
from actstore.packet import LayerInfo, PassInfo, TokenRecord
from actstore.stream import table
from actstore.stream.reader import open_stream
from actstore.stream.records import Block, Opcode, Record
from actstore.stream.scan import Entry
from actstore.stream.table import BlockPlace
from actstore.stream.writer import CommitPoint, StreamWriter

MIB = 1 << 20
PATIENCE = 60.0  # seconds until a wait that should end at once counts as a deadlock


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Watched(threading.Condition):
    """A condition that says when somebody waits for it."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage._lock)
        self.waiting = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        self.waiting.set()
        return super().wait(timeout)


class Expired(threading.Condition):
    """A condition whose every wait times out, until there were too many."""

    def __init__(self, stage: Stage, meanwhile: Callable[[], None] = lambda: None) -> None:
        super().__init__(stage._lock)
        self.left = 3
        self.meanwhile = meanwhile

    def wait(self, timeout: float | None = None) -> bool:
        self.left -= 1
        if self.left < 0:
            raise TimeoutError
        self.release()
        self.meanwhile()
        self.acquire()
        return False


class Gate(StreamWriter):
    """A writer that stalls until it is let go, and then may fail."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.reached, self.open = threading.Event(), threading.Event()
        self.error: BaseException | None = None
        self.synced: list[int] = []
        self.appended = 0

    def append(self, group: Sequence[Record], point: CommitPoint) -> None:
        if group:
            self.reached.set()
            assert self.open.wait(PATIENCE)
            self.appended += 1
        if self.error is not None:
            raise self.error
        super().append(group, point)

    def sync(self) -> None:
        super().sync()
        self.synced.append(self.appended)


def put(
    stage: Stage,
    seq: int,
    values: NDArray[Any],
    layer: int = 0,
    *,
    pass_index: int = 0,
    width: int = 0,
    alias_of: int | None = None,
) -> None:
    """Put a packet as the hooks do."""
    values = np.ascontiguousarray(values).reshape(values.shape)
    if stage._pass != pass_index:
        stage.begin_pass(PassInfo(pass_index))
    code = dtypes.from_name(values.dtype.name).code
    kind = Kind(layer, code, values.shape, values.nbytes, width)
    if alias_of is not None:
        alias = stage.kind(kind._replace(nbytes=0, form=ALIAS))
        assert stage.put_alias(alias, alias_of) == seq
    else:
        assert stage.put(stage.kind(kind), values.nbytes, values.ctypes.data) == seq


def noise(seed: int, count: int) -> NDArray[np.uint8]:
    """Give bytes that no codec shrinks."""
    return np.frombuffer(random.Random(seed).randbytes(count), np.uint8)


@contextmanager
def in_thread(work: Callable[[], Any]) -> Iterator[list[Any]]:
    """Run something beside the block; then its result is there, its error raised."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work)
        result: list[Any] = []
        yield result
        result.append(future.result(PATIENCE))


def started(path: Path) -> Gate:
    """Give a writer whose log has begun."""
    writer = Gate(path)
    writer.__enter__()
    writer.start({"codecs": {str(key): one for key, one in codecs.CODECS.items()}, "models": []})
    return writer


@contextmanager
def pipeline(stage: Stage, writer: StreamWriter, codec: int = 1) -> Iterator[Pipeline]:
    """Run a pipeline; close and join it in the end, whatever happens."""
    one = Pipeline(stage, writer, codec)
    one.start()
    try:
        yield one
    finally:
        if isinstance(writer, Gate):
            writer.open.set()
        stage.close()
        one.join()
        writer.abandon()


def describe(stage: Stage, layers: int = 1) -> None:
    """Declare the layers and a pass, as the hooks do first."""
    for number in range(layers):
        stage.add_layer(LayerInfo(number, f"layer{number}", "site"))
    stage.begin_pass(PassInfo(0))


def drain(stage: Stage) -> list[Group]:
    """Take every group of a closed stage."""
    groups = []
    while (group := stage.take()) is not None:
        groups.append(group)
    return groups


# -- torch --------------------------------------------------------------------------------------


def test_stage_pipeline_and_tracker_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import actstore.capture.stage, actstore.capture.pipeline, actstore.capture.tokens\n"
        "import actstore.framework, actstore.stream.recover, actstore.stream.sidecars"
    )
    root = str(Path(actstore.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# -- the budget ---------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [MIB, 3 * MIB, 5 * MIB + 12345, 300 * MIB])
def test_arenas_never_exceed_the_budget(budget: int) -> None:
    stage = Stage(budget)
    watched = stage._changed = Watched(stage)
    piece = noise(0, stage.group_bytes // 3)
    arenas: dict[int, int] = {}
    done = threading.Event()

    def produce() -> None:
        for seq in range(3 * budget // piece.nbytes):
            put(stage, seq, piece)
        stage.close()
        done.set()

    with in_thread(produce):
        assert watched.waiting.wait(PATIENCE)
        assert not done.is_set()
        held = []
        while (group := stage.take()) is not None:
            arenas[group.address] = group.arena.nbytes
            held.append(group)
            assert sum(arenas.values()) <= budget + 64 * len(arenas)
            if len(held) > 1 or stage.waits:
                stage.release(held.pop(0))
    assert stage.waits > 0
    assert stage.high_water <= budget


@pytest.mark.parametrize("codec", [0, 1, 2])
@pytest.mark.parametrize("shrinks", [False, True])
@pytest.mark.parametrize("cores", [2, 64])
def test_everything_staged_sealed_and_encoded_stays_within_the_budget(
    codec: int, shrinks: bool, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget, mapped = 32 * MIB, 0
    monkeypatch.setattr("actstore.machine.cores", lambda: cores)
    if cores > 2:  # smaller groups, for there to be memory for more threads
        monkeypatch.setattr("actstore.capture.stage.GROUP_BYTES", MIB)

    def fresh(nbytes: int) -> Any:
        nonlocal mapped  # what is used again is mapped, and not traced
        mapped += nbytes
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)

    piece = noise(1, MIB)
    if shrinks:
        piece = piece & np.uint8(0x7F)
    writer = started(tmp_path / "gen.stream")
    tracemalloc.start()
    try:
        memory = Memory()
        memory.use(fresh)
        stage = Stage(budget, memory=memory)
        assert stage.encoders == min(cores, 8)
        watched = stage._changed = Watched(stage)

        def produce() -> None:
            describe(stage)
            for seq in range(3 * budget // piece.nbytes):
                put(stage, seq, piece)

        with pipeline(stage, writer, codec), in_thread(produce):
            assert writer.reached.wait(PATIENCE)
            assert watched.waiting.wait(PATIENCE)
            writer.open.set()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert mapped > budget / 2
    assert peak + mapped <= budget


def test_put_waits_for_memory_and_goes_on_when_there_is_some(tmp_path: Path) -> None:
    clock = Clock()
    stage = Stage(MIB, clock=clock)
    watched = stage._changed = Watched(stage)
    pieces = [noise(seed, stage.group_bytes // 2) for seed in range(12)]
    writer = started(tmp_path / "gen.stream")
    done = threading.Event()

    def produce() -> None:
        describe(stage)
        for seq, piece in enumerate(pieces):
            put(stage, seq, piece)
        done.set()

    with pipeline(stage, writer), in_thread(produce):
        assert writer.reached.wait(PATIENCE)
        while not stage.waits:
            watched.waiting.clear()
            assert watched.waiting.wait(PATIENCE) or stage.waits
        clock.now += 7
        assert not done.is_set()
        writer.open.set()
        assert done.wait(PATIENCE)
    assert stage.waits >= 1
    assert stage.waited_seconds == 7
    assert_reads_as(tmp_path / "gen.stream", pieces)


def test_a_stage_with_memory_to_spare_does_not_wait(tmp_path: Path) -> None:
    stage = Stage(64 * MIB)
    with pipeline(stage, started(tmp_path / "gen.stream")) as one:
        describe(stage)
        for seq in range(8):
            put(stage, seq, noise(seq, MIB // 4))
    assert (stage.waits, stage.waited_seconds) == (0, 0.0)
    assert one.meter.raw_bytes == 2 * MIB


# -- when groups are sealed ---------------------------------------------------------------------


def test_a_group_is_sealed_when_it_is_full() -> None:
    stage = Stage(64 * MIB)
    size = MIB // 2
    count = stage.group_bytes // size + 4
    for seq in range(count):
        put(stage, seq, noise(seq, size))
    stage.close()
    first, second = drain(stage)
    assert first.arena.nbytes - size < first.used <= first.arena.nbytes < stage.group_bytes
    assert len(first.packets) + len(second.packets) == count
    assert first.point.next_seq == len(first.packets)
    assert second.point.next_seq == count


def test_packets_of_few_bytes_count_by_what_describes_them() -> None:
    stage = Stage(4 * MIB)
    values = np.zeros(0, np.float32)
    tracemalloc.start()
    for seq in range(1200):
        put(stage, seq, values)
    tables = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    stage.close()
    first, second = drain(stage)
    tables -= first.arena.nbytes + second.arena.nbytes
    assert first.arena.nbytes + tables * len(first.packets) / 1200 < stage.group_bytes
    assert first.charge <= stage.group_bytes


@pytest.mark.parametrize("how", ["end_pass", "add_token"])
def test_a_group_is_sealed_a_second_after_it_was_opened(how: str) -> None:
    clock = Clock()
    stage = Stage(64 * MIB, clock=clock)

    def end(number: int) -> None:
        if how == "end_pass":
            stage.end_pass(number, aborted=False, flush=True)
        else:
            stage.add_token(TokenRecord(number, 5, "five", pass_index=number))

    stage.begin_pass(PassInfo(0))
    put(stage, 0, np.ones(3, np.float32))
    clock.now += FLUSH_SECONDS - 0.001
    end(0)
    assert not stage._sealed
    clock.now += 0.002
    stage.begin_pass(PassInfo(1))
    put(stage, 1, np.ones(3, np.float32), pass_index=1)
    assert not stage._sealed
    end(1)
    group = stage.take()
    assert group is not None
    assert (group.base, len(group.packets)) == (0, 2)
    assert group.point == CommitPoint(2, 2, 2 * (how == "add_token"), how == "add_token")


def test_the_end_of_a_pass_seals_nothing_where_tokens_are_tracked() -> None:
    clock = Clock()
    stage = Stage(64 * MIB, clock=clock)
    stage.begin_pass(PassInfo(0))
    clock.now += 10
    stage.end_pass(0, aborted=False, flush=False)
    assert not stage._sealed


def test_the_timer_seals_what_an_idle_model_left() -> None:
    clock = Clock()
    stage = Stage(64 * MIB, clock=clock)
    stage.begin_pass(PassInfo(0))
    put(stage, 0, np.ones(3, np.float32))
    stage._changed = Expired(stage)
    clock.now += FLUSH_SECONDS
    group = stage.take()
    assert group is not None
    assert (group.base, len(group.packets)) == (0, 1)
    assert not group.point.step_boundary


def test_the_timer_leaves_the_group_of_a_busy_model_alone() -> None:
    clock = Clock()
    stage = Stage(64 * MIB, clock=clock)
    put(stage, 0, np.ones(3, np.float32))
    clock.now += 5
    stage._changed = Expired(stage, lambda: put(stage, stage.packets, np.ones(3, np.float32)))
    with pytest.raises(TimeoutError):
        stage.take()
    assert not stage._sealed


def test_the_timer_writes_no_empty_groups() -> None:
    clock = Clock()
    stage = Stage(64 * MIB, clock=clock)
    stage.add_layer(LayerInfo(0, "layer", "site"))
    stage._changed = Expired(stage)
    clock.now += 100
    with pytest.raises(TimeoutError):
        stage.take()


def test_a_closed_stage_gives_what_was_open_and_then_none() -> None:
    stage = Stage(MIB)
    put(stage, 0, np.ones(3, np.float32))
    stage.close()
    stage.close()
    group = stage.take()
    assert group is not None
    assert len(group.packets) == 1
    assert stage.take() is None
    assert stage.take() is None


def test_after_its_end_a_stage_takes_nothing_silently() -> None:
    stage = Stage(MIB)
    stage.close()
    with pytest.raises(CaptureError, match="ended"):
        put(stage, 0, np.ones(3, np.float32))
    with pytest.raises(CaptureError, match="ended"):
        stage.add_token(TokenRecord(0, 5, "five"))
    with pytest.raises(CaptureError, match="ended"):
        stage.flush()


# -- flush --------------------------------------------------------------------------------------


def test_flush_returns_when_all_before_it_is_on_the_disk(tmp_path: Path) -> None:
    stage = Stage(MIB)
    writer = started(tmp_path / "gen.stream")
    before = len(writer.synced)
    done = threading.Event()

    def work() -> None:
        stage.flush()
        done.set()

    with pipeline(stage, writer):
        describe(stage)
        put(stage, 0, np.ones(3, np.float32))
        stage.add_token(TokenRecord(0, 5, "five", pass_index=0))
        with in_thread(work):
            assert writer.reached.wait(PATIENCE)
            assert not done.is_set()
            writer.open.set()
            assert done.wait(PATIENCE)
            assert writer.synced[before:] == [1]
            with open_stream(tmp_path / "gen.stream") as reader:
                assert (reader.packet_count, len(reader.tokens)) == (1, 1)


# -- parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [0, 1, 2])
def test_packets_larger_than_a_group_go_in_parts_and_read_back(codec: int, tmp_path: Path) -> None:
    stage = Stage(MIB)
    sizes = [10, 4 * MIB, stage.part_bytes, stage.part_bytes + 1, stage.group_bytes, 0, 1]
    packets = [noise(seed, size) for seed, size in enumerate(sizes)]
    writer = started(tmp_path / "gen.stream")
    writer.open.set()
    with pipeline(stage, writer, codec):
        describe(stage)
        for seq, values in enumerate(packets):
            put(stage, seq, values)
    assert stage.high_water <= MIB
    assert_reads_as(tmp_path / "gen.stream", packets)


def test_a_packet_of_too_many_parts_is_refused_and_harms_nothing(tmp_path: Path) -> None:
    stage = Stage(MIB)
    with pipeline(stage, started(tmp_path / "gen.stream")):
        describe(stage)
        with pytest.raises(CaptureError, match="max_memory_gb"):
            stage.kind(Kind(0, 2, (1 << 40,), 1 << 40))
        put(stage, 0, noise(0, 10))
    assert_reads_as(tmp_path / "gen.stream", [noise(0, 10)])


def test_an_interrupt_while_a_packet_waits_costs_that_packet_alone(tmp_path: Path) -> None:
    stage = Stage(MIB)
    large, small = noise(0, MIB), noise(1, 10)
    room, calls = stage._room, iter(range(100))

    def interrupted(nbytes: int) -> Group:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return room(nbytes)

    writer = started(tmp_path / "gen.stream")
    writer.open.set()
    with pipeline(stage, writer):
        describe(stage)
        stage._room = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            put(stage, 0, large)
        put(stage, 1, small)
        stage._room = room  # type: ignore[method-assign]
    assert_reads_as(tmp_path / "gen.stream", [small], first=1)


# -- failures -----------------------------------------------------------------------------------


def test_a_failing_writer_surfaces_from_the_next_put(tmp_path: Path) -> None:
    stage = Stage(MIB)
    watched = stage._changed = Watched(stage)
    writer = started(tmp_path / "gen.stream")
    writer.error = OSError(errno.ENOSPC, "no space left")

    def produce() -> None:
        describe(stage)
        for seq in range(10_000):
            put(stage, seq, noise(0, 50_000))

    def run() -> None:
        with pipeline(stage, writer), in_thread(produce):
            assert writer.reached.wait(PATIENCE)
            assert watched.waiting.wait(PATIENCE)
            writer.open.set()

    with pytest.raises(CaptureError, match="no space left") as caught:
        run()
    assert caught.value.__cause__ is writer.error
    assert stage.failure is writer.error
    for later in (
        lambda: put(stage, 0, noise(0, 10)),
        lambda: stage.add_token(TokenRecord(0, 5, "five")),
        lambda: stage.begin_pass(PassInfo(9)),
        stage.flush,
    ):
        with pytest.raises(CaptureError, match="no space left"):
            later()


def test_a_failing_writer_surfaces_from_a_flush_that_waits(tmp_path: Path) -> None:
    stage = Stage(MIB)
    writer = started(tmp_path / "gen.stream")
    writer.error = OSError(errno.EIO, "disk on fire")

    def work() -> None:
        with pytest.raises(CaptureError, match="disk on fire"):
            stage.flush()

    with pipeline(stage, writer):
        describe(stage)
        put(stage, 0, noise(0, 10))
        with in_thread(work):
            assert writer.reached.wait(PATIENCE)
            writer.open.set()


def test_a_bug_in_the_encoder_surfaces_from_the_next_put(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        msg = "bug"
        raise ZeroDivisionError(msg)

    monkeypatch.setattr(codecs, "encode", broken)
    stage = Stage(MIB)

    def produce() -> None:
        describe(stage)
        for seq in range(10_000):
            put(stage, seq, noise(0, 50_000))

    with (
        pytest.raises(CaptureError, match="bug"),
        pipeline(stage, started(tmp_path / "gen.stream")),
        in_thread(produce),
    ):
        pass
    with open_stream(tmp_path / "gen.stream") as reader:
        assert reader.packet_count == 0


def test_what_was_committed_before_a_failure_stays_readable(tmp_path: Path) -> None:
    stage = Stage(MIB)
    writer = started(tmp_path / "gen.stream")
    writer.open.set()
    with pipeline(stage, writer):
        describe(stage)
        put(stage, 0, noise(0, 10))
        stage.flush()
        writer.error = OSError(errno.ENOSPC, "no space left")
        put(stage, 1, noise(1, 10))
        with pytest.raises(CaptureError):
            stage.flush()
    assert_reads_as(tmp_path / "gen.stream", [noise(0, 10)])


# -- encode -------------------------------------------------------------------------------------


def _group(packets: Sequence[tuple[int, NDArray[Any], dict[str, Any]]]) -> Group:
    stage = Stage(64 * MIB)
    describe(stage, 3)
    for seq, (layer, values, how) in enumerate(packets):
        put(stage, seq, values, layer, **how)
    stage.add_token(TokenRecord(0, 5, "five", pass_index=0))
    stage.close()
    (group,) = drain(stage)
    return group


def _flat(record: Record) -> tuple[int, bytes, bytes, int]:
    return record.opcode, record.header, b"".join(record.payload), record.payload_crc


def _blocks(records: Sequence[Record]) -> list[BlockPlace]:
    return [
        BlockPlace(
            Entry(0, one.opcode, one.header, one.payload_length, one.payload_crc),
            Block.decode(one.header),
            0,
        )
        for one in records
        if one.opcode == Opcode.BLOCK
    ]


MIXED = [
    (0, np.arange(300, dtype=np.float32), {}),
    (1, np.zeros((4, 5), np.float16), {}),
    (0, np.arange(7, dtype=np.int64), {}),
    (0, np.arange(300, dtype=np.float32), {"pass_index": 1}),
    (2, np.zeros((0, 3), np.uint8), {"pass_index": 1}),
    (2, np.ones((), np.float64), {"pass_index": 1}),
    (1, np.zeros((2, 5), np.float16), {"width": 50, "pass_index": 1}),
]


@pytest.mark.parametrize("codec", [0, 1, 2])
def test_encode_is_pure(codec: int) -> None:
    group = _group(MIXED)
    before = group.arena[: group.used].tobytes(), list(group.packets), group.point
    first = [_flat(one) for one in encode(group, codec, MIB, Calls()).records]
    with ThreadPoolExecutor(3) as pool:
        second = [_flat(one) for one in encode(group, codec, MIB, Calls(), pool.map).records]
    assert first == second
    assert (group.arena[: group.used].tobytes(), list(group.packets), group.point) == before


@pytest.mark.parametrize("codec", [0, 1, 2])
def test_the_blocks_of_a_group_decode_to_its_packets(codec: int) -> None:
    records, count, raw_bytes = encode(_group(MIXED), codec, MIB, Calls())
    assert (count, raw_bytes) == (len(MIXED), sum(one.nbytes for _, one, _ in MIXED))
    opcodes = [one.opcode for one in records]
    assert opcodes == sorted(opcodes, key=[2, 3, 4, 11, 5, 6].index)
    places = _blocks(records)
    payloads = [b"".join(one.payload) for one in records if one.opcode == Opcode.BLOCK]
    rows = table.build(places)
    assert rows.seq.tolist() == list(range(len(MIXED)))
    for row, (layer, values, how) in enumerate(MIXED):
        place = places[rows.block[row]].block
        data = codecs.decode(
            codecs.CODECS[place.codec], payloads[rows.block[row]], place.raw_length
        )
        start = rows.offset[row]
        assert data[start : start + rows.nbytes[row]].tobytes() == values.tobytes()
        assert rows.layer[row] == layer
        assert rows.shapes[rows.shape[row]] == values.shape
        assert dtypes.from_code(rows.dtype[row]).numpy == values.dtype
        found = {name: getattr(rows, name)[row] for name in ("pass_index", "width")}
        assert found == {"pass_index": 0, "width": 0} | how
    assert rows.call.tolist() == [0, 0, 1, 0, 0, 1, 0]
    assert rows.encoded.sum() == sum(map(len, payloads))


def test_blocks_hold_at_most_the_bytes_they_are_told_to() -> None:
    group = _group([(0, noise(seed, 1000), {}) for seed in range(10)])
    places = _blocks(encode(group, 0, 2500, Calls()).records)
    assert [place.block.raw_length for place in places] == [2000] * 5


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),  # layer
            st.integers(0, 2),  # step of pass
            st.sampled_from([(), (1,), (2, 3)]),
            st.booleans(),  # an alias of the packet before
        ),
        min_size=1,
        max_size=40,
    )
)
def test_runs_cover_whatever_is_captured(steps: list[tuple[Any, ...]]) -> None:
    stage = Stage(64 * MIB)
    wanted, index, calls = [], 0, Counter[tuple[int, int]]()
    for seq, (layer, pass_step, shape, alias) in enumerate(steps):
        index += pass_step
        of = seq - 1 if alias and seq else None
        put(stage, seq, np.zeros(shape, np.int16), layer, pass_index=index, alias_of=of)
        alias_of = -1 if of is None else of
        wanted.append((seq, layer, index, calls[layer, index], shape, alias_of))
        calls[layer, index] += 1
    stage.close()
    (group,) = drain(stage)
    rows = table.build(_blocks(encode(group, 0, MIB, Calls()).records))
    shapes = [rows.shapes[one] for one in rows.shape]
    columns = (rows.seq, rows.layer, rows.pass_index, rows.call, shapes, rows.alias_of)
    assert list(zip(*columns, strict=True)) == wanted


def test_runs_of_generation_take_a_run_a_layer() -> None:
    stage = Stage(64 * MIB)
    for step in range(50):
        for layer in range(4):
            put(stage, 4 * step + layer, np.zeros((1, 8), np.float16), layer, pass_index=step)
    stage.close()
    (group,) = drain(stage)
    places = _blocks(encode(group, 1, MIB, Calls()).records)
    assert [len(place.block.runs) for place in places] == [1, 1, 1, 1]


# -- the whole way ------------------------------------------------------------------------------


def assert_reads_as(path: Path, packets: Sequence[NDArray[Any]], first: int = 0) -> None:
    """Compare a log's packets with those that were put."""
    with open_stream(path) as reader:
        found = list(reader.packets())
    assert [one.seq for one in found] == list(range(first, first + len(packets)))
    for packet, wanted in zip(found, packets, strict=True):
        assert packet.shape == wanted.shape
        assert packet.values.tobytes() == wanted.tobytes()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sampled_from(["uint8", "float16", "float32", "float64", "complex128"]),
            st.sampled_from([0, 1, 7, 1000, 40_000, 300_000]),
            st.sampled_from(["", "token", "pass", "flush"]),
        ),
        max_size=25,
    ),
    st.sampled_from([0, 1, 2]),
    st.sampled_from([MIB, 2 * MIB, 64 * MIB]),
)
def test_whatever_is_put_reads_back_in_order(
    tmp_path_factory: pytest.TempPathFactory,
    work: list[tuple[Any, ...]],
    codec: int,
    budget: int,
) -> None:
    path = tmp_path_factory.mktemp("log") / "gen.stream"
    clock, packets, tokens = Clock(), [], 0
    stage = Stage(budget, clock=clock)
    writer = started(path)
    writer.open.set()
    with pipeline(stage, writer, codec):
        describe(stage, 3)
        for seq, (layer, kind, count, then) in enumerate(work):
            size = count * np.dtype(kind).itemsize
            packets.append(noise(seq, size).view(kind))
            put(stage, seq, packets[-1], layer)
            clock.now += 0.7
            if then == "token":
                stage.add_token(TokenRecord(tokens, 5, "five", pass_index=0))
                tokens += 1
            elif then == "pass":
                stage.end_pass(0, aborted=False, flush=True)
            elif then == "flush":
                stage.flush()
                with open_stream(path) as reader:
                    assert reader.packet_count == seq + 1
    assert stage.high_water <= budget
    assert_reads_as(path, packets)
    with open_stream(path) as reader:
        assert [one.step for one in reader.tokens] == list(range(tokens))


def test_same_bytes_compares_with_the_packet_that_is_staged() -> None:
    stage = Stage(MIB)
    values = noise(0, 100)
    other = values.copy()
    other[50] ^= 1
    put(stage, 0, values)
    assert stage.same_bytes(0, values.ctypes.data, 100)
    assert not stage.same_bytes(0, other.ctypes.data, 100)
    assert not stage.same_bytes(0, values.ctypes.data, 99)
    assert not stage.same_bytes(1, values.ctypes.data, 100)
