"""Small arrays are added to a finished archive: all of them or none, and all else stays."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from logs import decoder_log, files_of

import actstore
from actstore.appending import append
from actstore.archive import grid, store
from actstore.archive.adding import add_arrays, only_writer, remove_arrays
from actstore.archive.coordinates import STRING, Coordinate
from actstore.archive.root import read_attributes, read_root
from actstore.compaction import compact
from actstore.errors import ArchiveError, ConfigError
from actstore.verification import verify

sys.path.insert(0, str(Path(__file__).parents[1] / "crash"))
from forks import quick_folder

GROUP = "statistics/resid"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(grid, "CHUNK_BYTES", 256)
        patched.setattr(grid, "SHARD_BYTES", 1024)
        compact(decoder_log(folder / "run.stream").path, folder / "run.zarr")
    return folder


@pytest.fixture
def archive(made: Path, tmp_path: Path) -> Path:
    """Give an archive with several shards an array, beside its log."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "run.zarr"


def rows(archive: Path) -> int:
    return int(read_attributes(archive)["rows"]["token"])


def label(
    archive: Path, name: str = "mine", *, dtype: Any = np.float64, seed: int = 0
) -> Coordinate:
    values = np.random.default_rng(seed).integers(0, 100, rows(archive))
    return Coordinate(
        name,
        ("token",),
        values.astype(str).astype(STRING) if dtype is STRING else values.astype(dtype),
    )


def means(seed: int = 0) -> list[Coordinate]:
    generator = np.random.default_rng(seed)
    return [
        Coordinate("mean", ("layer", "feature"), generator.normal(size=(3, 8))),
        Coordinate("group", ("layer",), np.array(["a", "", "\u00e4 b"], STRING)),
        Coordinate("count", (), np.array(7 + seed)),
    ]


def chunks(archive: Path) -> dict[str, int]:
    """Give each file that holds values, and which file it is to the file system."""
    files = [path for path in archive.rglob("*") if path.is_file() and path.name != "zarr.json"]
    return {str(path.relative_to(archive)): path.stat().st_ino for path in files}


def plain(archive: Path, group: str | None = None) -> xr.Dataset:
    found = xr.open_zarr(archive, group=group, chunks=None, consolidated=group is None)
    return found.load()


# -- what is added ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [np.bool_, np.int8, np.uint64, np.float16, np.float64, np.complex64, STRING]
)
def test_added_coordinates_are_seen_by_everyone_and_no_file_but_the_root_changes(
    archive: Path, dtype: Any
) -> None:
    before, old = files_of(archive), plain(archive)
    wanted = label(archive, dtype=dtype)
    add_arrays(archive, [wanted, Coordinate("depth", ("layer",), np.arange(old.sizes["layer"]))])
    after = files_of(archive)
    assert {name for name in before if before[name] != after[name]} == {"zarr.json"}
    with actstore.open_dataset(archive) as ours:
        for found in (plain(archive), ours):
            assert found.coords["mine"].dims == ("token",)
            assert found.coords["mine"].values.dtype == wanted.values.dtype
            assert np.array_equal(found.coords["mine"].values, wanted.values)
            assert found.coords["depth"].values.tolist() == [*range(old.sizes["layer"])]
            assert (
                found.drop_vars(["mine", "depth"]).load().drop_attrs().identical(old.drop_attrs())
            )
    report = verify(archive, against=archive.with_name("run.stream"))
    assert report.ok, report.damage
    assert report.checked["files"] == len(after)
    said = read_attributes(archive)["added"]
    assert list(said) == ["mine", "depth"]
    assert said["mine"]["writer"] == {"name": "actstore", "version": actstore.__version__}
    assert [path.name for path in archive.parent.iterdir() if path.name[0] == "."] == []


def test_added_text_is_also_bytes_and_offsets(archive: Path) -> None:
    wanted = label(archive, dtype=STRING)
    add_arrays(archive, [wanted])
    text = zarr.open_group(archive / "text", mode="r", use_consolidated=False)
    data, offsets = (np.asarray(text[f"mine_{end}"][...]) for end in ("bytes", "offsets"))
    found = [data[a:b].tobytes().decode() for a, b in itertools.pairwise(offsets)]
    assert found == wanted.values.tolist()


def test_a_group_of_statistics_has_its_own_dimensions_and_attributes(archive: Path) -> None:
    root = plain(archive)
    add_arrays(archive, means(), group=GROUP, attributes={"coordinates": "group", "of": "resid"})
    add_arrays(archive, means(1), group="statistics/other")
    found = plain(archive, GROUP)
    assert found.attrs["of"] == "resid"
    assert list(found.coords) == ["group"]
    for one in means():
        assert found[one.name].dims == one.dims
        assert np.array_equal(found[one.name].values, one.values)
    assert store.open_xarray(archive, GROUP).load().identical(found)
    assert plain(archive, "statistics/other")["count"] == 8
    assert plain(archive).drop_attrs().identical(root.drop_attrs())
    assert verify(archive).ok
    assert verify(archive).checked["files"] == len(files_of(archive))


