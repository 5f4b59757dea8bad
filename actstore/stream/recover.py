"""Owns making a whole log of what is intact in a torn or damaged one.

Going on with a log whose writer ended is ``resume.py``'s.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actstore import files
from actstore.arguments import check_callable
from actstore.buckets import local, local_target
from actstore.errors import ConfigError, FormatError, StreamCorruptError
from actstore.stream.legacy import is_legacy
from actstore.stream.reader import StreamReader
from actstore.stream.records import MAGIC, Block, Commit, Entry, Frame, Opcode, Record
from actstore.stream.scan import Damage, LogFile, Scan, walk
from actstore.stream.writer import CommitPoint, StreamWriter

__all__ = ["RecoveryReport", "recover"]


@dataclass(frozen=True, slots=True)
class RecoveryReport:
    """What `recover` found and made; ``str()`` of it says it in words.

    Attributes
    ----------
    path, recovered : Path
        The log, and the whole log of what is intact in it: the same where it was whole already.
    packets, passes, tokens : int
        What was kept.
    lost_packets : int
        Packets that were committed, and are lost: numbers that are missing among the others.
    lost_layers : mapping of str to int
        Of those whose description is intact, how many each layer lost.
    lost_passes : tuple of int
        Passes that lost something.
    lost_steps : tuple of int
        Recorded tokens that are lost.
    lost_bytes, uncommitted_bytes : int
        Bytes that are damaged, and that were not committed when the writer ended.
    damage : tuple of Damage
        Where, and why.
    """

    path: Path
    recovered: Path
    packets: int
    passes: int
    tokens: int
    lost_packets: int
    lost_layers: Mapping[str, int]
    lost_passes: tuple[int, ...]
    lost_steps: tuple[int, ...]
    lost_bytes: int
    uncommitted_bytes: int
    damage: tuple[Damage, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing that was committed is lost."""
        return not (self.lost_packets or self.lost_steps or self.damage)

    def __str__(self) -> str:
        """Say what was kept and what was lost."""
        lines = [
            f"{self.path}: kept {self.packets} packets, {self.passes} passes, {self.tokens} "
            f"tokens in {self.recovered}",
            f"lost {self.lost_packets} committed packets and {len(self.lost_steps)} tokens; "
            f"{self.lost_bytes} bytes are damaged, {self.uncommitted_bytes} were not committed",
        ]
        if self.lost_layers:
            named = (f"{name!r} {count}" for name, count in self.lost_layers.items())
            lines.append(f"layers: {', '.join(named)}")
        if self.lost_passes:
            lines.append(f"passes: {', '.join(map(str, self.lost_passes))}")
        lines += [f"at byte {one.offset}, {one.length} bytes: {one.reason}" for one in self.damage]
        return "\n".join(lines)


