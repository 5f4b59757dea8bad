"""Every vector of `schemas/vectors` is read as its JSON says, and is what make.py makes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actstore import errors
from actstore.stream.reader import StreamReader, open_stream

sys.path.insert(0, str(Path(__file__).parents[1]))
import independent_reader

VECTORS = Path(__file__).parents[2] / "schemas" / "vectors"
GOOD = sorted((VECTORS / "good").glob("*.stream"))
BAD = sorted((VECTORS / "bad").glob("*.stream"))


def expected(path: Path) -> dict[str, Any]:
    return json.loads(path.with_suffix(".json").read_text("ascii"))


def described(reader: StreamReader) -> dict[str, Any]:
    """Say what actstore made of a log, in the words of the vectors."""
    return {
        "complete": reader.complete,
        "layers": [
            {
                "id": info.id,
                "name": info.name,
                "site": info.site,
                "block": info.block,
                "class": info.kind,
            }
            for info in reader.layers.values()
        ],
        "features": {str(width): kept.tolist() for width, kept in reader.features.items()},
        "texts": {str(token_id): text for token_id, text in reader.token_texts.items()},
        "tokens": [
            {
                "step": token.step,
                "token_id": token.token_id,
                "position": token.position,
                "pass": token.pass_index,
                "time": token.time,
                "text": token.token_text,
            }
            for token in reader.tokens
        ],
        "passes": [
            {
                "index": info.index,
                "entry": info.entry,
                "logits_to_keep": info.logits_to_keep,
                "aborted": info.aborted,
                "annotations": dict(info.annotations),
                "axes": [
                    {
                        "name": axis.name,
                        "batch": axis.batch,
                        "sequence": axis.sequence,
                        "flat": axis.flat,
                        "positions": axis.positions.ravel().tolist(),
                        "ids": axis.token_ids.ravel().tolist(),
                        "mask": axis.mask.ravel().tolist(),
                    }
                    for axis in info.axes
                ],
            }
            for info in reader.passes
        ],
        "packets": [
            {
                "seq": packet.seq,
                "layer": packet.layer,
                "pass": packet.pass_index,
                "call": packet.call,
                "dtype": packet.values.dtype.name,
                "shape": list(packet.values.shape),
                "values": packet.values.tobytes().hex(),
            }
            for packet in reader.packets()
        ],
    }


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_actstore_reads_a_good_log_as_its_json_says(path: Path, policy: str) -> None:
    wanted = expected(path)
    del wanted["about"]
    for one in wanted["passes"]:  # a pass that nothing closed was cut off with its log
        one["aborted"] |= not one.pop("closed")
    with open_stream(path, errors=policy) as reader:
        assert described(reader) == wanted
        assert reader.damage == []


@pytest.mark.parametrize("path", GOOD, ids=lambda path: path.stem)
def test_the_independent_reader_reads_a_good_log_as_its_json_says(path: Path) -> None:
    found, wanted = independent_reader.read(path), expected(path)
    assert found["complete"] == wanted["complete"]
    layers = [{name: layer[name] for name in wanted["layers"][0]} for layer in found["layers"]]
    assert layers == wanted["layers"]
    for name in ("features", "texts"):
        assert {str(key): value for key, value in found[name].items()} == wanted[name]
    for token in found["tokens"]:
        token["position"] = None if token["position"] == -(2**63) else token["position"]
    for axis in (axis for one in found["passes"] for axis in one["axes"]):
        axis["flat"] = bool(axis["flat"])
    for packet in found["packets"]:
        packet["values"] = packet["bytes"].hex()
    for name in ("tokens", "passes", "packets"):
        assert len(found[name]) == len(wanted[name])
        for one, other in zip(found[name], wanted[name], strict=True):
            assert {key: one[key] for key in other if key != "axes"} == {
                key: value for key, value in other.items() if key != "axes"
            }
    for one, other in zip(found["passes"], wanted["passes"], strict=True):
        assert [{key: axis[key] for key in other["axes"][0]} for axis in one["axes"]] == other[
            "axes"
        ]


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_a_bad_log_raises_what_its_json_says_after_the_packets_before_it(path: Path) -> None:
    wanted, before = expected(path), []
    with pytest.raises(errors.ActstoreError) as caught, open_stream(path) as reader:
        before.extend(packet.seq for packet in reader.packets())
        assert reader.passes
    assert type(caught.value).__name__ == wanted["error"]
    assert getattr(caught.value, "offset", None) == wanted["offset"]
    assert before == wanted["before"]
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_going_on_behind_damage_gives_what_is_intact_and_lists_the_damage(path: Path) -> None:
    wanted = expected(path)
    if wanted["skip"] is None:
        with pytest.raises(getattr(errors, wanted["error"])):
            open_stream(path, errors="skip")
        return
    with open_stream(path, errors="skip") as reader:
        assert [packet.seq for packet in reader.packets()] == wanted["skip"]
        assert isinstance(reader.passes, tuple)
        assert [damage.offset for damage in reader.damage] == [wanted["offset"]]
        assert not reader.complete


def test_the_worked_example_of_the_specification_is_a_vector() -> None:
    text = (VECTORS.parent / "stream.md").read_text(encoding="utf-8")
    rows = re.findall(r"^[0-9a-f]{4}  ((?:[0-9a-f]{2} ?){1,16})", text, re.MULTILINE)
    shown = bytes.fromhex("".join(rows))
    assert shown == (VECTORS / "good/empty-closed.stream").read_bytes()


def test_the_vectors_are_what_make_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-B", VECTORS / "make.py", tmp_path], check=True, timeout=60)
    made = {path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")}
    kept = {
        path.relative_to(VECTORS) for kind in ("good", "bad") for path in VECTORS.glob(f"{kind}/*")
    }
    assert made == kept
    for path in sorted(made):
        assert (tmp_path / path).read_bytes() == (VECTORS / path).read_bytes(), path
