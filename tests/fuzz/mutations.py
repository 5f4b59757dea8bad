"""Changes of bytes that mean nothing, and of JSON documents."""

from __future__ import annotations

import json
from contextlib import suppress
from random import Random
from typing import Any, Final

INTEGERS: Final = (
    *(0, 1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 63, 64, 65, 127, 128, 255, 256, 4095, 4096),
    *(65534, 65535, 65536, 65537, 2**24 - 1, 2**24, 2**24 + 1, 2**30, 2**30 + 1, 2**31 - 1),
    *(2**31, 2**32 - 1, 2**32, 2**53 + 1, 2**57, 2**58, 2**61, 2**63 - 1, 2**63, 2**64 - 1),
)
TEXTS: Final = (
    *(
        "",
        "layer",
        "token",
        "resid",
        "logits",
        "attn_weights",
        "output",
        "mlp",
        "embed",
        "x" * 300,
    ),
    *("decoder_token", "encoder_token", "token_text", "is_padding", "feature", "vocab", "module"),
    *("\ud800", "\u0661", "../../etc", "a\x00b", "blosc", "pickle", "0", "1", "-1", "1e999", "İ"),
)
_ODD: Final = (
    *(b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"1.5", b"[]", b"{}", b"null", b"true"),
    *(b"9" * 400, b"9" * 5000, b"-1", b"1" + b"0" * 30, b'"\\ud800"', b"[[[]]]", b'[null,1,"a"]'),
    *(b"1e308", b'{"id":"blosc"}', b'{"id":null}', b'["blosc"]', b'{"id":{"id":"blosc"}}'),
    b'{"id":"blosc","cname":"../x","clevel":-1e99,"shuffle":[],"blocksize":18446744073709551616}',
)
_HOLE: Final = "\x01hole"
_PLACES: Final = 2_000


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Change bytes as if they meant nothing."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(7):
            case 0 if changed:
                changed[at % len(changed)] ^= 1 << rng.randrange(8)
            case 1 if changed:
                changed[at % len(changed)] = rng.choice((0, 1, 2, 0x7F, 0x80, 0xFF))
            case 2:
                size = rng.choice((1, 2, 4, 8))
                value = rng.choice(INTEGERS) % (1 << 8 * size)
                changed[at : at + size] = value.to_bytes(size, rng.choice(("little", "big")))
            case 3:
                del changed[at : at + rng.choice((1, 2, 8, 64, 1024))]
            case 4:
                changed[at:at] = rng.randbytes(rng.choice((1, 2, 8, 64)))
            case 5:
                start = rng.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + rng.choice((1, 8, 64, 1024))]
            case _:
                del changed[at:]
    return bytes(changed)


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Change a JSON document where it means something."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    places = _places(value)
    if not places or rng.randrange(12) == 0:
        return rng.choice(_ODD)
    put = _change(*rng.choice(places), places, rng)
    with suppress(ValueError, RecursionError):
        return json.dumps(value).encode().replace(json.dumps(_HOLE).encode(), put)
    return data


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Give where a document has values: what holds each, and its key there."""
    places: list[tuple[Any, Any]] = []
    waiting: list[Any] = [value] if isinstance(value, dict | list) else []
    while waiting and len(places) < _PLACES:
        one = waiting.pop()
        for key, member in one.items() if isinstance(one, dict) else enumerate(one):
            places.append((one, key))
            if isinstance(member, dict | list):
                waiting.append(member)
    return places


def _change(holder: Any, key: Any, places: list[tuple[Any, Any]], rng: Random) -> bytes:
    """Change a document in one place; give the JSON that goes where it has a hole then."""
    put = rng.choice(_ODD)
    match rng.randrange(8):
        case 0:
            del holder[key]
        case 1:
            other, name = rng.choice(places)
            with suppress(LookupError, RecursionError):
                put = json.dumps(other[name]).encode()
            holder[key] = _HOLE
        case 2 if isinstance(holder, dict):
            holder[rng.choice((*TEXTS, *map(str, INTEGERS), "9" * 5000))] = holder.pop(key)
        case 3:
            holder[key] = rng.choice((*TEXTS, *INTEGERS, *(-number for number in INTEGERS)))
        case 4 if rng.randrange(4) == 0:
            put, holder[key] = _deep(rng), _HOLE
        case 5 if isinstance(holder, list):
            holder[key:key] = [holder[key]] * rng.choice((1, 3, 100))
        case _:
            holder[key] = _HOLE
    return put


def _deep(rng: Random) -> bytes:
    depth = rng.choice((10, 300, 900, 990, 1200, 20_000))
    return (
        b'{"a":' * depth + b"1" + b"}" * depth if rng.randrange(2) else b"[" * depth + b"]" * depth
    )