def test_any_flipped_bit_of_what_was_added_is_found(archive: Path) -> None:
    before = set(files_of(archive))
    add_arrays(archive, [label(archive, dtype=STRING)])
    add_arrays(archive, means(), group=GROUP)
    for name in sorted(set(files_of(archive)) - before):
        path = archive / name
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
        assert any(one.where.startswith(name) for one in verify(archive).damage), name
        path.unlink()
        assert not verify(archive).ok
        path.write_bytes(data)
    assert verify(archive).ok


def test_what_the_root_says_was_added_must_be_there(archive: Path) -> None:
    root = read_root(archive)
    root["attributes"]["added"] = {"mine": {}}
    below = root["consolidated_metadata"]["metadata"]
    store.ArchiveWriter(archive).write_root(root["attributes"], below)
    (found,) = verify(archive).damage
    assert "'mine' was added, which is not there" in found.reason


def test_a_large_small_array_is_cut_so_that_blosc_takes_its_chunks(archive: Path) -> None:
    wide = Coordinate("wide", ("a", "b"), np.zeros((300, 70_000), np.int8))
    add_arrays(archive, [wide], group=GROUP)
    said = read_root(archive)["consolidated_metadata"]["metadata"][f"{GROUP}/wide"]
    assert said["chunk_grid"]["configuration"]["chunk_shape"] == [239, 70_000]
    assert verify(archive).ok


# -- replacing and removing ---------------------------------------------------------------------


def test_what_was_added_is_replaced_on_request_and_values_are_the_same_files(
    archive: Path,
) -> None:
    add_arrays(archive, [label(archive, dtype=STRING), label(archive, "kept")])
    add_arrays(archive, means(), group=GROUP)
    with pytest.raises(ConfigError, match=r"'mine' was added to .* before"):
        add_arrays(archive, [label(archive)])
    before = chunks(archive)
    add_arrays(archive, [label(archive, seed=1), label(archive, "new")], replace=True)
    add_arrays(archive, means(1)[:1], group=GROUP, replace=True)
    found = plain(archive)
    assert np.array_equal(found.mine.values, label(archive, seed=1).values)
    assert np.array_equal(found.kept.values, label(archive).values)
    assert "new" in found.coords
    assert list(plain(archive, GROUP).variables) == ["mean"]
    assert plain(archive, GROUP)["mean"].identical(
        xr.Dataset({"mean": (means(1)[0].dims, means(1)[0].values)})["mean"]
    )
    now = chunks(archive)
    changed = {name for name in {*now, *before} if now.get(name) != before.get(name)}
    texts = ("mine", f"{GROUP}/group")
    assert {re.sub("/c(/.*)?$", "", name) for name in changed} == {
        *("mine", "new", *(f"{GROUP}/{one.name}" for one in means())),
        *(f"text/{name}_{end}" for name in texts for end in ("bytes", "offsets")),
    }
    report = verify(archive, against=archive.with_name("run.stream"))
    assert report.ok, report.damage
    assert report.checked["files"] == len(files_of(archive))
    assert [path.name for path in archive.parent.iterdir() if path.name[0] == "."] == []


def test_all_that_was_added_is_taken_out_again(archive: Path) -> None:
    before, old = files_of(archive), read_root(archive)
    add_arrays(archive, [label(archive, dtype=STRING), label(archive, "other")])
    add_arrays(archive, means(), group=GROUP)
    remove_arrays(archive, ["mine", GROUP])
    assert list(read_attributes(archive)["added"]) == ["other"]
    assert verify(archive).ok
    remove_arrays(archive, ["other"])
    assert files_of(archive) == before
    assert read_root(archive) == old


@pytest.mark.parametrize("name", ["resid", "token_id", "nothing", "text", "../run.stream"])
def test_only_what_was_added_is_taken_out(archive: Path, name: str) -> None:
    before = files_of(archive)
    add_arrays(archive, [label(archive)])
    with pytest.raises(ConfigError, match="was not added"):
        remove_arrays(archive, ["mine", name])
    remove_arrays(archive, ["mine"])
    assert files_of(archive) == before


