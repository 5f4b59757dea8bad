"""Sharing: a folder that is whole, says what it is, and has nothing that was taken out."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import actstore
from actstore.errors import ArchiveError, ConfigError, MissingFileError
from actstore.sharing.card import hook_point

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, files_of, random_values

MODEL = Path(__file__).parents[1] / "examples/tiny-llama"
ABOUT = actstore.About(
    "A run: of tokens",
    description="What it is.",
    licence="CC-BY-4.0",
    citation="@misc{run}",
    creators=["A. Person"],
)
SECRET = "nobody must read this"


def archive_of(tmp_path: Path, **how: Any) -> Path:
    """Make an archive whose texts and labels can be looked for."""
    log = LogBuilder(tmp_path / "run.stream")
    for block in range(2):
        log.layer(f"h.{block}", "resid", block)
    log.layer("head", "logits")
    log.texts({100: SECRET, 101: SECRET, 102: "NA", 103: "null", 104: "12", 105: 'a "quote"\n'})
    for number in range(3):
        log.begin(axis(2, 3), annotations={"patient": ["Ann B.", "Carl D."], "fold": [number, 7]})
        for block in range(2):
            log.put(f"h.{block}", np.random.default_rng(number).standard_normal((2, 3, 40), "f4"))
        log.put("head", np.random.default_rng(number).standard_normal((2, 3, 16), "f4"))
        log.token(100, SECRET)
    actstore.compact(log.close(), tmp_path / "run.zarr", **how)
    return tmp_path / "run.zarr"


def everything(folder: Path) -> str:
    """Give all that is said in a folder: its files, and its arrays of labels, as text."""
    said = [data.decode("latin-1") for data in files_of(folder).values()]
    for group in ("", "tokens", "passes", "text"):
        with xr.open_zarr(
            folder / "run.zarr", group=group or None, consolidated=not group
        ) as held:
            for array in held.variables.values():
                raw = array.values
                said.append(repr(raw.tolist()) if raw.dtype != np.uint8 else bytes(raw).decode())
    return "\n".join(said)


def test_the_folder_has_the_archive_and_all_that_is_said_of_it(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    made = actstore.share(archive, tmp_path / "shared", about=ABOUT, model_folder=MODEL)
    names = sorted(one.name for one in made.path.iterdir())
    wanted = ["README.md", "SHA256SUMS", "croissant.json", "run.zarr", "tokens.json"]
    assert names == [*wanted, "variables.json"]
    assert made.files == len(files_of(made.path)) - 1
    with xr.open_zarr(made.data) as found, xr.open_zarr(archive) as source:
        xr.testing.assert_equal(found.compute(), source.compute())
    assert actstore.verify(made.data, against=tmp_path / "run.stream").ok
    card = (made.path / "README.md").read_text()
    for said in (ABOUT.name, "CC-BY-4.0", "@misc{run}", "A. Person", "`resid`", "sha256sum -c"):
        assert said in card
    config = hashlib.sha256((MODEL / "config.json").read_bytes()).hexdigest()
    assert config in card
    assert "model.safetensors" not in card
    assert str(tmp_path) not in everything(made.path)
    assert not [one for one in tmp_path.iterdir() if one.name.startswith(".shared")]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils are not there")
@pytest.mark.parametrize("container", ["zarr", "zarr.zip", "h5"])
def test_sha256sum_checks_every_file(tmp_path: Path, container: str) -> None:
    made = actstore.share(archive_of(tmp_path), tmp_path / "shared", container=container)
    call = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    found = subprocess.run(call, cwd=made.path, capture_output=True, text=True, check=True)
    assert found.stdout.count(": OK\n") == len(files_of(made.path)) - 1 == made.files
    path = made.path / "tokens.json"
    path.write_bytes(path.read_bytes() + b" ")
    assert subprocess.run(call, cwd=made.path, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("container", ["zarr", "zarr.zip", "h5"])
@pytest.mark.parametrize("precision", [None, {"resid": "nmse=2e-4"}])
def test_every_container_has_the_same_numbers(
    tmp_path: Path, container: str, precision: Any
) -> None:
    archive = archive_of(tmp_path, precision=precision)
    made = actstore.share(archive, tmp_path / "shared", container=container)
    with actstore.open_dataset(made.data) as found, actstore.open_dataset(archive) as source:
        xr.testing.assert_equal(found.compute(), source.compute())
    card = (made.path / "README.md").read_text()
    assert ("code_offset" in card) == (precision is not None)
    assert made.data.name in card


def test_a_log_is_compacted_on_the_way(tmp_path: Path) -> None:
    archive_of(tmp_path)
    made = actstore.share(tmp_path / "run.stream", tmp_path / "shared")
    with xr.open_zarr(made.data) as found, xr.open_zarr(tmp_path / "run.zarr") as source:
        xr.testing.assert_equal(found.compute(), source.compute())


# -- privacy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "privacy",
    [
        actstore.Privacy(drop_text=True, drop_labels=["patient"]),
        actstore.Privacy(hash_text="a key", drop_labels=["patient"]),
        actstore.Privacy(drop_text=True, drop_token_ids=True, drop_labels=["patient", "fold"]),
    ],
)
@pytest.mark.parametrize("profile", ["balanced", "none"])
def test_what_was_taken_out_is_nowhere(
    tmp_path: Path, privacy: actstore.Privacy, profile: str
) -> None:
    archive = archive_of(tmp_path, profile=profile)
    actstore.add_coordinates(archive, {"note": [SECRET] * 18})
    dropped = actstore.Privacy(
        privacy.drop_text,
        privacy.drop_token_ids,
        privacy.hash_text,
        [*privacy.drop_labels, "note"],
    )
    made = actstore.share(archive, tmp_path / "shared", privacy=dropped)
    assert SECRET in repr(xr.open_zarr(archive).token_text.values.tolist())
    said = everything(made.path)
    for gone in (SECRET, "Ann B.", "Carl D.", "a key"):
        assert gone not in said
    with xr.open_zarr(made.data) as found, xr.open_zarr(archive) as source:
        assert ("fold" in found.coords) == ("fold" not in privacy.drop_labels)
        xr.testing.assert_equal(
            found.resid.drop_vars(found.coords), source.resid.drop_vars(source.coords)
        )
        assert np.array_equal(found.position, source.position)
    assert actstore.verify(made.data).ok
    assert json.loads((made.data / "zarr.json").read_bytes())["attributes"]["privacy"] == {
        "text": "hashed" if privacy.hash_text else "dropped",
        "token_ids": "hashed"
        if privacy.hash_text
        else "dropped"
        if privacy.drop_token_ids
        else "kept",
        "dropped_labels": list(dropped.drop_labels),
    }


def test_hashes_tell_equal_tokens_and_no_more(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    keyed = [
        actstore.share(archive, tmp_path / name, privacy=actstore.Privacy(hash_text=key)).data
        for name, key in (("one", "k"), ("again", "k"), ("other", "l"))
    ]
    with xr.open_zarr(archive) as source:
        texts, ids = source.token_text.values, source.token_id.values
    found = [xr.open_zarr(one) for one in keyed]
    first = found[0].token_text.values
    assert np.array_equal(first, found[1].token_text.values)
    assert not np.any(first == found[2].token_text.values)
    for one, hashed in ((texts, first), (ids, found[0].token_id.values)):
        assert np.array_equal(
            one[:, np.newaxis] == one[np.newaxis], hashed[:, np.newaxis] == hashed[np.newaxis]
        )
    assert not {*found[0].token_id.values.tolist()} & {*ids.tolist()}
    assert found[0].token_id.values.max() < 2**53


def test_statistics_that_may_hold_texts_are_left_out_with_them(tmp_path: Path) -> None:
    from actstore.archive.adding import add_arrays
    from actstore.archive.coordinates import STRING, Coordinate

    archive = archive_of(tmp_path)
    label = Coordinate("group", ("group",), np.array([SECRET], STRING))
    add_arrays(archive, [label], group="statistics/by_text")
    kept = actstore.share(archive, tmp_path / "kept").data
    assert (kept / "statistics/by_text/group").is_dir()
    gone = actstore.share(archive, tmp_path / "gone", privacy=actstore.Privacy(drop_text=True))
    assert not (gone.data / "statistics").exists()
    assert SECRET not in everything(gone.path)
    assert actstore.verify(kept).ok
    assert actstore.verify(gone.data).ok


def test_what_leaves_is_listed_before_and_is_what_left(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    privacy = actstore.Privacy(hash_text="k", drop_labels=["fold"])
    before = files_of(archive)
    listed = actstore.what_leaves(archive, privacy=privacy)
    assert files_of(archive) == before
    made = actstore.share(archive, tmp_path / "shared", privacy=privacy)
    assert list(made.leaving) == listed
    kinds = [one.kind for one in listed]
    assert kinds[0] == "token text"
    assert {one.name for one in listed if one.kind == "your label"} == {"patient"}
    assert "Ann B." in next(one for one in listed if one.name == "patient").examples
    assert not any(SECRET in one.examples for one in listed)
    assert any(SECRET[:9] in one.examples for one in actstore.what_leaves(archive))
    with pytest.raises(ConfigError, match="no archive's folder: compact it first"):
        actstore.what_leaves(tmp_path / "run.stream")


def test_folders_of_the_senders_machine_stay_there(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    root = json.loads((archive / "zarr.json").read_bytes())
    from actstore.sharing.privacy import shared_attributes

    for path, wanted in (
        ("/home/ann/models/llama", "llama"),
        ("C:\\Users\\ann\\llama", "llama"),
        ("../llama", "llama"),
        ("~/llama", "llama"),
        ("a/b/c/llama", "llama"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
    ):
        root["attributes"]["runs"][0]["models"] = [{"config": {"_name_or_path": path}}]
        said = shared_attributes(root["attributes"], actstore.Privacy())
        assert said["runs"][0]["models"][0]["config"]["_name_or_path"] == wanted


# -- Croissant ----------------------------------------------------------------------------------


def test_croissant_names_files_that_are_there_by_their_hashes(tmp_path: Path) -> None:
    made = actstore.share(archive_of(tmp_path), tmp_path / "shared", about=ABOUT)
    said = json.loads((made.path / "croissant.json").read_bytes())
    assert said["name"] == "A-run-of-tokens"
    assert said["license"] == "https://spdx.org/licenses/CC-BY-4.0.html"
    for one in said["distribution"]:
        if one["@type"] == "cr:FileObject":
            data = (made.path / one["contentUrl"]).read_bytes()
            assert one["sha256"] == hashlib.sha256(data).hexdigest()
            assert one["contentSize"] == f"{len(data)} B"
        else:
            assert list(made.path.glob(one["includes"]))
    for records in said["recordSet"]:
        for field in records["field"]:
            table = json.loads((made.path / field["source"]["fileObject"]["@id"]).read_bytes())
            assert field["source"]["extract"]["jsonPath"] == f"$.'{field['name']}'[*]"
            assert field["name"] in table


def test_tables_have_the_labels_as_they_are(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    made = actstore.share(archive, tmp_path / "shared")
    table = json.loads((made.path / "tokens.json").read_bytes())
    with xr.open_zarr(archive) as source:
        for name, column in table.items():
            assert column == source[name].values.tolist()
        assert {"token_text", "patient", "fold"} <= table.keys()


def test_each_token_axis_has_a_table(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("encoder.0", "encoder_resid", 0)
    log.layer("decoder.0", "decoder_resid", 0)
    log.begin(axis(1, 5, name="encoder_token"), axis(1, 3, name="decoder_token"))
    log.put("encoder.0", random_values((1, 5, 8)))
    log.put("decoder.0", random_values((1, 3, 8)))
    made = actstore.share(log.close(), tmp_path / "shared")
    lengths = {
        name: len(json.loads((made.path / f"{name}.json").read_bytes())["position"])
        for name in ("encoder_tokens", "decoder_tokens")
    }
    assert lengths == {"encoder_tokens": 5, "decoder_tokens": 3}


# -- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("site", "said"),
    [
        ("resid", "after its last addition, before the norm"),
        ("attn", "after its output projection, before it is added"),
        ("encoder_mlp", "before it is added to the residual stream (encoder)"),
        ("final_norm", "the residual stream after the norm"),
        ("mlp@in", "what is given to the modules of site 'mlp'"),
        ("attn#1", "a further output of the modules of site 'attn'"),
        ("model.layers.input_layernorm", "(a norm: after it)"),
        ("transformer.h.ln_1", "(a norm: after it)"),
        ("model.layers.mlp.up_proj", "output of the module 'model.layers.mlp.up_proj'"),
    ],
)
def test_hook_points_are_told_in_words(site: str, said: str) -> None:
    assert said in hook_point(site)
    assert ("norm:" in hook_point("model.layers.mlp.up_proj")) is False


# -- what can't be ------------------------------------------------------------------------------


def test_a_damaged_archive_is_not_shared_and_nothing_is_left(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    path = next(one for one in (archive / "resid" / "c").rglob("*") if one.is_file())
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(ArchiveError, match="is damaged, and was not shared"):
        actstore.share(archive, tmp_path / "shared")
    path.unlink()
    with pytest.raises(ArchiveError):
        actstore.share(archive, tmp_path / "shared")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run.stream", "run.zarr"]


def test_bad_arguments_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"container": "tar"}, ConfigError, "container must be one of 'zarr', "),
        ({"hash_weights": True}, ConfigError, "hash_weights wants model_folder"),
        ({"model_folder": tmp_path / "none"}, ConfigError, "must be the folder of a model"),
        (
            {"privacy": actstore.Privacy(drop_labels=["token_id"])},
            ConfigError,
            "no label that can",
        ),
        ({"privacy": actstore.Privacy(drop_labels=["resid"])}, ConfigError, "'fold', 'patient'"),
        ({"about": {"name": "a"}}, ConfigError, "about must be an actstore.About"),
        ({"privacy": {}}, ConfigError, "privacy must be an actstore.Privacy"),
    ]
    for given, kind, said in wrong:
        with pytest.raises(kind, match=said):
            actstore.share(archive, tmp_path / "shared", **given)
    with pytest.raises(ConfigError, match=r"must be an actstore\.Privacy"):
        actstore.what_leaves(archive, privacy={})  # type: ignore[arg-type]
    with pytest.raises(MissingFileError):
        actstore.share(tmp_path / "none.zarr", tmp_path / "shared")
    with pytest.raises(ArchiveError, match="exists, and is not overwritten"):
        actstore.share(archive, archive)
    with pytest.raises(ConfigError, match="there is no folder"):
        actstore.share(archive, tmp_path / "none" / "shared")
    for key in ("", None):
        with pytest.raises(ConfigError, match="hash_text wants a key"):
            actstore.Privacy(drop_text=key is None, hash_text=key or ("k" if key is None else ""))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["run.stream", "run.zarr"]


def test_weights_are_hashed_on_request(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    made = actstore.share(log.path, tmp_path / "shared", model_folder=MODEL, hash_weights=True)
    weights = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    assert weights in (made.path / "README.md").read_text()


def test_what_names_something_outside_is_refused_and_nothing_is_made(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "key").write_text("secret")
    root = json.loads((archive / "zarr.json").read_bytes())
    below = root["consolidated_metadata"]["metadata"]
    before = sorted(one.name for one in tmp_path.iterdir())
    for name in ("../private", "../../private", "resid/../../private", "/private"):
        below[name] = below["resid"]
        (archive / "zarr.json").write_text(json.dumps(root))
        for made in (actstore.what_leaves, lambda one: actstore.share(one, tmp_path / "shared")):
            with pytest.raises(ArchiveError, match="names something outside of itself"):
                made(archive)
        del below[name]
    root["attributes"]["rows"]["../../planted"] = 0
    (archive / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(ArchiveError, match="has no dimension"):
        actstore.share(archive, tmp_path / "shared")
    assert sorted(one.name for one in tmp_path.iterdir()) == before


def test_links_are_refused_and_what_is_no_chunk_stays(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    (tmp_path / "key").write_text("secret")
    (archive / "resid" / "notes.txt").write_text("secret")
    (archive / "resid" / "c" / "notes.txt").write_text("secret")
    made = actstore.share(archive, tmp_path / "shared")
    assert not any("notes" in name for name in files_of(made.path))
    chunk = archive / "resid" / "c" / "9"
    chunk.symlink_to(tmp_path / "key")
    with pytest.raises(ArchiveError, match="is a link, or no file"):
        actstore.share(archive, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_ids_that_a_module_was_given_leave_with_the_ids(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("embed@in", "embed@in")
    log.layer("h")
    log.begin(axis(1, 6))
    log.put("embed@in", np.arange(100, 106)[np.newaxis])
    log.put("h", random_values((1, 6, 8)))
    actstore.compact(log.close(), tmp_path / "run.zarr")
    listed = actstore.what_leaves(tmp_path / "run.zarr")
    assert {one.name for one in listed if one.kind == "token ids"} >= {"embed_in", "token_id"}
    privacy = actstore.Privacy(drop_token_ids=True)
    made = actstore.share(tmp_path / "run.zarr", tmp_path / "shared", privacy=privacy)
    with xr.open_zarr(made.data) as found:
        assert "embed_in" not in found
        assert "h" in found
        assert (found.token_id == -1).all()
    assert actstore.verify(made.data).ok


def test_what_an_import_read_leaves_only_where_nothing_is_taken_out(tmp_path: Path) -> None:
    from actstore.sharing.privacy import shared_attributes

    root = json.loads((archive_of(tmp_path) / "zarr.json").read_bytes())["attributes"]
    said = {"kind": "folder", "files": [{"name": "patient_42.npy", "sha256": "00"}]}
    root["runs"][0]["imported"] = said
    root["runs"][0]["models"] = [{"config": {"text_config": {"_name_or_path": "/home/ann/x"}}}]
    kept = shared_attributes(root, actstore.Privacy())["runs"][0]
    assert kept["imported"] == said
    assert kept["models"][0]["config"]["text_config"]["_name_or_path"] == "x"
    privacy = actstore.Privacy(drop_text=True)
    assert shared_attributes(root, privacy)["runs"][0]["imported"] == {"kind": "folder"}
    assert "a key" not in repr(actstore.Privacy(hash_text="a key"))


def test_parts_of_codes_are_not_read_to_be_listed(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h")
    log.begin(axis(1, 6))
    log.put("h", np.full((1, 6, 40), np.inf, np.float32))
    actstore.compact(log.close(), tmp_path / "run.zarr", precision="nmse=1e-3")
    names = [one.name for one in actstore.what_leaves(tmp_path / "run.zarr")]
    assert "h" in names
    assert not any(name.startswith("h_") for name in names)


def test_labels_that_are_no_numbers_are_null_in_tables(tmp_path: Path) -> None:
    archive = archive_of(tmp_path)
    actstore.add_coordinates(archive, {"score": [np.inf, -np.inf, np.nan] + [0.5] * 15})
    made = actstore.share(archive, tmp_path / "shared")
    table = json.loads((made.path / "tokens.json").read_text(), parse_constant=pytest.fail)
    assert table["score"] == [None] * 3 + [0.5] * 15


@pytest.mark.parametrize("precision", ["nmse=1e-3", "mse=1e-3"])
def test_the_card_says_where_chunks_are_that_were_kept_whole(
    tmp_path: Path, precision: str
) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h")
    log.begin(axis(1, 6))
    log.put("h", np.full((1, 6, 40), np.inf))
    actstore.compact(log.close(), tmp_path / "run.zarr", precision=precision)
    made = actstore.share(tmp_path / "run.zarr", tmp_path / "shared")
    card = (made.path / "README.md").read_text()
    assert "Of `h` some chunks are kept whole" in card
    assert ("astype('float64')" in card) == precision.startswith("nmse")


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (actstore.About, {"name": "a", "creators": "Ada Lovelace"}, "creators must be a sequence"),
        (actstore.About, {"name": "a", "creators": [b"Ada"]}, "creators must be a sequence"),
        (actstore.About, {"name": 3}, "name must be a str; got 3"),
        (actstore.About, {"name": "a", "url": None}, "url must be a str; got None"),
        (actstore.Privacy, {"drop_labels": "patient"}, "drop_labels must be a sequence"),
        (actstore.Privacy, {"drop_text": "yes"}, "drop_text must be True or False"),
        (
            actstore.Privacy,
            {"hash_text": b"a key"},
            "hash_text must be a str, or None; got a bytes",
        ),
    ],
)
def test_words_of_another_kind_are_refused(kind: Any, options: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind(**options)
