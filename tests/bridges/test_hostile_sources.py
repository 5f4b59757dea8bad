"""Files from elsewhere are hostile: refused by our errors, in little memory, running nothing."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import random
import resource
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import actstore
from actstore.errors import ActstoreError, FormatError

FILES = Path(__file__).parent / "files"
SAEV = "saev/saev/shards/5708761e"


@pytest.fixture(autouse=True)
def _little_memory() -> Iterator[None]:
    """Let anything that takes 4 GB more than there is fail."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Import something that must be refused, and give what was said."""

    def attempt(source: Path, **options: Any) -> str:
        with pytest.raises(FormatError) as caught:
            actstore.import_activations(source, tmp_path / "made.stream", **options)
        assert not list(tmp_path.glob("*made*"))
        assert not list(tmp_path.glob(".made*"))
        return str(caught.value)

    return attempt


def copied(name: str, tmp_path: Path) -> Path:
    """Copy a fixture, to be damaged."""
    source, target = FILES / name, tmp_path / Path(name).name
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)
    return target


def rewritten(path: Path, change: Callable[[Any], None]) -> None:
    found = json.loads(path.read_text())
    change(found)
    path.write_text(json.dumps(found))


# -- .pt ----------------------------------------------------------------------------------------


class _Runs:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class _Allocates:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 40,)


def pt(path: Path, pickled: bytes, *, packed: bool = False, padding: int = 0) -> Path:
    """Write what `torch.load` would take for a file of `torch.save`."""
    method = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", b"\0" * padding)
    return path


def test_a_pickle_in_a_pt_runs_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    made = tmp_path / "was-run"
    for protocol in (2, 4):
        data = pickle.dumps({"states": _Runs(made)}, protocol)
        refused(pt(tmp_path / "a.pt", data))
        refused(pt(tmp_path / "a.saved.pt", data), kind="torch")
    assert not made.exists()


def test_a_pt_allocates_nothing_by_what_its_pickle_says(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    source = pt(tmp_path / "a.pt", pickle.dumps({"a": _Allocates()}, 2))
    assert "bytearray" in refused(source)


def test_a_pt_of_repeated_values_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"a": torch.zeros(1, 1).expand(1 << 20, 1 << 20)}, tmp_path / "a.pt")
    assert "in a file of" in refused(tmp_path / "a.pt")


def test_a_pt_that_is_a_bomb_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = pt(tmp_path / "a.pt", pickle.dumps({}, 2), packed=True, padding=64 << 20)
    assert "compressed" in refused(source)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"\x93NUMPY\x01\x00"])
