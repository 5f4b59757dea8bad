"""Part 7, sharing: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/07_share.py``; about five minutes. It makes environments
that have no actstore with ``venv`` and pip, and so needs a package index. The command is the one
that was installed beside the Python that runs this.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/acceptance")]

from report import run

import actstore

HOLDER = tempfile.TemporaryDirectory(prefix="actstore-07-")
FOLDER = Path(HOLDER.name)
COMMAND = Path(sys.executable).with_name("actstore")
MODEL = ROOT / "examples/tiny-llama"
MINUTES = 5
HOSTILE = ("tests", "-k", "hostile or traversal or bomb or pickle or malicious")

XARRAY = """
import hashlib, json, sys, xarray as xr
found = {}
with xr.open_zarr(sys.argv[1], chunks=None) as held:
    for name, one in held.variables.items():
        values = one.values
        text = values.dtype.kind in "TO"
        raw = json.dumps(values.tolist()).encode() if text else values.tobytes()
        found[name] = [str(values.dtype), list(values.shape), hashlib.sha256(raw).hexdigest()]
print(json.dumps(found))
"""
H5PY = """
import hashlib, h5py, json, sys
found = {}
with h5py.File(sys.argv[1]) as held:
    for name, one in held.items():
        if not isinstance(one, h5py.Dataset) or one.dtype.kind == "O":
            continue
        values = one[()]
        digest = hashlib.sha256(values.tobytes()).hexdigest()
        found[name] = [str(values.dtype), list(values.shape), digest]
print(json.dumps(found))
"""
CROISSANT = """
import json, mlcroissant, sys
data = mlcroissant.Dataset(jsonld=sys.argv[1])
told = [*data.metadata.issues.errors, *data.metadata.issues.warnings]
found = {}
for record in data.records("tokens"):
    for name, value in record.items():
        value = value.decode() if isinstance(value, bytes) else value
        found.setdefault(name.removeprefix("tokens/"), []).append(value)
