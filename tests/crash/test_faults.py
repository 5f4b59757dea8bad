"""Whatever fails while a model is captured: one clear error, a clean model, a log that goes on.

The faults and what must hold after each are ``fault_cases.py``'s. By default some 100 faults; the
long form, ``pytest -m crash`` with this file, tries 900.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "capture"))
import refeed
from fault_cases import CASES, MORE, Case, NoMountError, Sufferer
from forks import TIMEOUT, environment, quick_folder

from actstore.errors import ConfigError
from actstore.stream.reader import open_stream


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sufferer]:
    """Give the process that forks."""
    with Sufferer(tmp_path_factory.mktemp("whole")) as one:
        yield one


@pytest.fixture
def place() -> Iterator[Path]:
    """Give a folder whose syncs cost nothing."""
    with quick_folder() as folder:
        yield folder


def survive(child: Sufferer, case: Case, place: Path) -> None:
    try:
        child.survive(case, place / "run")
    except NoMountError as error:
        pytest.skip(f"no tmpfs can be mounted here: {error}")


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=str)


@each(CASES["a write fails"])
def test_a_write_that_fails_is_told_and_what_was_written_before_is_kept(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["a sync fails"])
def test_a_sync_that_fails_is_told_also_where_the_next_would_not(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["a sidecar can't be written"])
def test_a_file_beside_the_log_that_can_not_be_written_is_told(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["an encoder raises"])
def test_an_encoder_that_raises_is_told(case: Case, child: Sufferer, place: Path) -> None:
    survive(child, case, place)


@each(CASES["the log may not grow"])
def test_a_file_that_may_not_grow_is_told(case: Case, child: Sufferer, place: Path) -> None:
    survive(child, case, place)


@each(CASES["the disk is full"])
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


def test_a_device_is_refused_as_a_log(tmp_path: Path) -> None:
    log = tmp_path / "gen.stream"
    log.symlink_to("/dev/full")
    for path in (log, Path("/dev/full")):
        with pytest.raises(ConfigError, match=r"no plain file"):
            refeed.run(path, 1)


@each(CASES["the log is taken away"])
def test_a_log_that_is_taken_from_under_the_writer_is_told(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["the user's code raises"])
def test_what_the_users_code_raises_comes_out_and_the_log_is_closed(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["a signal handler raises"])
def test_a_signal_handler_that_raises_at_any_moment_leaves_all_clean(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["nothing fails"])
def test_a_slow_disk_short_writes_and_other_threads_cost_nothing(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@each(CASES["the process forks"])
def test_a_fork_that_leaves_by_the_with_writes_nothing(
    case: Case, child: Sufferer, place: Path
) -> None:
    survive(child, case, place)


@pytest.mark.slow
@pytest.mark.crash
@each([case for cases in MORE.values() for case in cases])
def test_every_fault_is_told_and_survived(case: Case, child: Sufferer, place: Path) -> None:
    survive(child, case, place)


LEFT_OPEN = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from actstore import HookGranularity, InstrumentationConfig, InstrumentationFramework
model = torch.nn.Linear(4, 4)
framework = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))
framework.instrument_model(model)
capture = framework.capture_activations(
    sys.argv[1], track_per_token=True, checkpoint_interval_tokens=1
)
tracker = capture.__enter__()
for step in range(3):
    model(torch.full((1, 4), float(step)))
    tracker.record_token(step, str(step))
model(torch.ones(1, 4))
"""


def test_an_interpreter_that_exits_with_a_capture_open_closes_its_log(tmp_path: Path) -> None:
    log = tmp_path / "gen.stream"
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, str(log)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done
    with open_stream(log) as reader:
        assert reader.complete
        assert [one.token_id for one in reader.tokens] == [0, 1, 2]
        assert [float(one.values.size) for one in reader.packets()] == [4.0] * 4
