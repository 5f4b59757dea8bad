"""Four real processes run a model: their logs are united to what one process captures."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import processes
import pytest
import torch
import xarray as xr
from processes import DIES_AT, SHARDED, STEPS, WORLD

import actstore
from actstore.errors import ConfigError
from actstore.parallel import Parallel, Shard
from actstore.stream.reader import open_stream

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_ranks import assert_same


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return processes.run(tmp_path_factory.mktemp("processes"))


def logs_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.stream"))


def oracle(folder: Path, replicas: int, *, tokens: bool = False) -> list[Path]:
    """Capture the same in this process alone, which runs as many threads as each of those."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    paths = []
    for replica in range(replicas):
        model = processes.llama()
        path = folder / f"whole{replica}.stream"
        with processes.captured(model, path, track_per_token=tokens) as tracker:
            processes.feed(model, replica, tracker)
        paths.append(path)
    torch.set_num_threads(threads)
    return paths


def test_data_parallel_logs_are_united_to_one_process_logs(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "data")
    found = actstore.compact([*logs[2:], *logs[:2]], tmp_path / "found.zarr").path
    wanted = actstore.compact(oracle(tmp_path, WORLD), tmp_path / "wanted.zarr").path
    assert_same(found, wanted)
    with pytest.raises(ConfigError, match="missing: data 1 of 4"):
        actstore.compact([logs[0], *logs[2:]], tmp_path / "less.zarr")


def test_stages_of_a_pipeline_are_united_to_one_process_log(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "pipeline")
    found = actstore.compact(logs, tmp_path / "found.zarr").path
    wanted = actstore.compact(oracle(tmp_path, 1, tokens=True), tmp_path / "wanted.zarr").path
    assert_same(found, wanted)
    assert actstore.verify(found, against=logs).ok


def by_hand(folder: Path, replica: Sequence[int]) -> dict[str, Any]:
    """Put together what the processes' own hooks kept, of one replica."""
    kept = [dict(np.load(folder / f"{rank}.npz")) for rank in replica]
    found = {}
    for key, first in kept[0].items():
        name = key.partition("|")[0]
        site = name.rpartition(".")[2]
        parts = [one[key] for one in kept] if site in SHARDED else [first]
        found[key] = np.concatenate(parts, -1)
    return found


def check_by_hand(archive: Path, wanted: dict[str, Any], rows: slice) -> int:
    """Compare an archive with tensors by name and pass; give how many layers were compared."""
    names = {name for name, _, _ in (key.partition("|") for key in wanted)}
    seen = 0
    with xr.open_zarr(archive, chunks=None) as dataset:
        for variable in dataset.data_vars.values():
            for place, module in enumerate(variable.attrs.get("modules", ())):
                if module not in names or "token" not in variable.dims:
                    continue
                values = variable[place] if variable.dims[0] == "layer" else variable
                passes = [one for key, one in wanted.items() if key.partition("|")[0] == module]
                flat = [one.reshape(-1, one.shape[-1]) for one in passes]
                assert values.values[rows].tobytes() == np.concatenate(flat).tobytes(), module
                seen += 1
    return seen


def test_divided_outputs_are_put_together_by_what_weights_say(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "data_tensor")
    with open_stream(logs[3]) as reader:
        parallel = Parallel.of(reader.header)
        assert parallel is not None
        assert parallel.places == (1, 0, 1)
        assert parallel.sizes == (2, 1, 2)
        gate = reader.layers["model.layers.0.mlp.gate_proj"]
        assert gate.shard == Shard(-1, 24, 48)
        assert reader.layers["model.layers.0.mlp.act_fn"].shard == Shard(-1, 24, 48)
        assert reader.layers["model.layers.0.mlp"].shard is None
    found = actstore.compact(logs, tmp_path / "found.zarr").path
    with xr.open_zarr(found, chunks=None) as dataset:
        assert dataset["run"].values.tolist() == [0] * 18 + [1] * 18
    for replica in range(2):
        wanted = by_hand(ran / "data_tensor", (2 * replica, 2 * replica + 1))
        assert check_by_hand(found, wanted, slice(18 * replica, 18 * replica + 18)) == 47
    assert actstore.verify(found, against=logs).ok


def test_a_mesh_of_two_axes_is_united(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "pipeline_tensor")
    found = actstore.compact(logs, tmp_path / "found.zarr").path
    seen = 0
    for stage, blocks in enumerate(((0, 1), (2, 3))):
        wanted = by_hand(ran / "pipeline_tensor", (2 * stage, 2 * stage + 1))
        mine = tuple(f"model.layers.{block}." for block in blocks)
        seen += check_by_hand(
            found, {key: one for key, one in wanted.items() if key.startswith(mine)}, slice(None)
        )
    assert seen == 40
    with (
        xr.open_zarr(found, chunks=None) as mine_,
        actstore.open_dataset(oracle(tmp_path, 1)[0], None) as theirs,
    ):
        assert set(mine_.data_vars) == set(theirs.data_vars)
        np.testing.assert_allclose(mine_.logits.values, theirs.logits.values, rtol=1e-3, atol=1e-5)
        assert mine_.token_id.values.tolist() == theirs.token_id.values.tolist()


