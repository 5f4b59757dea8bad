"""Owns what can be done with a log whose writer ended: resume it, or make a whole log of it."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore import files
from actstore.errors import ConfigError, FormatError, StreamCorruptError
from actstore.stream.reader import StreamReader, open_stream
from actstore.stream.records import MAGIC, Block, Commit, Entry, Frame, Opcode, Record
from actstore.stream.scan import Damage, LogFile, Scan, walk
from actstore.stream.writer import CommitPoint, StreamWriter

__all__ = [
    "RecoveryReport",
    "ResumePoint",
    "begun",
    "is_log",
    "keep_cut",
    "recover",
    "resume_point",
]

_STRIDE: Final = 1 << 20
_FIRST_COMMIT: Final = Frame.SIZE + len(Commit(0, 0, 0, 0, step_boundary=True).encode())


@dataclass(frozen=True, slots=True)
class ResumePoint:
    """Where a log can be resumed: its last COMMIT at a step boundary.

    Attributes
    ----------
    offset : int
        The end of that COMMIT: the log is cut here.
    sync : bytes
        The file's sync marker.
    commits : tuple of int
        Offsets of the COMMITs that stay.
    point : CommitPoint
        Where the run stood.
    loses : bool
        Something that was captured stands behind it.
    """

    offset: int
    sync: bytes
    commits: tuple[int, ...]
    point: CommitPoint
    loses: bool


def is_log(path: Path) -> bool:
    """Whether a file begins as a log does, of whatever version."""
    with path.open("rb") as file:
        return file.read(len(MAGIC))[:-1] == MAGIC[:-1]


def begun(path: Path) -> bool:
    """Whether a log has got as far as its HEADER and first COMMIT: else nothing was captured.

    A log that is damaged there, not cut short, has begun: a reader will say what is wrong with it.
    """
    file = LogFile(path)
    start = len(MAGIC) + Frame.SIZE
    try:
        if file.size < start:
            return False
        head = Frame.decode(file.read(len(MAGIC), Frame.SIZE))
        if start + head.header_length > file.size:  # what is there of it is JSON, or it is damaged
            rest = file.read(start, file.size - start)
            return not (rest.isascii() and rest.decode("ascii").isprintable())
        head.check(file.read(start, head.header_length))
        return file.size >= len(MAGIC) + head.length + _FIRST_COMMIT
    except FormatError:
        return True
    finally:
        file.close()


def resume_point(path: Path) -> ResumePoint:
    """Find where a log can be resumed.

    Raises
    ------
    StreamCorruptError
        The log is damaged.
    ConfigError
        It was captured without tracking tokens, so that it has no step to go on from.
    """
    with open_stream(path) as reader:
        reader.check()
        if not reader.header.get("capture", {}).get("track_per_token", False):
            msg = (
                f"{path} was captured without track_per_token=True and has no step to resume "
                "from; give another output_path, or leave resume_from_checkpoint=False to have "
                "it moved aside"
            )
            raise ConfigError(msg)
        return _last_boundary(reader)


def _last_boundary(reader: StreamReader) -> ResumePoint:
    groups = reader.scan.groups
    last = max(index for index, group in enumerate(groups) if group.commit.step_boundary)
    commit, end = groups[last].commit, groups[last].end
    later = any(group.entries for group in groups[last + 1 :])
    torn = not reader.scan.complete and reader.file_bytes > groups[-1].end
    return ResumePoint(
        end,
        reader.scan.sync,
        tuple(group.offset for group in groups[: last + 1]),
        CommitPoint(commit.next_seq, commit.next_pass, commit.next_step, step_boundary=True),
        later or torn,
    )


def keep_cut(path: Path, offset: int) -> Path:
    """Copy what a log holds behind an offset beside it, durably, before it is cut there."""
    kept = files.free_name(path.with_name(f"{path.name}.cut"))
    with path.open("rb") as source, kept.open("xb") as target:
        source.seek(offset)
        shutil.copyfileobj(source, target, _STRIDE)
    files.fsync_file(kept)
    files.fsync_folder(kept.parent)
    return kept


# -- a whole log of what is intact ----------------------------------------------------------------


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
    path: str | os.PathLike[str], out: str | os.PathLike[str] | None = None
) -> RecoveryReport:
    """Make a whole log of what is intact in a torn or damaged one, which stays as it is.

    Parameters
    ----------
    path : path
        The log; nothing may be writing it.
    out : path, optional
        Where the whole log goes; it must not exist. By default ``run.recovered.stream`` beside
        ``run.stream``, or the first free name like that.

    Returns
    -------
    RecoveryReport
        What was kept and what was lost; print it.

    Raises
    ------
    ConfigError
        It is being written, or ``out`` exists.
    MissingFileError, FormatError
        There is no log.
    StreamCorruptError
        Nothing of it can be told: it was cut in its HEADER.
    """
    place = Path(path)
    with StreamReader(place, errors="skip") as reader:
        _check_unwritten(place)
        kept = _Intact(reader)
        if reader.complete and not kept.damage and kept.rows.all():
            return kept.report(place)
        target = Path(out) if out is not None else _beside(place)
        if target.exists():
            msg = f"{target} exists, and is not overwritten; give another out, or remove it"
            raise ConfigError(msg)
        partial = target.with_name(f".{target.name}.partial")
        partial.unlink(missing_ok=True)
        report = kept.report(target)
        try:
            kept.write(partial, report)
            _check_copy(reader, kept, partial)
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

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader
        table = reader.table
        frames = Scan({}, reader.scan.sync)  # by the index, a damaged frame isn't seen
        with closing(LogFile(reader.path)) as file:
            for _ in walk(file, frames, len(MAGIC)):
                pass
        self.damage = {one.offset: one for one in frames.damage}
        self.lost_blocks = {index for index in range(len(table.blocks)) if not self._reads(index)}
        _ = reader.passes  # notes those that can't be read
        self.damage |= {one.offset: one for one in reader.damage}
        lost = np.isin(table.block, list(self.lost_blocks))
        self.rows = ~np.isin(table.seq, table.seq[lost])
        several = (table.alias_of >= 0) | (table.parts > 1)
        for row in np.flatnonzero(several & table.whole() & self.rows).tolist():
            if not self._means(row):
                self.rows[table.seq == table.seq[row]] = False

    def _means(self, row: int) -> bool:
        """Whether an alias's target is kept, and the parts of a packet have its size."""
        try:
            target = int(self._reader.resolve(np.array([row]))[0])
            if target == row:
                self._reader.values(row)
        except StreamCorruptError as error:
            self.damage.setdefault(error.offset, Damage(error.offset, 0, str(error)))
            return False
        return bool(self.rows[target])

    def _reads(self, index: int) -> bool:
        try:
            self._reader.block(index)
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
        missing = np.setdiff1d(np.arange(last.next_seq), held)
        steps = {token.step for token in reader.tokens}
        end = groups[-1].end if groups else reader.file_bytes
        closed = reader.scan.complete
        return RecoveryReport(
            reader.path,
            target,
            int(held.size),
            len(reader.passes),
            len(steps),
            int(missing.size),
            dict(layers),
            self._passes_of(missing),
            tuple(sorted(set(range(last.next_step)) - steps)),
            sum(one.length for one in self.damage.values()),
            0 if closed else max(reader.file_bytes - end, 0),
            tuple(self.damage[offset] for offset in sorted(self.damage)),
        )

    def _passes_of(self, missing: NDArray[np.int64]) -> tuple[int, ...]:
        """Give the passes that packets are of: as described, else as those around them."""
        table = self._reader.table
        order = np.argsort(table.seq, kind="stable")
        seq, passes = table.seq[order], table.pass_index[order]
        if not seq.size or not missing.size:
            return ()
        before = np.clip(np.searchsorted(seq, missing, side="right") - 1, 0, seq.size - 1)
        after = np.clip(np.searchsorted(seq, missing), 0, seq.size - 1)
        found: set[int] = set()
        for low, high in set(zip(passes[before].tolist(), passes[after].tolist(), strict=True)):
            found.update(range(low, high + 1))
        return tuple(sorted(found))

    def write(self, path: Path, report: RecoveryReport) -> None:
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
