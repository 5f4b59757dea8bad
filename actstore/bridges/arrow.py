"""Owns Arrow and Parquet files, the only importer of pyarrow: arrays in, arrays out.

What SAELens makes of Arrow files is ``saelens``'s, what rows are written is ``exporting``'s. A
folder that SAELens reads is one that ``Dataset.save_to_disk`` of datasets 5.2.0 writes: the same
files, and the same schema, whose field metadata names the extension type ``Array2D``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from actstore.errors import ConfigError, FormatError

__all__ = ["SequenceWriter", "TableWriter", "batches"]

_DEEPEST: Final = 8
_ARRAY_2D: Final = "datasets.features.features.Array2DExtensionType"
_SPLIT: Final = (np.dtype("f4"), np.dtype("f8"))


def library(what: str) -> Any:
    """Give pyarrow.

    Raises
    ------
    ConfigError
        It isn't installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        msg = f"{what} needs the package pyarrow: pip install 'actstore[arrow]'"
        raise ConfigError(msg) from None
    return pa


# -- reading ------------------------------------------------------------------------------------


def batches(path: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """Read an Arrow stream, batch by batch; the file is mapped.

    Yields
    ------
    dict of str to numpy.ndarray
        Each column of numbers, or of nested lists of numbers that all have one length.

    Raises
    ------
    FormatError
        It is no such stream, is damaged, or compressed; lists differ in length; values are null.
    """
    pa = library(str(path))
    try:
        with pa.memory_map(str(path)) as source:
            _check_messages(pa.ipc.MessageReader.open_stream(source), path)
            source.seek(0)
            for batch in pa.ipc.open_stream(source):
                batch.validate(full=True)
                yield {
                    name: values
                    for name, column in zip(batch.schema.names, batch.columns, strict=True)
                    if (values := _regular(pa, column, f"{path}: {name!r:.80}")) is not None
                }
    except FormatError:
        raise
    except (pa.ArrowException, OSError, StopIteration, struct.error, ValueError) as error:
        msg = f"{path} is no whole Arrow stream: {error!s:.200}"
        raise FormatError(msg) from error


def _check_messages(messages: Iterable[Any], path: Path) -> None:
    """Refuse what is no schema and uncompressed record batches, before any of it is decoded."""
    wanted = "schema"
    for message in messages:
        compressed = wanted != "schema" and _is_compressed(bytes(message.metadata))
        if message.type != wanted or compressed:
            found = f"a compressed {message.type}" if compressed else f"a {message.type}"
            msg = f"{path}: wanted a schema, then uncompressed record batches; found {found}"
            raise FormatError(msg)
        wanted = "record batch"


def _is_compressed(metadata: bytes) -> bool:
    """Whether a record batch's buffers are compressed, which says nothing of what they become.

    The metadata is a flatbuffer (format/Message.fbs of Arrow): field 2 of ``Message`` is the
    header, a ``RecordBatch``, whose field 3 is the compression.
    """
    root = _offset(metadata, 0)
    header = _field(metadata, root, 2)
    return header is not None and _field(metadata, _offset(metadata, header), 3) is not None


def _offset(data: bytes, place: int) -> int:
    return place + int(struct.unpack_from("<I", data, place)[0])


def _field(data: bytes, table: int, number: int) -> int | None:
    """Give where a field of a flatbuffer's table is; None where it isn't there."""
    vtable = table - int(struct.unpack_from("<i", data, table)[0])
    size = int(struct.unpack_from("<H", data, vtable)[0])
    entry = 4 + 2 * number
    if vtable < 0 or entry + 2 > size:
        return None
    place = int(struct.unpack_from("<H", data, vtable + entry)[0])
    return table + place if place else None


def _regular(pa: Any, column: Any, where: str) -> NDArray[Any] | None:
    """Give a column as one array; None where it holds no numbers."""
    shape = [len(column)]
    for _ in range(_DEEPEST):
        column = getattr(column, "storage", column)
        kind = column.type
        if column.null_count:
            msg = f"{where} has nulls; wanted values throughout"
            raise FormatError(msg)
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        if not lists and not pa.types.is_fixed_size_list(kind):
            break
        if lists:
            lengths = np.diff(np.asarray(column.offsets))
            length = int(lengths[0]) if lengths.size else 0
            if (lengths != length).any():
                msg = f"{where} has lists of {lengths.min()} to {lengths.max()}; wanted one length"
                raise FormatError(msg)
        else:
            length = kind.list_size
        column = column.flatten()
        shape.append(length)
    plain = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not plain:
        return None
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    if values.size != np.prod(shape, dtype=object):
        msg = f"{where} has {values.size} values for the shape {tuple(shape)}"
        raise FormatError(msg)
    return values.reshape(shape)


# -- writing ------------------------------------------------------------------------------------


class SequenceWriter:
    """Writes a folder of sequences, as SAELens caches activations.

    Parameters
    ----------
    folder : Path
        A folder that is there and empty.
    column : str
        The hook.
    shape : (int, int)
        Context, features.
    dtype : numpy.dtype
        Of the values: float16, float32, float64.
    ids : bool
        There are token ids.
    """

    def __init__(
        self, folder: Path, column: str, shape: tuple[int, int], dtype: np.dtype, *, ids: bool
    ) -> None:
        self._pa = pa = library("exporting Arrow files")
        self._folder = folder
        self._shape = shape
        self._digest = hashlib.sha256()
        self._features: dict[str, Any] = {
            column: {"shape": list(shape), "dtype": dtype.name, "_type": "Array2D"}
        }
        said = {
            "ARROW:extension:name": _ARRAY_2D,
            "ARROW:extension:metadata": json.dumps([list(shape), dtype.name]),
        }
        values = pa.list_(pa.list_(pa.from_numpy_dtype(dtype)))
        fields = [pa.field(column, values, metadata=said)]
        if ids:
            value = {"dtype": "int32", "_type": "Value"}
            self._features["token_ids"] = {
                "feature": value,
                "length": shape[0],
                "_type": "Sequence",
            }
            fields.append(pa.field("token_ids", pa.list_(pa.int32(), shape[0])))
        about = json.dumps({"info": {"features": self._features}})
        self._schema = pa.schema(fields, metadata={"huggingface": about})
        self._name = "data-00000-of-00001.arrow"
        self._writer = pa.ipc.new_stream(str(folder / self._name), self._schema)

    def write(self, values: NDArray[Any], ids: NDArray[np.int32] | None) -> None:
        """Append sequences: values [n, context, features], ids [n, context]."""
        pa, (context, features) = self._pa, self._shape
        rows = len(values) * context
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        inner = pa.ListArray.from_arrays(_offsets(rows, features), flat)
        columns = [pa.ListArray.from_arrays(_offsets(len(values), context), inner)]
        self._digest.update(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
        if ids is not None:
            plain = np.ascontiguousarray(ids, np.int32)
            self._digest.update(plain.tobytes())
            flat_ids = pa.array(plain.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(flat_ids, context))
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def finish(self) -> None:
        """Write what stands beside the values."""
        self._writer.close()
        info = {
            "citation": "",
            "description": "",
            "features": self._features,
            "homepage": "",
            "license": "",
        }
        state: dict[str, Any] = {
            "_data_files": [{"filename": self._name}],
            "_fingerprint": self._digest.hexdigest()[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        for name, said in (("dataset_info.json", info), ("state.json", state)):
            (self._folder / name).write_text(json.dumps(said, indent=2), encoding="utf-8")


def _offsets(count: int, length: int) -> NDArray[np.int32]:
    return np.arange(0, count * length + 1, length, dtype=np.int32)


class TableWriter:
    """Writes a Parquet file, a row group at a time.

    Labels are dictionary-encoded; floats are split into byte planes (``BYTE_STREAM_SPLIT``),
    which zstd then finds the exponents in: the mantissa bytes that bfloat16 doesn't have cost
    nothing.

    Parameters
    ----------
    path : Path
        The file.
    labels : mapping of str to str
        Column -> "int64", "float64", "bool" or "string".
    features : mapping of str to (numpy.dtype, int)
        Column -> dtype and length of its lists.
    metadata : mapping of str to str
        Of the file.
    """

    def __init__(
        self,
        path: Path,
        labels: Mapping[str, str],
        features: Mapping[str, tuple[np.dtype, int]],
        metadata: Mapping[str, str],
    ) -> None:
        self._pa = pa = library("exporting Parquet files")
        kinds = {"bool": pa.bool_(), "string": pa.string()}
        fields = [
            pa.field(name, kinds[kind] if kind in kinds else pa.from_numpy_dtype(kind))
            for name, kind in labels.items()
        ]
        fields += [
            pa.field(name, pa.list_(pa.from_numpy_dtype(dtype), length))
            for name, (dtype, length) in features.items()
        ]
        self._schema = pa.schema(fields, metadata=dict(metadata))
        split = {
            f"{name}.list.element": "BYTE_STREAM_SPLIT"
            for name, (dtype, _) in features.items()
            if dtype in _SPLIT
        }
        self._writer = pa.parquet.ParquetWriter(
            str(path),
            self._schema,
            compression="zstd",
            use_dictionary=[name for name, kind in labels.items() if kind != "float64"],
            column_encoding=split or None,
        )

    def write(
        self,
        labels: Mapping[str, Sequence[Any] | NDArray[Any]],
        features: Mapping[str, tuple[NDArray[Any], NDArray[np.bool_] | None]],
    ) -> None:
        """Append a row group: labels, and values [rows, length], null where not present."""
        pa = self._pa
        columns = [
            pa.array(values, self._schema.field(name).type) for name, values in labels.items()
        ]
        for name, (values, present) in features.items():
            kind = self._schema.field(name).type
            flat = pa.array(np.ascontiguousarray(values).reshape(-1))
            mask = None if present is None else pa.array(~present)
            columns.append(pa.FixedSizeListArray.from_arrays(flat, type=kind, mask=mask))
        table = pa.Table.from_arrays(columns, schema=self._schema)
        self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def finish(self) -> None:
        """Write the footer."""
        self._writer.close()