def test_where_files_can_not_be_linked_nothing_is_replaced(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_arrays(archive, [label(archive)])
    before = files_of(archive)

    def refuse(*_: Any) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    with pytest.raises(ArchiveError, match=r"no links here.*remove what is to be replaced"):
        add_arrays(archive, [label(archive, seed=1)], replace=True)
    assert files_of(archive) == before
    assert [path.name for path in archive.parent.iterdir() if path.name[0] == "."] == []


# -- what is refused ----------------------------------------------------------------------------


def numbers(archive: Path, name: str, dims: tuple[str, ...] = ("token",)) -> Coordinate:
    return Coordinate(name, dims, np.zeros(rows(archive)))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        *[
            (lambda path, name=name: [numbers(path, name)], "taken")
            for name in ("resid", "RESID", "mlp", "token_id", "text", "statistics", "token",
                         "vocab", "resid_present", "cross_attn", "passes")
        ],
        *[
            (lambda path, name=name: [numbers(path, name)], "can't be the name")
            for name in ("", "a b", "../up", "a/b", ".hidden", "_x", "\ud800", "x" * 161, "x.")
        ],
        (lambda path: [numbers(path, "encoder_pass_index")], "kept for passes"),
        (lambda path: [numbers(path, "a"), numbers(path, "A")], "only in case"),
        (lambda path: [numbers(path, "a", ("tokens",))], r"the archive has .*token: "),
        (lambda path: [Coordinate("a", ("token",), np.zeros(3))], r"3 values on 'token'"),
        (lambda path: [Coordinate("a", (), np.zeros(()))], "labels no dimension"),
        (lambda path: [Coordinate("a", ("token",), np.zeros((rows(path), 2)))], "can't have the"),
        *[
            (lambda path, of=of: [Coordinate("a", ("token",), np.zeros(rows(path), of))], text)
            for of, text in (("O", "dtype object"), ("M8[s]", "dtype datetime"), ("V2", "text"))
        ],
        (lambda path: [], "nothing to add"),
    ],
)  # fmt: skip
def test_what_is_no_coordinate_of_the_archive_is_refused_and_nothing_changes(
    archive: Path, make: Callable[[Path], list[Coordinate]], said: str
) -> None:
    before = files_of(archive)
    with pytest.raises(ConfigError, match=said):
        add_arrays(archive, [*make(archive)])
    assert files_of(archive) == before


@pytest.mark.parametrize(
    "group", ["passes", "statistics", "statistics/", "statistics/a/b", "x/y", "statistics/.."]
)
def test_only_groups_of_statistics_are_made(archive: Path, group: str) -> None:
    with pytest.raises(ConfigError):
        add_arrays(archive, means(), group=group)


def test_groups_that_differ_in_case_are_refused(archive: Path) -> None:
    add_arrays(archive, means(), group=GROUP)
    with pytest.raises(ConfigError, match="taken"):
        add_arrays(archive, means(), group="statistics/RESID", replace=True)


def test_one_writer_at_a_time_and_the_error_says_who_it_is(archive: Path) -> None:
    later = decoder_log(archive.with_name("later.stream"), run="later").path
    with only_writer(archive):
        for work in (
            lambda: add_arrays(archive, [label(archive)]),
            lambda: remove_arrays(archive, ["mine"]),
            lambda: append(later, archive),
        ):
            with pytest.raises(ArchiveError, match=rf"process {os.getpid()} of .* is writing to"):
                work()
    add_arrays(archive, [label(archive)])


def test_an_archive_whose_metadata_is_damaged_is_refused(archive: Path) -> None:
    path = archive / "zarr.json"
    path.write_bytes(path.read_bytes().replace(b'"profile": "balanced"', b'"profile": "none"'))
    with pytest.raises(ArchiveError, match="damaged"):
        add_arrays(archive, [label(archive)])


def test_names_that_lead_out_of_the_archive_are_refused(archive: Path) -> None:
    aside = archive.with_name("aside")
    aside.mkdir()
    root = read_root(archive)
    below = root["consolidated_metadata"]["metadata"]
    bad = {**below, f"{GROUP}/../../../aside": below["token_id"]}
    said = root["attributes"] | {"added": {GROUP: {}}}
    store.ArchiveWriter(archive).write_root(said, bad)
    with pytest.raises(ArchiveError, match="outside of itself"):
        remove_arrays(archive, [GROUP])
    assert aside.is_dir()


def test_appending_to_an_archive_with_something_added_is_refused_until_it_is_out(
    archive: Path,
) -> None:
    later = decoder_log(archive.with_name("later.stream"), run="later").path
    add_arrays(archive, [label(archive)])
    add_arrays(archive, means(), group=GROUP)
    before = files_of(archive)
    with pytest.raises(ArchiveError, match=r"'mine', 'statistics/resid'.*remove_added"):
        append(later, archive)
    assert files_of(archive) == before
    remove_arrays(archive, ["mine", GROUP])
    append(later, archive)
    logs = [archive.with_name(f"{name}.stream") for name in ("run", "later")]
    assert verify(archive, against=logs).ok


# -- kills --------------------------------------------------------------------------------------


