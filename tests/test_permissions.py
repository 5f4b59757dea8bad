"""What may not be read or written is said so, by an error of actstore."""

from __future__ import annotations

import ctypes
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import actstore

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import decoder_log

#: Of ``linux/prctl.h`` and ``linux/capability.h``: what lets root read and write everything.
PR_CAPBSET_DROP = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2

SCRIPT = """
import json, sys
import actstore
log, archive, locked, torn = sys.argv[1:]

def said(call):
    try:
        call()
    except actstore.ActstoreError as error:
        return [type(error).__name__, str(error)]
    return ["", ""]

framework = actstore.InstrumentationFramework(
    actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
)
print(json.dumps({
    "values": said(lambda: actstore.open_dataset(torn).mlp.load()),
    "damage": [str(one) for one in actstore.verify(torn).damage],
    "open_dataset": said(lambda: actstore.open_dataset(locked)),
    "verify": said(lambda: actstore.verify(locked)),
    "analyze": said(lambda: framework.analyze_activations(locked)),
    "compact": said(lambda: actstore.compact(log, "run.zarr")),
    "export": said(lambda: actstore.export(archive, "run.h5")),
    "export of a log": said(lambda: actstore.export(log, "run.h5")),
    "export_rows": said(lambda: actstore.export_rows(archive, "run.parquet")),
    "report": said(lambda: actstore.report(archive, "run.html")),
    "share": said(lambda: actstore.share(archive, "sent")),
}))
"""


def like_anybody() -> None:
    """Let the next program that this process becomes have no more leave than its files' owner."""
    libc = ctypes.CDLL(None)
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Give the error of each call that reads what may not be read, or writes where it may not."""
    folder = tmp_path_factory.mktemp("permissions")
    here = folder / "here"
    here.mkdir()
    log = decoder_log(folder / "run.stream").path
    archive, locked, torn = (
        actstore.compact(log, folder / name).path for name in ("a", "locked", "torn")
    )
    locked.chmod(0)
    (torn / "mlp/c/0/0/0").chmod(0)
    here.chmod(0o555)
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, log, archive, locked, torn],
            capture_output=True, text=True, cwd=here, check=False,
            preexec_fn=like_anybody,
        )  # fmt: skip
    finally:
        locked.chmod(0o755)
        here.chmod(0o755)
    assert done.returncode == 0, done.stderr
    assert not list(here.iterdir())
    return json.loads(done.stdout)


@pytest.mark.parametrize("call", ["open_dataset", "verify", "analyze"])
def test_an_archive_that_may_not_be_read_is_not_called_none(
    told: dict[str, list[str]], call: str
) -> None:
    kind, text = told[call]
    assert kind == "ConfigError"
    assert "can't be read" in text
    assert "locked" in text


def test_a_shard_that_may_not_be_read_is_told_by_its_name(told: dict[str, list[str]]) -> None:
    kind, text = told["values"]
    assert kind == "ArchiveError"
    assert "torn/mlp/c/0/0/0 can't be read" in text
    (damage,) = told["damage"]
    assert damage.startswith("mlp/c/0/0/0: the file can't be read: ")


@pytest.mark.parametrize(
    "call", ["compact", "export", "export of a log", "export_rows", "report", "share"]
)
def test_a_folder_that_may_not_be_written_to_is_an_archive_error(
    told: dict[str, list[str]], call: str
) -> None:
    kind, text = told[call]
    assert kind == "ArchiveError"
    assert re.search("could not be (written|made)", text)
    assert "Permission denied" in text


def test_a_folder_that_is_no_archive_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    for call in (actstore.open_dataset, actstore.verify):
        with pytest.raises(actstore.ActstoreError, match=r"it has no zarr\.json"):
            call(tmp_path)