print(json.dumps({"issues": told, "records": found}, default=str))
"""


def called(*command: Any, folder: Path = FOLDER) -> str:
    """Run a command; give what it printed, or raise with what it said."""
    done = subprocess.run(
        [str(one) for one in command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command[0]} {command[1:3]}: {done.stderr or done.stdout}"[
        -800:
    ]
    return done.stdout


@cache
def shared() -> tuple[Path, float]:
    """Go from a model to a shared folder by the command alone; give the seconds that it took."""
    (FOLDER / "text.txt").write_text("\n".join(topics.values())[:60_000])
    began = time.monotonic()
    called(
        *(COMMAND, "capture", MODEL, "run.stream", "--text", "text.txt"),
        *("--compact", "run.zarr", "--dtype", "bfloat16"),
    )
    called(COMMAND, "verify", "run.zarr", "--against", "run.stream")
    called(
        *(COMMAND, "share", "run.zarr", "shared", "--licence", "CC-BY-4.0"),
        *("--name", "tiny-llama on Python's documentation", "--model-folder", MODEL),
    )
    return FOLDER / "shared", time.monotonic() - began


@cache
def environment(*packages: str) -> Path:
    """Make an environment of these packages alone, and give its Python."""
    folder = FOLDER / ("env-" + "-".join(re.sub(r"\W.*", "", one) for one in packages))
    called(sys.executable, "-m", "venv", folder)
    python = folder / "bin/python"
    called(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *packages)
    listed = called(python, "-m", "pip", "list", "--format", "freeze")
    assert "actstore" not in listed
    return python


def source() -> dict[str, list[Any]]:
    """Give the hash of every variable and label, as the log has them."""
    found = {}
    with actstore.open_dataset(FOLDER / "run.stream", None) as held:
        for name, one in held.variables.items():
            values = one.values
            text = values.dtype.kind in "TO"
            raw = json.dumps(values.tolist()).encode() if text else values.tobytes()
            found[str(name)] = [str(values.dtype), list(values.shape), _hash(raw)]
    return found


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def within_five_minutes() -> str:
    """Time the command from the model to the folder; check the manifest by coreutils."""
    folder, seconds = shared()
    assert seconds < 60 * MINUTES, seconds
    checked = called("sha256sum", "--strict", "-c", "SHA256SUMS", folder=folder).count(": OK")
    size = sum(one.stat().st_size for one in folder.rglob("*") if one.is_file())
    assert checked == sum(one.is_file() for one in folder.rglob("*")) - 1
    return f"{seconds:.0f} s to {size / 1e6:.1f} MB in {checked} files, each of them checked"


def opens_with_xarray() -> str:
    """Open the shared archive in an environment of xarray and zarr alone."""
    folder, _ = shared()
    python = environment("xarray", "zarr")
    found = json.loads(called(python, "-c", XARRAY, folder / "run.zarr"))
    wanted = source()
    assert found == wanted, set(found) ^ set(wanted)
    return f"{len(found)} variables and labels equal to the log's, by SHA-256 of their bytes"


def opens_with_h5py() -> str:
    """Open it as HDF5 in an environment of h5py alone."""
    shared()
    called(COMMAND, "export", "run.zarr", "run.h5")
    python = environment("h5py")
    found = json.loads(called(python, "-c", H5PY, FOLDER / "run.h5"))
    wanted = source()
    equal = 0
    for name, (dtype, shape, digest) in wanted.items():
        if dtype in ("StringDType()", "object") or dtype.startswith("StringDType"):
            continue
        mine = found[name]
        if dtype == "bool":
            assert mine[1] == shape
            mine = [dtype, shape, mine[2]]
        assert mine == [dtype, shape, digest], (name, mine, wanted[name])
        equal += 1
    return f"{equal} arrays equal to the log's"


def opens_with_mlcroissant() -> str:
    """Validate the description and load its records in an environment of mlcroissant alone."""
    folder, _ = shared()
    python = environment("mlcroissant")
    found = json.loads(called(python, "-c", CROISSANT, folder / "croissant.json"))
    assert not found["issues"], found["issues"]
    with actstore.open_dataset(FOLDER / "run.stream", None) as held:
        for name, column in found["records"].items():
            wanted = held[name].values.tolist()
            assert column == wanted, (name, column[:5], wanted[:5])
        rows = held.sizes["token"]
    return f"no issues; {rows} records of {len(found['records'])} fields equal to the log's labels"


def is_imported_exactly() -> str:
    """Make archives again of the HDF5 file and of a zip, and compare them with the log."""
    shared()
    said = []
    for name in ("run.h5", "run.zarr.zip"):
        if not (FOLDER / name).exists():
            called(COMMAND, "export", "run.zarr", name)
        again = FOLDER / f"again-{name}.zarr"
        called(COMMAND, "import", name, again)
        assert actstore.verify(again, against=FOLDER / "run.stream").ok
        said.append(f"{name} {(FOLDER / name).stat().st_size / 1e6:.1f} MB")
    return ", ".join(said)


def refuses_what_is_hostile() -> str:
    """Run the suites of hostile files: zips, HDF5, JSON, pickles, Arrow, safetensors."""
    out = called(
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *HOSTILE, folder=ROOT
    )
    last = out.strip().splitlines()[-1]
    assert int(re.search(r"(\d+) passed", last)[1]) >= 50, last
    return last


if __name__ == "__main__":
    status = run(
        "Part 7: sharing it",
        {
            "Capture to shared folder in under five minutes": within_five_minutes,
            "Opens with xarray and zarr only, every number equal": opens_with_xarray,
            "Opens with h5py only, every number equal": opens_with_h5py,
            "mlcroissant only: valid, records equal": opens_with_mlcroissant,
            "Import back is exact": is_imported_exactly,
            "Hostile inputs are refused": refuses_what_is_hostile,
        },
    )
    HOLDER.cleanup()
    raise SystemExit(status)
