"""Owns texts to be fed to a model: read from lines of text or JSON, each with an id.

How they are fed is ``capture.feeding``'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from actstore.errors import FormatError

__all__ = ["Sample", "of_jsonl", "of_lines"]


@dataclass(frozen=True, slots=True)
class Sample:
    """A text, and what its rows are labelled by.

    Attributes
    ----------
    id : int or str
        The annotation ``sample_id``; the number of its line, from 1, where nothing else is said.
    text : str
        What is fed.
    """

    id: int | str
    text: str


def of_lines(lines: Iterable[str]) -> list[Sample]:
    """Make a sample of each line that is not blank."""
    return [
        Sample(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()
    ]


def of_jsonl(
    lines: Iterable[str], field: str = "text", id_field: str | None = None, name: str = "the file"
) -> list[Sample]:
    """Make a sample of each line that holds a JSON object.

    Parameters
    ----------
    lines : iterable of str
        The lines; blank ones are skipped.
    field : str
        Which of an object's fields is the text.
    id_field : str, optional
        Which is its id, a str or an int.
    name : str
        What errors call the file.

    Raises
    ------
    FormatError
        A line is no JSON object, or lacks a field; or several have one id.
    """
    found: dict[int | str, Sample] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        said = _object(line, f"{name}, line {number}")
        text = _field(said, field, (str,), f"{name}, line {number}")
        key = number
        if id_field is not None:
            key = _field(said, id_field, (str, int), f"{name}, line {number}")
        if key in found:
            msg = f"{name}, line {number}: the id {key!r} was there before; ids must differ"
            raise FormatError(msg)
        found[key] = Sample(key, text)
    if len({type(one) for one in found}) > 1:
        msg = f"{name}: the ids in {id_field!r} must be all texts or all integers"
        raise FormatError(msg)
    return list(found.values())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        msg = f"{where}: it is no JSON: {error}"
        raise FormatError(msg) from error
    if not isinstance(said, dict):
        msg = f"{where}: wanted a JSON object; found {line.strip()[:40]!r}"
        raise FormatError(msg)
    return said


def _field(said: dict[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    value = said.get(name)
    if not isinstance(value, kinds) or isinstance(value, bool):
        wanted = " or ".join(one.__name__ for one in kinds)
        msg = f"{where}: wanted {name!r}, a {wanted}; its fields are {', '.join(map(repr, said))}"
        raise FormatError(msg)
    return value
