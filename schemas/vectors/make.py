"""Write the test vectors of the `.stream` log, from `schemas/stream.md` with `struct` alone.

    python schemas/vectors/make.py [FOLDER]

writes `good/NAME.stream` and `bad/NAME.stream` under FOLDER (this file's own by default), each
with a `NAME.json` that says what a reader must return. The bytes are the same at every run, so
that the vectors are diffable: sync markers and encoded payloads are constants.

A JSON in `good` has `complete`, `layers`, `features`, `texts`, `tokens`, `passes`, and `packets`
in the order of capture, their values as the hexadecimal of their bytes (an alias has those that
it refers to). One in `bad` has `error`, the name of the class; `offset`, where the damage begins,
or null; `before`, the sequence numbers of the packets that a reader yields before it raises; and
`skip`, those of a reader that goes on behind damage, or null where nothing can be read.

Run it after any change to it, and commit what it writes; a test compares.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bad_logs import BAD
from good_logs import GOOD


def files() -> Iterator[tuple[str, bytes]]:
    """Give every file of the vectors: its path below the folder, and its bytes."""
    for name, (about, make_good) in GOOD.items():
        log = make_good()
        yield f"good/{name}.stream", bytes(log.data)
        yield f"good/{name}.json", pretty({"about": about} | log.expected)
    for name, (about, make_bad) in BAD.items():
        log = make_bad()
        yield f"bad/{name}.stream", bytes(log.data)
        yield (
            f"bad/{name}.json",
            pretty(
                {
                    "about": about,
                    "error": log.error,
                    "offset": log.offset,
                    "before": list(log.before),
                    "skip": None if log.skip is None else list(log.skip),
                }
            ),
        )


def pretty(value: Mapping[str, Any]) -> bytes:
    """Give JSON of a line for each member, and for each entry of a member that is an array."""
    members = []
    for name, member in value.items():
        text = json.dumps(member)
        if isinstance(member, list) and member and isinstance(member[0], dict):
            text = "[\n    " + ",\n    ".join(map(json.dumps, member)) + "\n  ]"
        members.append(f"  {json.dumps(name)}: {text}")
    return ("{\n" + ",\n".join(members) + "\n}\n").encode("ascii")


def main(folder: Path) -> None:
    """Write the vectors below a folder."""
    for path, data in files():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