def test_a_model_that_transformers_divides_is_united(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "hugging_face")
    found = actstore.compact(logs, tmp_path / "found.zarr").path
    wanted = by_hand(ran / "hugging_face", range(WORLD))
    assert check_by_hand(found, wanted, slice(None)) == 47
    with (
        xr.open_zarr(found, chunks=None) as mine,
        actstore.open_dataset(oracle(tmp_path, 1)[0], None) as theirs,
    ):
        assert set(mine.data_vars) == set(theirs.data_vars)
        for name, one in theirs.data_vars.items():
            np.testing.assert_allclose(mine[name].values, one.values, rtol=1e-3, atol=1e-5)


def test_a_killed_process_is_named_and_goes_on(ran: Path, tmp_path: Path) -> None:
    logs = logs_of(ran / "killed")
    with pytest.raises(ConfigError, match=rf"3\.stream \(tensor 3 of 4\) has {DIES_AT}.*common"):
        actstore.compact(logs, tmp_path / "refused.zarr")
    common = actstore.compact(logs, tmp_path / "common.zarr", ranks="common")
    assert common.rows == {"token": 4 * DIES_AT}
    model = processes.Columns(WORLD - 1, WORLD)
    with processes.captured(
        model,
        logs[-1],
        processes.place_of(WORLD - 1),
        hooks=processes.COLUMNS,
        track_per_token=True,
        resume_from_checkpoint=True,
    ) as tracker:
        for number in range(len(tracker.tokens), STEPS):
            processes.step(model, number)
            tracker.record_token(number, str(number))
    found = actstore.compact(logs, tmp_path / "found.zarr")
    whole = processes.Columns(0, 1)
    with torch.no_grad():
        parts = [processes.Columns(rank, WORLD).columns for rank in range(WORLD)]
        given = []
        for number in range(STEPS):
            generator = torch.Generator().manual_seed(number)
            x = torch.randn(1, 4, 8, generator=generator)
            given.append(torch.cat([one(x) for one in parts], -1)[0].numpy())
            np.testing.assert_allclose(given[-1], whole(x)[0].numpy(), rtol=1e-5, atol=1e-6)
    with xr.open_zarr(found.path, chunks=None) as dataset:
        (values,) = (one for one in dataset.data_vars.values() if one.attrs["site"] == "columns")
        assert values.values.tobytes() == np.concatenate(given).tobytes()
        assert dataset.step.values.max() == STEPS - 1


def test_a_resumed_log_keeps_its_place(tmp_path: Path) -> None:
    model, path = processes.Columns(0, 2), tmp_path / "a.stream"

    def capture(place: int, **how: Any) -> None:
        parallel = Parallel(tensor=(place, 2), run_id="r")
        with processes.captured(model, path, parallel, track_per_token=True, **how) as tracker:
            processes.step(model, 0)
            tracker.record_token(1, "a")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # body never fires
        capture(0)
        with pytest.raises(ConfigError, match="place on the tensor axis"):
            capture(1, resume_from_checkpoint=True)
        capture(0, resume_from_checkpoint=True)


def test_first_block_names_a_stage_as_the_whole_model_does(tmp_path: Path) -> None:
    model = processes.llama()
    model.model.layers = model.model.layers[2:]
    path = tmp_path / "a.stream"
    with processes.captured(model, path, Parallel(pipeline=(1, 2), first_block=2, run_id="r")):
        processes.feed(model, 0)
    with open_stream(path) as reader:
        blocks = {one.block for one in reader.layers.values()}
        assert blocks == {-1, 2, 3}
        assert reader.layers["model.layers.3.mlp"].block == 3
        assert "model.layers.0.mlp" not in reader.layers


def test_a_rule_goes_before_what_is_found(tmp_path: Path) -> None:
    model, path = processes.Columns(0, 2), tmp_path / "a.stream"
    parallel = Parallel(tensor=(0, 2), sharded={"columns": None, "*": -1}, run_id="r")
    with processes.captured(model, path, parallel, hooks=processes.COLUMNS):
        processes.step(model, 0)
    with open_stream(path) as reader:
        assert reader.layers["columns"].shard is None
    wrong = Parallel(tensor=(0, 2), sharded={"*": 5}, run_id="r")
    with (
        pytest.raises(ConfigError, match=r"dimension 5; its output has the shape \(1, 4, 6\)"),
        processes.captured(model, tmp_path / "b.stream", wrong, hooks=processes.COLUMNS),
    ):
        processes.step(model, 0)
    with pytest.raises(ConfigError, match=r"actstore\.Parallel"):
        framework = actstore.InstrumentationFramework(actstore.InstrumentationConfig.balanced())
        framework.instrument_model(model, parallel=(0, 2))  # type: ignore[arg-type]
