"""What is in memory is saved bit for bit: TransformerLens' and nnsight's caches, any mapping.

TransformerLens is in the test environment. nnsight is not: of its cache, ``files/nnsight.json``
has what the real one held (``make_fixtures.py``), given back by a class of the same shape; the
tests with the real package run where it is installed.
"""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import actstore
from actstore.errors import ConfigError

FILES = Path(__file__).parent / "files"
torch = pytest.importorskip("torch")


def packets_of(log: Path) -> dict[tuple[str, int, int], np.ndarray]:
    with actstore.open_stream(log) as reader:
        return {(one.layer, one.pass_index, one.call): one.values for one in reader.packets()}


def bits(values: Any) -> bytes:
    """Give a tensor's bytes by torch alone."""
    return values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- TransformerLens ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_of_transformer_lens_is_saved_bit_for_bit(dtype: str, tmp_path: Path) -> None:
    native = pytest.importorskip("transformer_lens.model_bridge.sources.native")
    settings = {"n_layers": 2, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4}
    settings |= {"d_mlp": 24, "d_vocab": 32, "act_fn": "gelu", "seed": 1}
    model = native.boot(settings).to(getattr(torch, dtype))
    tokens = torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    made = actstore.save_cache(cache, tmp_path / "a.stream", tokens=tokens)
    assert made.kind == "transformer_lens"
    assert set(made.layers) == set(cache.keys())
    found = packets_of(made.path)
    for name, tensor in cache.items():
        values = found[name, 0, 0]
        assert values.shape == tuple(tensor.shape)
        assert values.tobytes() == bits(tensor), name
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.token_id.values.tolist() == tokens.ravel().tolist()
        wanted = [cache["resid_post", block].reshape(10, 16) for block in range(2)]
        assert dataset.resid.attrs["source_dtype"] == dtype
        assert dataset.resid.values.tobytes() == torch.stack(wanted).float().numpy().tobytes()
    # what is the same memory in the cache is kept once
    assert made.raw_bytes < sum(one.numel() * one.element_size() for one in cache.values())


def test_a_cache_without_its_batch_dimension_is_rows(tmp_path: Path) -> None:
    native = pytest.importorskip("transformer_lens.model_bridge.sources.native")
    settings = {"n_layers": 1, "d_model": 16, "n_ctx": 8, "d_head": 4, "n_heads": 4}
    model = native.boot(settings | {"d_mlp": 24, "d_vocab": 32, "act_fn": "gelu", "seed": 1})
    tokens = torch.randint(0, 32, (1, 5))
    _, cache = model.run_with_cache(tokens)
    cache = cache.remove_batch_dim()
    made = actstore.save_cache(cache, tmp_path / "a.zarr", tokens=tokens[0])
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.sizes["token"] == 5
        assert dataset.token_id.values.tolist() == tokens[0].tolist()
        assert dataset.resid.values.tobytes() == bits(cache["resid_post", 0])


# -- nnsight ------------------------------------------------------------------------------------


class CacheView:
    """Stands for nnsight's class of this name: what of it is used, and no more."""

    def __init__(self, entries: dict[str, list[Any]], path: str | None = None) -> None:
        self._entries, self._path = entries, path

    def keys(self) -> list[str]:
        return list(self._entries)

    def __getitem__(self, path: str) -> CacheView:
        return CacheView({path: self._entries[path]}, path)

    def __len__(self) -> int:
        return len(self._entries[self._path])

    @property
    def output(self) -> Any:
        values = self._entries[self._path]
        return values[0] if len(values) == 1 else values

    @property
    def input(self) -> Any:
        return None if len(self) == 1 else [None] * len(self)


CacheView.__module__ = "nnsight.intervention.cache"


def tensors(said: Any) -> Any:
    """Give an entry of ``nnsight.json`` as the tensors that it was."""
    if isinstance(said, list):
        return tuple(map(tensors, said))
    if said is None:
        return None
    kind = getattr(torch, said["dtype"].removeprefix("torch."))
    return torch.tensor(said["values"]).reshape(said["shape"]).to(kind)


def recorded() -> dict[str, list[Any]]:
    said = json.loads((FILES / "nnsight.json").read_text())
    return {path: [tensors(one) for one in said["entries"][path]] for path in said["keys"]}


def test_a_cache_of_nnsight_has_the_names_of_the_modules(tmp_path: Path) -> None:
    with np.load(FILES / "nnsight.npz") as file:
        wanted = dict(file)
    ids = wanted.pop("ids")
    made = actstore.save_cache(CacheView(recorded()), tmp_path / "a.stream", tokens=ids)
    assert made.kind == "nnsight"
    assert set(made.layers) == set(wanted)
    for (name, _, _), values in packets_of(made.path).items():
        assert values.dtype == ml_dtypes.bfloat16
        assert values.astype("f4").tobytes() == wanted[name].tobytes(), name
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.token_id.values.tolist() == ids.ravel().tolist()
        stacked = np.stack([wanted[f"layers.{block}"] for block in range(2)])
        assert dataset.resid.values.tobytes() == stacked.tobytes()
        assert dataset["mlp"].shape == (2, 10, 4)
        assert dataset.embed.values.tobytes() == wanted["embed"].tobytes()