def test_what_is_no_file_of_torch_is_refused(
    data: bytes, refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    (tmp_path / "a.pt").write_bytes(data)
    refused(tmp_path / "a.pt")


def test_a_pt_of_something_else_says_what_to_do(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    for value in (
        [torch.zeros(2)],
        {"a": [torch.zeros(2)]},
        {1: torch.zeros(2)},
        {"a": torch.zeros(2, 2).to_sparse()},
        {"a": torch.zeros(2, device="meta")},
        OrderedDict(a="text"),
    ):
        torch.save(value, tmp_path / "a.pt")
        refused(tmp_path / "a.pt")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "a.pt")
    assert "save them by name" in refused(tmp_path / "a.pt")


# -- .npy ---------------------------------------------------------------------------------------


def npy(path: Path, header: str, data: bytes = b"") -> Path:
    """Write an NPY of version 1 with a header of choice."""
    text = header.encode("latin1") + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 1024)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 4)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4)}",
        "{'descr': '|O', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<U4', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,)}",
        "{'descr': '<f16', 'fortran_order': False, 'shape': (1,)}",
        "__import__('os').mkdir('was-run')",
        "(" * 5000,
        "",
    ],
)
def test_hostile_npy_headers_are_refused(
    header: str, refused: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(npy(tmp_path / "a.npy", header, b"\0" * 16))
    assert not (tmp_path / "was-run").exists()


def test_a_pickle_in_an_npy_runs_nothing(refused: Callable[..., str], tmp_path: Path) -> None:
    made = tmp_path / "was-run"
    np.save(tmp_path / "a.npy", np.array([_Runs(made)], object), allow_pickle=True)
    refused(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(pickle.dumps(_Runs(made)))
    refused(tmp_path / "a.npy")
    assert not made.exists()


def test_a_link_out_of_the_folder_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    np.save(tmp_path / "secret.npy", np.zeros((2, 2), "f4"))
    folder = tmp_path / "acts"
    folder.mkdir()
    np.save(folder / "a.npy", np.zeros((2, 2), "f4"))
    (folder / "b.npy").symlink_to(tmp_path / "secret.npy")
    assert "link" in refused(folder)


# -- safetensors --------------------------------------------------------------------------------


def safe(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": tensor([1 << 40], 0, 1 << 42)},
        {"a": tensor([1 << 62, 4], 0, 16)},
        {"a": tensor([4], 0, 16), "b": tensor([4], 8, 24)},
        {"a": tensor([4], 4, 20)},
        {"a": tensor([2], 0, 8)},
        {"a": tensor([4], 0, 16, "F4")},
        {"a": tensor([4], 0, 16, "OBJECT")},
        {"a": {"dtype": "F32"}},
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ],
)
def test_hostile_safetensors_headers_are_refused(
    header: Any, refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    refused(safe(tmp_path / "a.safetensors", header, b"\0" * 16))


def test_a_safetensors_header_longer_than_the_file_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", 1 << 62) + b"{}")
    refused(tmp_path / "a.safetensors")


def test_hostile_labels_are_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    values = {"a": tensor([1, 2, 2], 0, 16)}
    for ids in (tensor([4], 16, 32), tensor([2, 2], 16, 32, "I32"), tensor([1, 2, 1], 16, 24)):
        header = values | {"token_ids": ids}
        refused(safe(tmp_path / "a.safetensors", header, b"\0" * ids["data_offsets"][1]))
    for said in ("[", "[" * 100_000, "{}", '["a", 1]'):
        header = {"__metadata__": {"actstore.labels": said}} | {"token_id": tensor([4], 0, 16)}
        source = safe(tmp_path / "a.safetensors", header, b"\0" * 16)
        try:
            actstore.import_activations(source, tmp_path / "b.stream")
        except FormatError:
            continue
        (tmp_path / "b.stream").unlink()


# -- vLLM, SAELens, saev, activault ---------------------------------------------------------------


def test_vllm_files_of_another_shape_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    states = tensor([2, 1, 2], 0, 16)
    for ids in (tensor([3], 16, 40, "I64"), tensor([2], 16, 24, "F32")):
        header = {"hidden_states": states, "token_ids": ids}
        source = safe(tmp_path / "r.safetensors", header, b"\0" * ids["data_offsets"][1])
        refused(source, kind="vllm")
    refused(safe(tmp_path / "r.safetensors", {"a": tensor([4], 0, 16)}, b"\0" * 16), kind="vllm")


@pytest.mark.parametrize(
    "name", ["../secret.arrow", "/etc/passwd", "", ".", "a\0b", 7, None, "none.arrow", "x" * 5000]
)
def test_saelens_folders_name_no_file_outside(
    name: Any, refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    folder = copied("saelens", tmp_path)
    shutil.copyfile(folder / "data-00000-of-00002.arrow", tmp_path / "secret.arrow")
    rewritten(folder / "state.json", lambda state: state.update(_data_files=[{"filename": name}]))
    refused(folder)


@pytest.mark.parametrize("kind", ["saelens", "saev", "torch", "vllm", "folder", "activault"])
def test_a_kind_that_the_source_is_not_is_refused(
    kind: str, refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("safetensors")
    refused(tmp_path, kind=kind)
    (tmp_path / "text").write_text("text")
    refused(tmp_path / "text", kind=kind)


def test_hostile_json_is_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = copied("saelens", tmp_path)
    for text in ("", "[" * 100_000, "[]", '{"_data_files": 7}', '{"_data_files": [7]}', "\0"):
        (folder / "state.json").write_text(text)
        refused(folder)
    with (folder / "state.json").open("wb") as file:
        file.truncate(1 << 40)
    assert "largest" in refused(folder)


def test_arrow_files_that_are_damaged_or_compressed_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    arrow = pytest.importorskip("pyarrow")
    folder = copied("saelens", tmp_path)
    path = folder / "data-00000-of-00002.arrow"
    whole = path.read_bytes()
    table = arrow.ipc.open_stream(whole).read_all()
    options = arrow.ipc.IpcWriteOptions(compression="zstd")
    with arrow.ipc.new_stream(path, table.schema, options=options) as writer:
        writer.write_table(table)
    assert "uncompressed" in refused(folder)
    for data in (b"", whole[:100], whole[:900], b"\xff" * 64, whole[:8] + b"\xff" * 400):
        path.write_bytes(data)
        refused(folder)
    hook = "blocks.1.hook_resid_pre"
    lists = arrow.list_(arrow.list_(arrow.float32()))
    for values in ([[[1.0], [2.0, 3.0]]], [[[1.0]], [[1.0], [2.0]]], [[[1.0]], None], [[[None]]]):
        table = arrow.table({hook: arrow.array(values, lists)})
        with arrow.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
        refused(folder)


def test_an_arrow_stream_that_begins_with_no_schema_is_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    folder = copied("saelens", tmp_path)
    path = folder / "data-00000-of-00002.arrow"
    data = bytearray(path.read_bytes())
    schema = 8 + struct.unpack_from("<I", data, 4)[0]
    path.write_bytes(data[schema:])
    assert "wanted a schema" in refused(folder)
    data[29] = 0x80  # another type of message, of which pyarrow can be asked for the schema
    path.write_bytes(data)
    assert "wanted a schema" in refused(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": []},
        {"layers": [1, 1]},
        {"layers": [1 << 40]},
        {"layers": ["1"]},
        {"layers": 7},
        {"d_model": 1 << 40},
        {"d_model": 0},
        {"d_model": -4},
        {"d_model": 4.0},
        {"d_model": True},
        {"content_tokens_per_example": 1 << 40},
        {"n_examples": 6},
        {"cls_token": 1},
        {"dtype": "float64"},
        {"max_tokens_per_shard": None},
    ],
)
def test_saev_metadata_that_does_not_fit_the_shards_is_refused(
    change: dict[str, Any], refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = copied(SAEV, tmp_path)
    rewritten(folder / "metadata.json", lambda said: said.update(change))
    refused(folder)


def test_saev_shards_are_what_the_list_says(refused: Callable[..., str], tmp_path: Path) -> None:
    folder = copied(SAEV, tmp_path)
    whole = (folder / "shards.json").read_text()
    for change in (
        [],
        [7],
        [{"name": "acts000000.bin", "n_examples": 5}],
        [{"name": "../acts000000.bin", "n_examples": 5}],
        [{"name": "acts000009.bin", "n_examples": 5}],
        [{"name": "acts000000.bin", "n_examples": 1 << 40}],
    ):
        (folder / "shards.json").write_text(json.dumps(change))
        refused(folder)
    (folder / "shards.json").write_text(whole)
    with (folder / "acts000001.bin").open("r+b") as file:
        file.truncate(100)
    assert "acts000001.bin" in refused(folder)


def test_saev_without_a_list_counts_its_shards(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    folder = copied("saev_pypi", tmp_path)
    rewritten(folder / "metadata.json", lambda said: said.update(n_imgs=1 << 47))
    refused(folder)


def test_activault_files_of_another_shape_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    folder = copied("activault/tiny/models.layers.1.mlp.post", tmp_path)
    path = sorted(folder.glob("*.pt"))[0]
    states, ids = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    for value in (
        {"states": states},
        {"states": states, "input_ids": ids[:1]},
        {"states": states[0], "input_ids": ids[0]},
        {"states": states, "input_ids": ids.float()},
        {"states": states, "input_ids": "text"},
        states,
    ):
        torch.save(value, path)
        refused(folder)


def test_two_attempts_at_a_group_of_activault_are_refused(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    folder = copied("activault/tiny/models.layers.1.mlp.post", tmp_path)
    path = sorted(folder.glob("*.pt"))[0]
    shutil.copyfile(path, path.with_name(path.name.replace("--1_", "--2_")))
    assert "one attempt" in refused(folder)


# -- anything -----------------------------------------------------------------------------------


def mutated(data: bytearray, chance: random.Random) -> bytearray:
    """Change some bytes, cut, insert or remove some, or write numbers that are too large."""
    for _ in range(chance.choice((1, 1, 2, 8))):
        place, how = chance.randrange(len(data) or 1), chance.randrange(6)
        if how == 0 and data:
            data[place % len(data)] ^= 1 << chance.randrange(8)
        elif how == 1 and data:
            data[place % len(data)] = chance.choice((0, 1, 127, 128, 255))
        elif how == 2:
            del data[place:]
        elif how == 3:
            data[place:place] = chance.randbytes(chance.randrange(1, 9))
        elif how == 4:
            del data[place : place + chance.randrange(1, 9)]
        else:
            large = (b"\xff" * 8, b"\0" * 8, struct.pack("<Q", 1 << 40), b"\xff\xff\xff\x7f" * 2)
            data[place : place + 8] = chance.choice(large)
    return data


def check_mutations(source: Path, folder: Path, seed: int, count: int) -> None:
    """Import what is damaged at random: it is read, or refused by one of our errors."""
    chance = random.Random(seed)
    for number in range(count):
        place = folder / f"{number}"
        place.mkdir()
        copy = place / source.name
        if source.is_dir():
            shutil.copytree(source, copy)
        else:
            shutil.copyfile(source, copy)
        files = sorted(one for one in [copy, *copy.rglob("*")] if one.is_file())
        path = chance.choice(files)
        path.write_bytes(mutated(bytearray(path.read_bytes()), chance))
        with contextlib.suppress(ActstoreError):
            actstore.import_activations(copy, place / "made.stream")
        shutil.rmtree(place)


SOURCES = ["vllm", "saelens", "activault/tiny", SAEV, "saev_pypi", "transformer_lens.pt"]


@pytest.mark.parametrize("source", SOURCES)
def test_sources_damaged_at_random_are_read_or_refused(source: str, tmp_path: Path) -> None:
    for package in ("pyarrow", "safetensors", "torch"):
        pytest.importorskip(package)
    check_mutations(FILES / source, tmp_path, 0, 40)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_many_sources_damaged_at_random_are_read_or_refused(source: str, tmp_path: Path) -> None:
    check_mutations(FILES / source, tmp_path, 1, 5_000)
