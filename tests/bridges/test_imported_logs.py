"""What other tools wrote is imported bit for bit, every row with its token, whole or not at all.

``files/`` is made by ``make_fixtures.py``, which says by which package and version, and the
``.npz`` beside each is what the model gave, saved by NumPy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

import actstore
from actstore.bridges.importing import KINDS
from actstore.bridges.names import place_of
from actstore.errors import ConfigError, FormatError, MissingFileError

FILES = Path(__file__).parent / "files"
SAEV = "saev/saev/shards/5708761e"


def oracle(name: str) -> dict[str, NDArray[Any]]:
    with np.load(FILES / f"{name}.npz") as found:
        return dict(found)


def same(found: Any, wanted: NDArray[Any]) -> bool:
    """Whether values have the same bits, in the dtype of what is wanted."""
    values = np.asarray(found)
    return values.dtype == wanted.dtype and values.tobytes() == wanted.tobytes()


def packets_of(log: Path) -> dict[str, list[NDArray[Any]]]:
    found: dict[str, list[NDArray[Any]]] = {}
    with actstore.open_stream(log) as reader:
        assert reader.complete
        for packet in reader.packets():
            found.setdefault(packet.layer, []).append(packet.values)
    return found


# -- made by the packages themselves ------------------------------------------------------------


def test_vllm_requests_are_sequences_with_their_ids_and_the_layers_told(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    wanted = oracle("vllm")
    made = actstore.import_activations(FILES / "vllm", tmp_path / "a.stream", layers=[0, 2, 5])
    assert (made.kind, made.passes, made.rows) == ("vllm", 2, 9)
    assert made.layers == ("embed", "layers.1", "layers.4")
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert found.token_id.values.tolist() == [11, 12, 13, 14, 15, 16, 21, 22, 23]
        assert found.position.values.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2]
        assert found.request_id.values.tolist() == ["cmpl-0-0"] * 6 + ["cmpl-0-1"] * 3
        whole = np.concatenate([wanted["cmpl-0-0"], wanted["cmpl-0-1"]])
        assert same(found.embed, whole[:, 0])
        assert found.layer.values.tolist() == [1, 4]
        assert same(found.resid[0], whole[:, 1])
        assert same(found.resid[1], whole[:, 2])
        assert found.resid.attrs["source_dtype"] == "bfloat16"


def test_vllm_layers_that_were_not_told_are_numbered(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    made = actstore.import_activations(FILES / "vllm", tmp_path / "a.stream")
    assert made.layers == tuple(f"hidden_states.{number}" for number in range(3))
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert found.hidden_states.shape == (3, 9, 8)


def test_saelens_caches_are_sequences_with_their_ids(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    wanted = oracle("saelens")
    made = actstore.import_activations(FILES / "saelens", tmp_path / "a.stream")
    assert (made.kind, made.layers) == ("saelens", ("blocks.1.hook_resid_pre",))
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found.resid_in[0], wanted["values"].reshape(-1, 8))
        assert found.token_id.values.tolist() == wanted["ids"].ravel().tolist()
        assert found["sequence"].values.tolist() == np.repeat(np.arange(8), 6).tolist()
        assert found.position.values.tolist() == [*range(6)] * 8


def test_activault_hooks_of_a_group_are_rows_of_the_same_tokens(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    wanted = oracle("activault")
    groups = sorted(name.removeprefix("ids/") for name in wanted if name.startswith("ids/"))
    made = actstore.import_activations(FILES / "activault/tiny", tmp_path / "a.stream")
    assert made.layers == ("model.layers.1.mlp", "model.layers.1.self_attn@in")
    assert made.passes == len(groups) == 2
    with actstore.open_dataset(made.path, chunks=None) as found:
        ids = np.concatenate([wanted[f"ids/{group}"] for group in groups])
        assert found.token_id.values.tolist() == ids.ravel().tolist()
        assert found.group.values.tolist() == [group for group in groups for _ in range(16)]
        for name, hook in (("mlp", "mlp.post"), ("attn_in", "self_attn.pre")):
            parts = [wanted[f"models.layers.1.{hook}/{group}"] for group in groups]
            assert same(found[name][0], np.concatenate(parts).reshape(-1, 6))
            assert found[name].attrs["source_dtype"] == "bfloat16"


def test_activault_hooks_are_imported_alone_too(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    source = FILES / "activault/tiny/models.layers.1.mlp.post"
    made = actstore.import_activations(source, tmp_path / "a.stream")
    assert (made.kind, made.layers) == ("activault", ("model.layers.1.mlp",))


@pytest.mark.parametrize(
    ("source", "name", "layers"),
    [
        (SAEV, "saev", ["layers.1", "layers.3"]),
        ("saev_pypi", "saev_pypi", ["layers.-2", "layers.-1"]),
    ],
)
def test_saev_shards_are_examples_of_tokens(
    source: str, name: str, layers: list[str], tmp_path: Path
) -> None:
    wanted = oracle(name)["values"]
    made = actstore.import_activations(FILES / source, tmp_path / "a.stream")
    assert (made.kind, list(made.layers), made.rows) == ("saev", layers, 15)
    found = packets_of(made.path)
    for place, layer in enumerate(layers):
        assert same(np.concatenate(found[layer]), wanted[:, place].copy())
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.example.values.tolist() == np.repeat(np.arange(5), 3).tolist()
        assert (dataset.token_id.values == -1).all()


def test_a_cache_dict_of_transformer_lens_has_the_sites_of_a_capture(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    wanted = oracle("transformer_lens")
    tokens = wanted.pop("tokens")
    source = FILES / "transformer_lens.pt"
    made = actstore.import_activations(source, tmp_path / "a.stream", tokens=tokens)
    assert made.kind == "torch"
    assert set(made.layers) == set(wanted)
    found = packets_of(made.path)
    for name, values in wanted.items():
        assert same(found[name][0], values), name
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.token_id.values.tolist() == tokens.ravel().tolist()
        for site, name in (
            ("resid", "hook_resid_post"),
            ("resid_in", "hook_resid_pre"),
            ("mlp", "hook_mlp_out"),
            ("attn", "hook_attn_out"),
        ):
            stacked = np.stack([wanted[f"blocks.{block}.{name}"] for block in range(2)])
            assert same(dataset[site], stacked.reshape(2, 10, 8)), site
        assert same(dataset.embed, wanted["hook_embed"].reshape(10, 8))
        # heads are as many as batch items, and what is over heads is no row all the same
        assert dataset.attn_weights_values.size == dataset.attn_weights_scores_values.size == 200


# -- made by the libraries that define the layout -----------------------------------------------


def test_tensors_of_a_pt_that_share_memory_are_kept_once(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    given = {"blocks.0.hook_resid_post": values, "blocks.1.hook_resid_pre": values}
    torch.save(given, tmp_path / "a.pt")
    made = actstore.import_activations(tmp_path / "a.pt", tmp_path / "a.stream")
    assert made.raw_bytes == 48
    found = packets_of(made.path)
    wanted = np.arange(24).reshape(2, 3, 4).astype(ml_dtypes.bfloat16)
    assert same(found["blocks.0.hook_resid_post"][0], wanted)
    assert same(found["blocks.1.hook_resid_pre"][0], wanted)


def test_npy_files_are_layers_of_the_rows_that_their_ids_are_of(tmp_path: Path) -> None:
    source = tmp_path / "acts"
    (source / "blocks" / "0").mkdir(parents=True)
    generator = np.random.default_rng(0)
    resid = generator.normal(size=(2, 3, 4)).astype("f4")
    heads = generator.normal(size=(2, 3, 2, 5)).astype("f8")
    np.save(source / "blocks.3.hook_resid_post.npy", resid)
    np.save(source / "blocks" / "0" / "hook_q.npy", np.asfortranarray(heads))
    np.save(source / "token_ids.npy", np.arange(6).reshape(2, 3))
    np.save(source / "attention_mask.npy", np.array([[0, 1, 1], [1, 1, 1]]))
    made = actstore.import_activations(source, tmp_path / "a.stream")
    assert made.kind == "folder"
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found.resid.sel(layer=3), resid.reshape(6, 4))
        assert same(found["blocks.hook_q"].sel(layer=0), heads.reshape(6, 2, 5))
        assert found.token_id.values.tolist() == [*range(6)]
        assert found.is_padding.values.tolist() == [True] + [False] * 5


@pytest.mark.parametrize("dtype", ["bool", ">f4", "f2", "i8", "u1", "c8"])
def test_npy_files_without_ids_are_rows(dtype: str, tmp_path: Path) -> None:
    values = np.arange(12).reshape(6, 2).astype(dtype)
    np.save(tmp_path / "acts.npy", values)
    made = actstore.import_activations(
        tmp_path / "acts.npy", tmp_path / "a.stream", names={"acts": "model.layers.2.mlp"}
    )
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found.mlp[0], values.astype(values.dtype.newbyteorder("=")))
        assert found.position.values.tolist() == [*range(6)]


def test_large_arrays_come_piece_by_piece_and_positions_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.bridges.foreign.PACKET_BYTES", 64)
    monkeypatch.setattr("actstore.bridges.foreign.SEQUENCE_BYTES", 96)
    monkeypatch.setattr("actstore.bridges.log.GROUP_BYTES", 128)
    rows = np.arange(40, dtype="f4").reshape(20, 2)
    np.save(tmp_path / "rows.npy", rows)
    items = np.arange(120, dtype="f4").reshape(5, 12, 2)
    np.save(tmp_path / "items.npy", items[:, :3])
    made = actstore.import_activations(tmp_path / "rows.npy", tmp_path / "rows.stream")
    assert made.passes == 3
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found.rows, rows)
        assert found.position.values.tolist() == [*range(20)]
    made = actstore.import_activations(tmp_path / "items.npy", tmp_path / "items.stream")
    assert made.passes == 3  # of two, two and one item
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found["items"], items[:, :3].reshape(-1, 2))
        assert found["sequence"].values.tolist() == np.repeat(np.arange(5), 3).tolist()
    np.save(tmp_path / "long.npy", np.concatenate([items, items + 1], axis=1))
    made = actstore.import_activations(tmp_path / "long.npy", tmp_path / "long.stream")
    assert made.passes == 15  # a sequence is three
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert same(found.long, np.concatenate([items, items + 1], axis=1).reshape(-1, 2))
        assert found.position.values.tolist() == [*range(24)] * 5


def test_a_packet_larger_than_a_block_is_in_parts(tmp_path: Path) -> None:
    values = np.arange(5 << 20, dtype="f4").reshape(1, 5, -1)  # 20 MiB
    np.save(tmp_path / "acts.npy", values)
    made = actstore.import_activations(
        tmp_path / "acts.npy", tmp_path / "a.stream", compression="none"
    )
    assert actstore.verify(made.path).ok
    assert same(packets_of(made.path)["acts"][0], values)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float16"])
def test_safetensors_keep_their_dtype_exactly(dtype: str, tmp_path: Path) -> None:
    torch, library = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    bits = torch.arange(256, dtype=torch.int32)
    kind = getattr(torch, dtype)
    if kind.itemsize == 1:
        values = bits.to(torch.uint8).view(kind).reshape(4, 64)
    else:
        values = (bits * 257).to(torch.uint16).view(kind).reshape(4, 64)
    library.save_file(
        {"model.layers.0.mlp": values, "input_ids": torch.tensor([5, 6, 7, 8])},
        tmp_path / "acts.safetensors",
    )
    made = actstore.import_activations(tmp_path / "acts.safetensors", tmp_path / "a.stream")
    (found,) = packets_of(made.path)["model.layers.0.mlp"]
    assert found.dtype == getattr(ml_dtypes, dtype, np.dtype("f2"))
    assert found.tobytes() == values.view(torch.uint8).numpy().tobytes()
    with actstore.open_dataset(made.path, chunks=None) as dataset:
        assert dataset.token_id.values.tolist() == [5, 6, 7, 8]


def test_safetensors_of_the_same_names_are_passes_and_of_others_one(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    ones = np.ones((1, 3, 2), "f4")
    for folder, names in (("same", ("mlp", "mlp")), ("apart", ("mlp", "attn"))):
        (tmp_path / folder).mkdir()
        for number, name in zip((2, 10), names, strict=True):
            path = tmp_path / folder / f"part_{number}.safetensors"
            library.save_file({name: ones * number}, path)
        source = tmp_path / folder
        made = actstore.import_activations(source, tmp_path / f"{folder}.stream")
        assert made.passes == (2 if folder == "same" else 1)
    with actstore.open_dataset(tmp_path / "same.stream", chunks=None) as found:
        files = ["part_2.safetensors"] * 3 + ["part_10.safetensors"] * 3
        assert found.file.values.tolist() == files
        assert found["mlp"][:, 0].values.tolist() == [2.0] * 3 + [10.0] * 3
    with actstore.open_dataset(tmp_path / "apart.stream", chunks=None) as found:
        assert {"attn", "mlp"} <= set(found.data_vars)


# -- what every import promises -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "source", "package"),
    [
        ("vllm", "vllm", "safetensors"),
        ("saelens", "saelens", "pyarrow"),
        ("activault", "activault/tiny", "torch"),
        ("saev", SAEV, "numpy"),
        ("torch", "transformer_lens.pt", "torch"),
    ],
)
def test_an_archive_verifies_against_the_log_and_the_header_says_where_it_is_from(
    kind: str, source: str, package: str, tmp_path: Path
) -> None:
    pytest.importorskip(package)
    log = actstore.import_activations(FILES / source, tmp_path / "a.stream")
    made = actstore.import_activations(FILES / source, tmp_path / "a.zarr", kind=kind)
    assert made.kind == log.kind == kind
    assert actstore.verify(log.path).ok
    assert actstore.verify(made.path, against=[log.path]).ok
    with actstore.open_dataset(made.path, chunks=None) as found:
        (said,) = found.attrs["runs"]
    listed = said["imported"]["files"]
    root = FILES / source
    root = root if root.is_dir() else root.parent
    assert said["imported"]["kind"] == kind
    assert said["imported"]["file_count"] == len(listed) > 0
    for one in listed:
        data = (root / one["name"]).read_bytes()
        assert one["bytes"] == len(data)
        assert one["sha256"] == hashlib.sha256(data).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.stream", "a.zarr"]


def test_texts_come_from_a_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")

    class Tokenizer:
        def decode(self, ids: list[int]) -> str:
            return f"<{ids[0]}>"

    made = actstore.import_activations(
        FILES / "vllm", tmp_path / "a.stream", tokenizer=Tokenizer()
    )
    with actstore.open_dataset(made.path, chunks=None) as found:
        assert found.token_text.values.tolist()[-3:] == ["<21>", "<22>", "<23>"]


def test_what_fails_halfway_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source = tmp_path / "vllm"
    shutil.copytree(FILES / "vllm", source)
    (source / "cmpl-0-2.safetensors").write_bytes(b"\x00" * 64)
    for target in ("a.stream", "a.zarr"):
        with pytest.raises(FormatError, match="cmpl-0-2"):
            actstore.import_activations(source, tmp_path / target)
    assert [path.name for path in tmp_path.iterdir()] == ["vllm"]


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "a.stream"
    target.write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists"):
        actstore.import_activations(FILES / SAEV, target)
    assert target.read_bytes() == b"mine"


def test_what_can_not_be_honoured_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    source, target = FILES / "vllm", tmp_path / "a.stream"
    for wrong, said in (
        ({"layers": [1, 2]}, "3 layers"),
        ({"layers": [1, 1, 2]}, "different"),
        ({"layers": ["a", "b", "c"]}, "integer"),
        ({"kind": "vlm"}, "kind must be"),
        ({"tokens": [1, 2]}, "tokens"),
        ({"names": {"resid": "mlp"}}, "'resid'"),
        ({"names": {"hidden_states.0": 7}}, "both of them text"),
        ({"names": {"hidden_states.0": "hidden_states.1"}}, "would both be"),
        ({"tokens": [[1, 2], [3]]}, "tokens must be"),
        ({"compression": "zip"}, "compression"),
    ):
        with pytest.raises(ConfigError, match=said):
            actstore.import_activations(source, target, **wrong)
    with pytest.raises(ConfigError, match="layers"):
        actstore.import_activations(FILES / SAEV, target, layers=[1])
    with pytest.raises(ConfigError, match="must end with"):
        actstore.import_activations(source, tmp_path / "a.h5")
    with pytest.raises(ConfigError, match="none of the kinds"):
        actstore.import_activations(tmp_path, target)
    with pytest.raises(MissingFileError):
        actstore.import_activations(tmp_path / "none", target)
    assert not list(tmp_path.iterdir())


def test_a_request_that_vllm_still_writes_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    import fcntl

    source = tmp_path / "vllm"
    shutil.copytree(FILES / "vllm", source)
    with (source / "cmpl-0-1.safetensors.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="being written"):
            actstore.import_activations(source, tmp_path / "a.stream")
    actstore.import_activations(source, tmp_path / "a.stream")


def test_a_kind_is_found_as_the_table_says() -> None:
    pytest.importorskip("safetensors")
    for kind, source in (
        ("vllm", "vllm"),
        ("saelens", "saelens"),
        ("activault", "activault/tiny"),
        ("saev", SAEV),
        ("saev", "saev_pypi"),
        ("torch", "transformer_lens.pt"),
    ):
        found = [name for name, one in KINDS.items() if one.recognises(FILES / source)]
        assert found[0] == kind


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("blocks.3.hook_resid_post", ("resid", 3)),
        ("blocks.3.hook_resid_pre", ("resid@in", 3)),
        ("blocks.0.attn.hook_pattern", ("attn_weights", 0)),
        ("blocks.0.attn.hook_attn_scores", ("attn_weights_scores", 0)),
        ("blocks.12.attn.hook_q", ("blocks.attn.hook_q", 12)),
        ("hook_embed", ("embed", -1)),
        ("hook_pos_embed", ("hook_pos_embed", -1)),
        ("ln_final.hook_normalized", ("final_norm", -1)),
        ("model.layers.7", ("resid", 7)),
        ("model.layers.7.mlp", ("mlp", 7)),
        ("model.layers.7.mlp@in", ("mlp@in", 7)),
        ("model.layers.7.self_attn", ("attn", 7)),
        ("model.layers.7.mlp.down_proj", ("model.layers.mlp.down_proj", 7)),
        ("model.embed_tokens", ("embed", -1)),
        ("model.norm", ("final_norm", -1)),
        ("transformer.h.1.attn", ("attn", 1)),
        ("transformer.wte", ("embed", -1)),
        ("gpt_neox.layers.0.attention", ("attn", 0)),
        ("lm_head", ("logits", -1)),
        ("", ("output", -1)),
        ("model.encoder.layers.2.fc1", ("model.encoder.layers.fc1", 2)),
        ("layers.-2", ("layers.-2", -1)),
        ("layers.99999999999999999999", ("layers.99999999999999999999", -1)),
        ("7", ("7", -1)),
    ],
)
def test_names_are_the_sites_that_a_capture_gives(name: str, wanted: tuple[str, int]) -> None:
    assert place_of(name) == wanted


def test_json_of_a_log_that_was_imported_is_plain(tmp_path: Path) -> None:
    made = actstore.import_activations(FILES / SAEV, tmp_path / "a.stream")
    with actstore.open_stream(made.path) as reader:
        said = json.loads(json.dumps(dict(reader.header)))
    assert said["imported"]["about"]["family"] == "fake-clip"
    assert "data" not in said["imported"]["about"]  # a pickle: never looked into, nor passed on
