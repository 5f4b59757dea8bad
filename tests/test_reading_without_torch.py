"""Where torch and transformers can't be imported, all but capturing gives the same values."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.verification import verify

# Run here, and in a process that has no torch: what it says must be the same. It is built of the
# public names alone.
SCRIPT = """
import json
import sys
from pathlib import Path


class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "accelerate", "safetensors"):
            raise ImportError(f"{name} is not to be imported")


sys.meta_path.insert(0, NoTorch())
for name in ("torch", "transformers"):
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(f"{name} can be imported")

sys.path.insert(0, sys.argv[1])
from test_reading_without_torch import everything

found = everything(Path(sys.argv[2]), Path(sys.argv[3]))
found["loaded"] = sorted({name.partition(".")[0] for name in sys.modules})
print(json.dumps(found))
"""


def digest(*parts: bytes) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()


def of_log(log: Path) -> dict[str, Any]:
    """Give what `open_stream` reads."""
    with actstore.open_stream(log) as reader:
        return {
            "packets": [
                (p.seq, p.layer, p.pass_index, p.dtype.name, p.shape, digest(p.values.tobytes()))
                for p in reader.packets()
            ],
            "ids": [one.axes[0].token_ids.tolist() for one in reader.passes],
            "tokens": [(one.token_id, one.token_text) for one in reader.tokens],
            "features": {str(width): kept.tolist() for width, kept in reader.features.items()},
            "complete": reader.complete,
        }


def of_dataset(place: Path, chunks: Any) -> dict[str, Any]:
    """Give every value of a dataset, and reductions of those that are numbers."""
    with actstore.open_dataset(place, chunks=chunks) as dataset:
        found = {
            name: (
                one.dims,
                one.shape,
                one.dtype.name,
                digest(bytes(str(one.values.tolist()), "utf8")),
            )
            for name, one in dataset.variables.items()
        }
        rows = [name for name, one in dataset.data_vars.items() if "token" in one.dims]
        real = dataset.where(~dataset["is_padding"])
        reduced = {
            name: [
                float(real[name].mean()),
                float(real[name].astype("float64").std()),
                float(dataset[name].isel(token=slice(2, None)).max()),
                real[name].groupby("pass_index").sum().values.astype("float64").round(3).tolist(),
            ]
            for name in rows
        }
    return {"variables": found, "reduced": reduced}


def everything(log: Path, archive: Path) -> dict[str, Any]:
    """Read, analyse, compact, open, reduce and verify, into an archive that is not there yet."""
    config = actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)
    framework = actstore.InstrumentationFramework(config)
    analysis = framework.analyze_activations(log)
    with_tokens = actstore.analyze_activations_with_tokens(log, framework)
    actstore.compact(log, archive)
    reports = [verify(log), verify(archive)]
    of_archive = {
        str(path.relative_to(archive)): digest(path.read_bytes())
        for path in sorted(archive.rglob("*"))
        if path.is_file() and path.name != "zarr.json"  # which says where and when
    }
    found = {
        "log": of_log(log),
        "analysis": analysis,
        "with tokens": with_tokens,
        "files": of_archive,
        "of the archive": framework.analyze_activations(archive)["per_layer"],
        "datasets": [of_dataset(place, None) for place in (log, archive)],
        "chunked": of_dataset(archive, "auto"),
        "verified": [(one.ok, one.kind, one.complete, dict(one.checked)) for one in reports],
    }
    return json.loads(json.dumps(found))


@pytest.fixture(scope="module", params=["FULL_TENSOR", "SAMPLED_SLICES"])
def log(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a real capture of a model in bfloat16 that generates."""
    torch = pytest.importorskip("torch")
    sys.path.insert(0, str(Path(__file__).parent / "capture"))
    from oracle import capturing
    from tiny_models import build, token_ids

    path = tmp_path_factory.mktemp(request.param) / "gen.stream"
    granularity = actstore.HookGranularity[request.param]
    hooks = actstore.HookConfig(sampling_rate=0.25)
    model = build("llama", torch.bfloat16)
    with capturing(model, path, granularity, "zstd", hooks, track_per_token=True) as tracker:
        ids = model.generate(
            token_ids(), max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=True
        )
        for token in ids[0, 5:].tolist():
            tracker.record_token(token, f"<{token}>")
    return path


@pytest.fixture(scope="module")
def without(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Give what a process without torch says."""
    archive = tmp_path_factory.mktemp("without") / "gen.zarr"
    arguments = [sys.executable, "-W", "error", "-c", SCRIPT]
    arguments += [str(Path(__file__).parent), str(log), str(archive)]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_reading_analysing_compacting_and_verifying_need_no_torch(
    log: Path, without: dict[str, Any], tmp_path: Path
) -> None:
    loaded = set(without.pop("loaded"))
    assert loaded.isdisjoint({"torch", "transformers"})
    assert {"actstore", "xarray", "zarr"} <= loaded
    wanted = everything(log, tmp_path / "gen.zarr")
    for name, one in wanted.items():
        assert without[name] == one, name
    assert without.keys() == wanted.keys()
    assert len(wanted["log"]["packets"]) > 50
    assert {one[3] for one in wanted["log"]["packets"]} == {"bfloat16"}
    assert [one[:2] for one in wanted["verified"]] == [[True, "log"], [True, "archive"]]
    assert len(wanted["with tokens"]["per_token"]) == 3
    assert wanted["datasets"][0]["reduced"].keys() >= {"mlp", "resid", "logits"}


def test_what_is_reduced_is_what_numpy_makes_of_the_packets(log: Path) -> None:
    with actstore.open_stream(log) as reader:
        packets = list(reader.packets("model.layers.1.mlp"))
    rows = [one.values.astype("float64").reshape(-1, one.shape[-1]) for one in packets]
    total = sum(one.sum() for one in rows) / sum(one.size for one in rows)
    with actstore.open_dataset(log) as dataset:
        found = dataset["mlp"].sel(layer=1)
        assert found.shape == (sum(map(len, rows)), rows[0].shape[1])
        assert float(found.astype("float64").mean()) == pytest.approx(total, rel=1e-12)
        assert float(found.max()) == max(one.max() for one in rows)


def test_capturing_says_that_torch_is_missing() -> None:
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import actstore\n"
        "config = actstore.InstrumentationConfig(actstore.HookGranularity.FULL_TENSOR)\n"
        "framework = actstore.InstrumentationFramework(config)\n"
        "try:\n"
        "    framework.instrument_model(object())\n"
        "except ImportError as error:\n"
        "    print(error.name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "torch\n"
