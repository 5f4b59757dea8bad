"""Owns the Croissant description of what is shared: JSON-LD by which tools find and load records.

By the format's specification 1.0, http://mlcommons.org/croissant/1.0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from actstore.sharing.card import About

__all__ = ["Resource", "Table", "describe"]

_CONTEXT: Final[dict[str, Any]] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
_TYPES: Final = {"b": "sc:Boolean", "i": "sc:Integer", "u": "sc:Integer", "f": "sc:Float"}


@dataclass(frozen=True, slots=True)
class Resource:
    """A file that is shared: its name within the folder, what it is, its size and its SHA-256."""

    name: str
    encoding: str
    nbytes: int
    sha256: str
    description: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table beside the archive: its file, and its columns' kinds as NumPy has them."""

    name: str
    file: str
    columns: Mapping[str, str]
    description: str


def describe(
    about: About,
    resources: Sequence[Resource],
    tables: Sequence[Table],
    published: str,
    folder: str | None,
) -> dict[str, Any]:
    """Give the description.

    Parameters
    ----------
    about : About
        What the sender says.
    resources : sequence of Resource
        The files, those of the archive's folder excepted.
    tables : sequence of Table
        Those of them that have records.
    published : str
        The day, as ISO 8601 has it.
    folder : str, optional
        The archive's folder, where it is one.
    """
    files = [
        {
            "@type": "cr:FileObject",
            "@id": one.name,
            "name": one.name,
            "description": one.description,
            "contentUrl": one.name,
            "contentSize": f"{one.nbytes} B",
            "encodingFormat": one.encoding,
            "sha256": one.sha256,
        }
        for one in resources
    ]
    chunks = {
        "@type": "cr:FileSet",
        "@id": "archive",
        "name": "archive",
        "description": "Zarr v3: metadata and shards of the activations.",
        "encodingFormat": "application/x-zarr",
        "includes": f"{folder}/**",
    }
    return {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "-", about.name).strip("-.") or "activations",
        "description": about.description or "Activations of a language model.",
        "datePublished": published,
        "version": "1.0.0",
        "distribution": [*files, *([chunks] if folder else [])],
        "recordSet": [_records(one) for one in tables],
        **({"license": _licence(about.licence)} if about.licence else {}),
        "citeAs": about.citation or f"{about.name}, {published}",
        **({"url": about.url} if about.url else {}),
        **(
            {"creator": [{"@type": "sc:Person", "name": one} for one in about.creators]}
            if about.creators
            else {}
        ),
    }


def _licence(given: str) -> str:
    known = re.fullmatch(r"[A-Za-z0-9.+-]+", given)
    return f"https://spdx.org/licenses/{given}.html" if known else given


def _records(table: Table) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": table.name,
        "name": table.name,
        "description": table.description,
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"{table.name}/{column}",
                "name": column,
                "dataType": _TYPES.get(kind, "sc:Text"),
                "source": {
                    "fileObject": {"@id": table.file},
                    "extract": {"jsonPath": f"$.'{column}'[*]"},
                },
            }
            for column, kind in table.columns.items()
        ],
    }
