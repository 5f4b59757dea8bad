"""The packets of a log as a table: what they are, told from the packets as they are read."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import actstore
from actstore.errors import MissingFileError, StreamCorruptError

sys.path.insert(0, str(Path(__file__).parent / "archive"))
from logs import LogBuilder, axis, decoder_log, random_values

LEGACY = Path(__file__).parents[1] / "schemas/vectors/legacy/zstd-tokens.stream"


def test_the_table_has_every_packet_in_the_order_of_capture(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    table = actstore.packet_table(log.path)
    assert table.packet_index.tolist() == list(range(len(log.fired)))
    assert table.layer_name.tolist() == [one.layer for one in log.fired]
    assert table.pass_index.tolist() == [one.pass_index for one in log.fired]
    assert table["shape"].tolist() == [one.values.shape for one in log.fired]
    assert table["dtype"].tolist() == [one.values.dtype.name for one in log.fired]
    with actstore.open_stream(log.path) as reader:
        for row, packet in zip(table.itertuples(), reader.packets(), strict=True):
            with np.errstate(invalid="ignore"):  # NaNs of any bits
                values = packet.values.astype("f8")
            assert row.l2_norm == pytest.approx(np.sqrt((values**2).sum()), nan_ok=True)
            assert row.mean == pytest.approx(values.mean(), nan_ok=True)
            assert row.std == pytest.approx(values.std(), nan_ok=True)
            assert row.max == pytest.approx(values.max(), nan_ok=True)
            assert row.min == pytest.approx(values.min(), nan_ok=True)
            assert row.sparsity == (values == 0).mean()


def test_bytes_are_those_that_analysis_counts_and_aliases_have_none(tmp_path: Path) -> None:
    log = decoder_log(tmp_path / "run.stream")
    table = actstore.packet_table(log.path, values=False)
    framework = actstore.InstrumentationFramework(actstore.InstrumentationConfig.balanced())
    said = framework.analyze_activations(log.path)
    assert table.compressed_bytes.sum() == said["total_compressed_bytes"]
    assert table.uncompressed_bytes.sum() == said["total_raw_bytes"]
    by_layer = table.groupby("layer_name").uncompressed_bytes.sum()
    assert all(by_layer[name] == one["raw_bytes"] for name, one in said["per_layer"].items())
    aliases = table[table.layer_name == ""]
    assert not aliases.uncompressed_bytes.any()
    assert aliases.compression_ratio.isna().all()
    assert "l2_norm" not in table


def test_a_packet_knows_the_token_that_its_pass_led_to(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    log.layer("h")
    for step, text in ((None, ""), (0, " a"), (1, " b")):
        log.begin(axis(1, 2))
        log.put("h", random_values((1, 2, 4)), parts=2)
        if step is not None:
            log.token(10 + step, text)
    log.begin(axis(1, 2))
    log.put("h", random_values((1, 2, 4)))
    table = actstore.packet_table(log.close())
    assert table.step.tolist()[:3] == [0, 0, 1]
    assert table.token_id.tolist()[:3] == [10, 10, 11]
    assert table.token_text.tolist()[:3] == [" a", " a", " b"]
    assert pd.isna(table.step[3])
    assert table.uncompressed_bytes.tolist() == [32] * 4


def test_complex_and_empty_packets_have_no_statistics(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "run.stream")
    for name, values in (("c", np.ones((1, 2), "c8")), ("e", np.ones((0, 2), "f4"))):
        log.layer(name)
        log.begin()
        log.put(name, values)
    table = actstore.packet_table(log.close())
    assert table[["l2_norm", "mean", "sparsity"]].isna().all(axis=None)


def test_a_log_without_packets_is_an_empty_table(tmp_path: Path) -> None:
    table = actstore.packet_table(LogBuilder(tmp_path / "run.stream").close())
    assert len(table) == 0
    assert {"layer_name", "step", "l2_norm"} <= {*table.columns}


def test_an_older_log_is_a_table_too() -> None:
    shapes = {"0": (1, -1, 16)}
    table = actstore.packet_table(LEGACY, shapes=shapes)
    assert table[table.layer_name == "0"]["shape"].map(len).tolist() == [3, 3, 3]
    assert np.isfinite(table.l2_norm).all()
    assert table.token_text.notna().any()


def test_what_is_no_whole_log_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        actstore.packet_table(tmp_path / "none.stream")
    path = decoder_log(tmp_path / "run.stream").path
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(StreamCorruptError):
        actstore.packet_table(path)