def recover(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> RecoveryReport:
    """Make a whole log of what is intact in a torn or damaged one, which stays as it is.

    Parameters
    ----------
    path : path
        The log; nothing may be writing it.
    out : path, optional
        Where the whole log goes; it must not exist. By default ``run.recovered.stream`` beside
        ``run.stream``, or the first free name like that.
    progress : callable, optional
        Called with the bytes that are done and those that there are: the log is read, what is
        intact is written, and read back.

    Returns
    -------
    RecoveryReport
        What was kept and what was lost; print it.

    Raises
    ------
    ConfigError
        It is being written, or may not be read; ``out`` exists, or has no folder.
    MissingFileError, FormatError
        There is no log, or one of ``llm-instrumentation``.
    StreamCorruptError
        Nothing of it can be told: it was cut in its HEADER.
    """
    check_callable("progress", progress)
    place = local(path, "recover")
    if is_legacy(place):
        msg = (
            f"{place} is a log of llm-instrumentation, which says too little to be made whole; "
            "actstore.open_stream(path, errors='skip') reads what is intact"
        )
        raise FormatError(msg)
    with StreamReader(place, errors="skip") as reader:
        _check_unwritten(place)
        size = reader.file_bytes
        kept = _Intact(reader, lambda done: progress(done, 3 * size))
        if reader.complete and not kept.damage and kept.rows.all():
            return kept.report(place)
        target = local_target(out, "recover") if out is not None else _beside(place)
        files.check_new(target, ConfigError)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        report = kept.report(target)
        try:
            kept.write(partial, report, lambda done: progress(size + done, 3 * size))
            _check_copy(reader, kept, partial)
            progress(3 * size, 3 * size)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        files.replace(partial, target)
        return report


def _beside(path: Path) -> Path:
    name = path.with_name(f"{path.stem}.recovered{path.suffix}")
    return files.free_name(name) if name.exists() else name


def _check_unwritten(path: Path) -> None:
    """Refuse a log that another process or thread is writing."""
    if files.is_locked(path):
        msg = f"{path} is being written; recover it when its capture has ended"
        raise ConfigError(msg)


def _check_copy(reader: StreamReader, kept: _Intact, copy: Path) -> None:
    """Compare what was written with what was read."""
    wanted = reader.table.seq[kept.rows & reader.table.whole()].tolist()
    with StreamReader(copy) as found:
        same = all(
            packet.seq == seq and np.array_equal(_raw(packet.values), _raw(reader.values(row)))
            for packet, (seq, row) in zip(
                found.packets(), zip(wanted, kept.first_rows(), strict=True), strict=True
            )
        )
        if not same or not found.complete:
            msg = f"{copy} doesn't read back as it was written; check the disk, and try again"
            raise FormatError(msg)


def _raw(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


class _Intact:
    """What of a log can be read: blocks and packets, passes, tokens."""

    def __init__(
        self, reader: StreamReader, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self._reader = reader
        self._progress = progress
        #: Records that the file can have held: where numbers say that more are lost, they lie.
        self._most = reader.file_bytes // Frame.SIZE
        table = reader.table
        frames = Scan({}, reader.scan.sync)  # by the index, a damaged frame isn't seen
        with closing(LogFile(reader.local)) as file:
            for _ in walk(file, frames, len(MAGIC)):
                pass
        self.damage = {one.offset: one for one in frames.damage}
        self.lost_blocks = {index for index in range(len(table.blocks)) if not self._reads(index)}
        _ = reader.passes  # notes those that can't be read
        self.damage |= {one.offset: one for one in reader.damage}
        lost = np.isin(table.block, list(self.lost_blocks))
        self.rows = ~np.isin(table.seq, table.seq[lost])
        split = np.flatnonzero((table.parts > 1) & table.whole() & self.rows)
        short = [row for row in split.tolist() if not self._fits(row)]
        self.rows &= ~np.isin(table.seq, table.seq[short])
        for fault in reader.alias_faults():
            self.damage.setdefault(fault.offset, Damage(fault.offset, 0, str(fault)))
        aliases = np.flatnonzero(self.rows & (table.alias_of >= 0))
        targets, found = reader.targets(aliases)
        self.rows[aliases] = found & self.rows[targets]

    def _fits(self, row: int) -> bool:
        """Whether the parts of a packet have its size."""
        try:
            self._reader.values(row)
        except StreamCorruptError as error:
            self.damage.setdefault(error.offset, Damage(error.offset, 0, str(error)))
            return False
        return True

    def _reads(self, index: int) -> bool:
        self._progress(self._reader.table.blocks[index].entry.end)
        try:
            self._reader.read_block(index)
        except StreamCorruptError as error:
            entry = self._reader.table.blocks[index].entry
            self.damage[entry.offset] = Damage(entry.offset, entry.end - entry.offset, str(error))
            return False
        return True

    def first_rows(self) -> list[int]:
        """Give the first row of each packet that is kept."""
        found: list[int] = np.flatnonzero(self.rows & self._reader.table.whole()).tolist()
        return found

    def report(self, target: Path) -> RecoveryReport:
        """Say what is kept and what is lost."""
        reader, table = self._reader, self._reader.table
        groups = reader.scan.groups
        last = groups[-1].commit if groups else Commit(0, 0, 0, 0, step_boundary=True)
        names = {info.id: name for name, info in reader.layers.items()}
        gone = ~self.rows & table.whole()
        layers = Counter(names[one] for one in table.layer[gone].tolist())
        held = table.seq[self.rows & table.whole()]
        steps = {token.step for token in reader.tokens}
        lost = (step for step in range(last.next_step) if step not in steps)
        end = groups[-1].end if groups else reader.file_bytes
        closed = reader.scan.complete
        return RecoveryReport(
            reader.local,
            target,
            int(held.size),
            len(reader.passes),
            len(steps),
            max(last.next_seq - int(np.sum(held < last.next_seq)), 0),
            dict(layers),
            self._lost_passes(table.pass_index[gone], last.next_seq),
            tuple(islice(lost, self._most)),
            sum(one.length for one in self.damage.values()),
            0 if closed else max(reader.file_bytes - end, 0),
            tuple(self.damage[offset] for offset in sorted(self.damage)),
        )

    def _lost_passes(self, gone: NDArray[np.int64], next_seq: int) -> tuple[int, ...]:
        """Give the passes that packets are lost of: as described, else as those around them."""
        table = self._reader.table
        if not table.seq.size:
            return ()
        found: set[int] = set(gone.tolist())
        gaps = np.diff(table.seq, prepend=-1, append=min(next_seq, np.iinfo(np.int64).max)) > 1
        before = np.concatenate((table.pass_index[:1], table.pass_index))[gaps]
        after = np.concatenate((table.pass_index, table.pass_index[-1:]))[gaps]
        left = self._most
        for low, high in set(zip(before.tolist(), after.tolist(), strict=True)):
            found |= {low, high}
            if high - low <= left:
                left -= max(high - low, 0)
                found.update(range(low, high))
        return tuple(sorted(found))

    def write(
        self,
        path: Path,
        report: RecoveryReport,
        progress: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Write what is kept as a closed log."""
        reader = self._reader
        lost = {one.offset for one in reader.damage}  # others are whole in the directories
        blocks = {place.entry.offset: index for index, place in enumerate(reader.table.blocks)}
        origin = {"recovered_from": {"name": reader.path.name, "bytes": reader.file_bytes}}
        with StreamWriter(path) as writer:
            writer.start({**reader.header, **origin})
            for group in reader.scan.groups:
                records = [
                    record
                    for entry in group.entries
                    if entry.offset not in lost
                    and (record := self._record(entry, blocks)) is not None
                ]
                commit = group.commit
                point = CommitPoint(
                    commit.next_seq, commit.next_pass, commit.next_step, commit.step_boundary
                )
                writer.append(records, point)
                progress(group.end)
            writer.finish({**reader.summary, "lost_packets": report.lost_packets})

    def _record(self, entry: Entry, blocks: Mapping[int, int]) -> Record | None:
        """Give a record as it was, of a block only what is kept of it; None for nothing."""
        if entry.opcode in (Opcode.HEADER, Opcode.PAD):
            return None
        header = entry.header
        if entry.opcode == Opcode.BLOCK:
            index = blocks.get(entry.offset)
            if index is None or index in self.lost_blocks:
                return None
            mine = self._reader.table.block == index
            if not self.rows[mine].all():
                left = self._without(index, self._reader.table.seq[mine & ~self.rows])
                if not left.runs:
                    return None
                header = left.encode()
        try:
            payload = self._reader.payload(entry)
        except FormatError:
            return None
        return Record.of(entry.opcode, header, payload)

    def _without(self, index: int, seqs: NDArray[np.int64]) -> Block:
        """Give a block without aliases that are lost: they have no bytes in it."""
        block, lost = self._reader.table.blocks[index].block, set(seqs.tolist())
        runs = [
            one
            for run in block.runs
            for number in range(run.count)
            if (one := run.at(number)).seq not in lost
        ]
        return replace(block, runs=tuple(runs))