CHILD = """
import itertools, os, shutil, signal, sys
from pathlib import Path
import numpy as np
from actstore.archive import adding
from actstore.archive.coordinates import STRING, Coordinate

CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "ctypes.dlsym"}
base, out, what, rows, every = *sys.argv[1:4], *map(int, sys.argv[4:])
text = np.array([f"new {one}" for one in range(rows)], STRING)
labels = [
    Coordinate("mine", ("token",), text), Coordinate("other", ("token",), np.arange(rows))
]
mean = Coordinate("mean", ("layer",), np.arange(3.0))

def work(folder):
    if what == "remove":
        adding.remove_arrays(folder, ["mine", "statistics/resid"])
    elif what == "group":
        adding.add_arrays(folder, [mean], group="statistics/resid")
    else:
        adding.add_arrays(folder, labels, replace=what == "replace")

def run(folder, last):
    left = itertools.count(-last)
    def told(event, args):
        flags = args[2] if event == "open" and isinstance(args[2], int) else 0
        writes = flags & (os.O_WRONLY | os.O_RDWR)
        if (writes or event in CHANGES) and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(told)
    work(folder)
    os._exit(0)

for number in itertools.count(0, every):
    folder = Path(out, str(number), "run.zarr")
    shutil.copytree(base, folder)
    child = os.fork()
    if not child:
        try:
            run(folder, number)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(number, status, flush=True)
    if status == 0:
        break
"""


def kill_everywhere(archive: Path, out: Path, what: str, *, every: int) -> list[Path]:
    """Kill a call before each change, or some, that it makes to the file system."""
    root = str(Path(actstore.__file__).parents[1])
    script = [sys.executable, "-c", CHILD, str(archive), str(out), what, str(rows(archive))]
    done = subprocess.run(
        [*script, str(every)],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    told = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert [status for _, status in told] == [-signal.SIGKILL] * (len(told) - 1) + [0], done.stderr
    assert len(told) > 3
    return [out / str(number) / "run.zarr" for number, _ in told]


def new_labels(archive: Path) -> list[Coordinate]:
    """Give what the child writes."""
    count = rows(archive)
    text = np.array([f"new {one}" for one in range(count)], STRING)
    return [
        Coordinate("mine", ("token",), text),
        Coordinate("other", ("token",), np.arange(count)),
    ]


def state(archive: Path, old: xr.Dataset, what: str) -> str:
    """Say whether an archive is as it was or as a call makes it, to every reader."""
    report = verify(archive)
    assert report.ok, report.damage
    found, later = plain(archive), what in ("replace", "remove")
    with actstore.open_dataset(archive) as ours:
        assert ours.load().identical(found)
    group = GROUP in read_attributes(archive).get("added", {})
    if found.identical(old):
        assert group == later
        return "old"
    names = ["mine", "other"]
    one, other = (dataset.drop_vars(names, errors="ignore") for dataset in (found, old))
    assert one.drop_attrs().identical(other.drop_attrs())
    assert group == (what in ("group", "replace"))
    if what in ("add", "replace"):
        for wanted in new_labels(archive):
            assert np.array_equal(found.coords[wanted.name].values, wanted.values)
    else:
        assert [name for name in names if name in found.coords] == ["other"] * later
    return "new"


def check_kills(archive: Path, what: str, *, every: int) -> None:
    if what in ("replace", "remove"):
        add_arrays(archive, [label(archive), label(archive, "other", dtype=STRING)])
        add_arrays(archive, means(), group=GROUP)
    old = plain(archive)
    with quick_folder() as out:
        folders = kill_everywhere(archive, out, what, every=every)
        states = [state(folder, old, what) for folder in folders]
        assert states == sorted(states, reverse=True)
        assert (states[0], states[-1]) == ("old", "new")
        for folder, found in zip(folders, states, strict=True):  # the next call is none the wiser
            if what == "group":
                mean = Coordinate("mean", ("layer",), np.arange(3.0))
                add_arrays(folder, [mean], group=GROUP, replace=True)
            elif what != "remove":
                add_arrays(folder, new_labels(folder), replace=True)
            elif found == "old":
                remove_arrays(folder, ["mine", GROUP])
            assert state(folder, old, what) == "new"
            if what != "remove" or found == "old":
                assert [path.name for path in folder.parent.iterdir()] == ["run.zarr"]


@pytest.mark.crash
@pytest.mark.parametrize(
    ("what", "every"), [("add", 9), ("group", 7), ("replace", 23), ("remove", 5)]
)
def test_a_kill_leaves_the_archive_as_it_was_or_as_it_will_be(
    archive: Path, what: str, every: int
) -> None:
    check_kills(archive, what, every=every)


@pytest.mark.slow
@pytest.mark.crash
@pytest.mark.parametrize("what", ["add", "group", "replace", "remove"])
def test_a_kill_anywhere_leaves_the_archive_as_it_was_or_as_it_will_be(
    archive: Path, what: str
) -> None:
    check_kills(archive, what, every=1)