def test_visits_of_nnsight_are_passes_and_positions_go_on(tmp_path: Path) -> None:
    prompt, step = torch.ones(2, 3, 4), torch.ones(2, 1, 4)
    visits = [prompt, step * 2, step * 3]
    twice = [one * factor for one in visits for factor in (10, 20)]
    modules = {"model.layers.0": visits, "model.layers.1": visits, "model.layers.1.mlp": twice}
    some = {"model.generator": [torch.zeros(2, 6)], "model.layers.1.experts.0": [step, step]}
    cache = CacheView(modules | some)
    tokens = torch.arange(12).reshape(2, 6)  # the last of them was made, and not fed
    made = actstore.save_cache(cache, tmp_path / "a.stream", tokens=tokens)
    assert made.passes == 4
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert found.token_id.values.tolist() == [0, 1, 2, 6, 7, 8, 3, 9, 4, 10]
        assert found.position.values.tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 4]
        assert found.resid.sel(layer=0)[:, 0].values.tolist() == [1.0] * 6 + [2, 2, 3, 3]
        # which passes the visits of these were in can't be told: they are no rows
        assert found["layers.experts.0_values"].size == found["generator_values"].size + 4 == 16
    found = packets_of(made.path)
    assert found["layers.1.experts.0", 3, 1].shape == (2, 1, 4)
    assert found["layers.1.mlp", 1, 0][0, 0, 0] == 20
    assert found["layers.1.mlp", 1, 1][0, 0, 0] == 40


def test_the_real_nnsight_gives_what_the_recorded_one_held(tmp_path: Path) -> None:
    nnsight = pytest.importorskip("nnsight")
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    given = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    with nnsight.NNsight(model).trace(given) as tracer:
        cache = tracer.cache(include_inputs=True).save()
    made = actstore.save_cache(cache, tmp_path / "a.stream")
    found = packets_of(made.path)
    first = model[0](given)
    assert found["0", 0, 0].tobytes() == bits(first)
    assert found["1@in", 0, 0].tobytes() == bits(first)
    assert found["", 0, 0].tobytes() == bits(model[1](first))


# -- any mapping --------------------------------------------------------------------------------


def test_a_mapping_of_anything_is_saved(tmp_path: Path) -> None:
    base = torch.arange(24, dtype=torch.float32).reshape(1, 6, 4)
    output = types.SimpleNamespace(to_tuple=tuple, values=lambda: [None, base + 1])
    cache = {
        "layers.0": base,
        "layers.1": base[:, :, :],  # the same memory
        "layers.0.mlp": base.transpose(0, 1).contiguous().transpose(0, 1),
        "layers.1.mlp": (output, "more"),
        "layers.0.self_attn": base.numpy().astype(ml_dtypes.bfloat16),
        "nothing": None,
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "conjugated": torch.complex(base, base).conj(),
        "bools": base > 3,
    }
    made = actstore.save_cache(
        cache,
        tmp_path / "a.stream",
        tokens=[[1, 2, 3, 4, 5, 6]],
        mask=[[0, 1, 1, 1, 1, 1]],
        annotations={"topic": ["sets"]},
    )
    found = packets_of(made.path)
    assert found["layers.1", 0, 0].tobytes() == base.numpy().tobytes()
    assert found["layers.1.mlp", 0, 0].tobytes() == (base + 1).numpy().tobytes()
    assert found["layers.0.mlp", 0, 0].tobytes() == base.numpy().tobytes()
    assert found["scalar", 0, 0] == 2.5
    assert found["conjugated", 0, 0].tobytes() == torch.complex(base, -base).numpy().tobytes()
    assert found["bools", 0, 0].tolist() == (base > 3).tolist()
    assert "nothing" not in made.layers
    with actstore.open_stream(made.path) as reader:
        aliases = {one.name: one.id for one in reader.layers.values()}
        row = int(np.flatnonzero(reader.table.layer == aliases["layers.1"])[0])
        assert reader.table.nbytes[row] == 0
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.topic.values.tolist() == ["sets"] * 6
        assert dataset.is_padding.values.tolist() == [True] + [False] * 5


def test_what_can_not_be_saved_is_refused_by_name(tmp_path: Path) -> None:
    target = tmp_path / "a.stream"
    rows = torch.zeros(2, 3, 4)
    for cache, options, said in (
        ([rows], {}, "takes TransformerLens"),
        ({"a": "text"}, {}, "'a'"),
        ({"a": rows.to_sparse()}, {}, "dense"),
        ({"a": rows.to("meta")}, {}, "'a'"),
        ({"a": np.array(["x"])}, {}, "'a'"),
        ({"a": rows}, {"tokens": [[1, 2]]}, "token ids"),
        ({"a": rows}, {"tokens": [0.5]}, "integers"),
        ({"a": rows}, {"mask": np.ones((2, 3))}, "mask"),
        ({"a": rows}, {"annotations": {"x": ["one"]}}, "'x'"),
        ({"a": rows}, {"names": {"b": "c"}}, "'b'"),
    ):
        with pytest.raises(ConfigError, match=said):
            actstore.save_cache(cache, target, **options)
    with pytest.raises(actstore.ActstoreError, match="no activations"):
        actstore.save_cache({}, target)
    assert not list(tmp_path.iterdir())
