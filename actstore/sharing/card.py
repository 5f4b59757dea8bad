"""Owns the words about an archive that is shared: its data card, and hook points in words."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from actstore.archive.precision import EXACT, SCALE
from actstore.archive.root import arrays_of
from actstore.arguments import check_strings
from actstore.errors import ConfigError

__all__ = ["About", "card", "hook_point", "model_identity", "variables"]

#: Site -> what it is, of which a stack's sites (``encoder_…``) are like the same.
_POINTS: Final = {
    "embed": "output of the token embedding, as the first block is given it",
    "resid": "output of the block: the residual stream after its last addition, before the norm "
    "of the next block or the final norm",
    "attn": "output of the block's attention module, after its output projection, before it is "
    "added to the residual stream",
    "cross_attn": "output of the block's attention to the encoder, after its output projection, "
    "before it is added to the residual stream",
    "mlp": "output of the block's MLP or mixture of experts, before it is added to the residual "
    "stream",
    "final_norm": "output of the norm behind the last block: the residual stream after the norm",
    "logits": "output of the language-model head, before any softmax",
    "output": "the first tensor that the model returns",
}
_STACKS: Final = ("encoder_", "decoder_", "vision_")
_NORM: Final = re.compile(r"norm|(^|[._])ln(_|\d|$)", re.IGNORECASE)
#: What of a model's config is where it came from, and not what it is.
_INCIDENTAL: Final = ("_name_or_path", "transformers_version")


@dataclass(frozen=True, slots=True)
class About:
    """What the sender says of a data set.

    Attributes
    ----------
    name, description, licence, citation, url : str
        As told; the licence as SPDX names it (``"CC-BY-4.0"``).
    creators : sequence of str
        Names.

    Raises
    ------
    ConfigError
        A value is of another kind.
    """

    name: str
    description: str = ""
    licence: str = ""
    citation: str = ""
    url: str = ""
    creators: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("name", "description", "licence", "citation", "url"):
            if not isinstance(getattr(self, name), str):
                msg = f"{name} must be a str; got {getattr(self, name)!r}"
                raise ConfigError(msg)
        check_strings("creators", self.creators)


def hook_point(site: str) -> str:
    """Say in words where in a model a site is, before or after what."""
    stem, given, _ = site.partition("@in")
    stem, number, _ = stem.partition("#")
    stack = next((one for one in _STACKS if stem.startswith(one)), "")
    words = _POINTS.get(stem.removeprefix(stack)) or _POINTS.get(stem)
    if words is None or given or number:
        what = "what is given to" if given else "a further output of" if number else "output of"
        module = f"the modules of site {stem!r}" if words else f"the module {stem!r}"
        norm = " (a norm: after it)" if not given and _NORM.search(stem.rpartition(".")[2]) else ""
        return f"{what} {module}{norm}"
    return f"{words} ({stack[:-1]})" if stack else words


def model_identity(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give what tells the models of a run: class, name, size, and a hash of the configuration.

    The hash is the SHA-256 of the configuration as JSON with sorted keys and no spaces, without
    where it was loaded from and by which version.
    """
    found = []
    for model in run.get("models", []):
        config = model.get("config") or {}
        kept = {name: one for name, one in config.items() if name not in _INCIDENTAL}
        canonical = json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
        found.append(
            {
                "class": model.get("class"),
                "name": config.get("_name_or_path") or model.get("name"),
                "architecture": config.get("model_type"),
                "parameters": model.get("parameters"),
                "dtypes": model.get("dtypes"),
                "config_sha256": hashlib.sha256(canonical).hexdigest() if config else None,
            }
        )
    return found


def variables(root: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give a line for each array of values: what it holds, from where, and how exactly."""
    said = root["attributes"]
    errors = {
        name: layer["errors"]
        for name, layer in said["analysis"]["per_layer"].items()
        if "errors" in layer
    }
    found = []
    for name, one in arrays_of(root).items():
        attributes = one["attributes"]
        if "source_dtype" not in attributes:
            continue
        modules = attributes["modules"]
        named = [
            mine for mine in (modules.values() if isinstance(modules, dict) else modules) if mine
        ]
        nmse = [float(errors[mine]["nmse"]) for mine in named if mine in errors]
        worst = max(nmse, default=0.0)
        found.append(
            {
                "variable": name,
                "site": attributes["site"],
                "hook_point": hook_point(attributes["site"]),
                "modules": named,
                "dims": one["dimension_names"],
                "shape": one["shape"],
                "model_dtype": attributes["source_dtype"],
                "stored_dtype": one["data_type"],
                "precision": attributes.get("precision", "all"),
                "worst_nmse": worst,
            }
        )
    return found


def card(root: Mapping[str, Any], about: About, data: str, extra: Mapping[str, Any]) -> str:
    """Write the data card, as Markdown with the front matter that hubs read.

    Parameters
    ----------
    root : mapping
        The archive's root metadata, as it is shared.
    about : About
        What the sender says.
    data : str
        The file or folder that is the archive.
    extra : mapping
        ``files`` (hashes of the model's and the tokenizer's files by name) and ``tables`` (the
        tables beside the archive).
    """
    said = root["attributes"]
    lines = [
        "---",
        *(f"{key}: {json.dumps(one)}" for key, one in _front(about)),
        "---",
        "",
        f"# {about.name}",
        "",
        about.description or "Activations of a language model, every row knowing its token.",
        "",
        "## What it holds",
        "",
        *_table(
            ("variable", "what it is", "dimensions", "model's dtype", "stored as", "precision"),
            [
                (
                    f"`{one['variable']}`",
                    one["hook_point"],
                    " × ".join(
                        f"{dim} {size}"
                        for dim, size in zip(one["dims"], one["shape"], strict=True)
                    ),
                    one["model_dtype"],
                    one["stored_dtype"],
                    _precision(one),
                )
                for one in variables(root)
            ],
        ),
        "",
        *_aliases(said["aliases"]),
        *_rows(root, extra["tables"]),
        "## Which model, and how it was captured",
        "",
        *_model(said, extra["files"]),
        "## Opening it",
        "",
        *_opening(data),
        *_codes(root),
        "## Is it whole?",
        "",
        "`sha256sum -c SHA256SUMS` here; `actstore.verify` checks every chunk of the archive.",
        "",
        "## What was taken out",
        "",
        *_privacy(said["privacy"]),
        "## Licence and citation",
        "",
        about.licence or "No licence is given: ask the sender.",
        "",
        *((f"Made by {', '.join(about.creators)}.", "") if about.creators else ()),
        *(("```", about.citation, "```", "") if about.citation else ()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _front(about: About) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = [("pretty_name", about.name)]
    if about.licence:
        found.append(("license", about.licence.lower()))
    return [*found, ("tags", ["activations", "interpretability", "actstore"])]


def _precision(one: Mapping[str, Any]) -> str:
    if one["precision"] == "all":
        return "exact"
    return f"`{one['precision']}`, worst layer's NMSE {one['worst_nmse']:.1e}"


def _aliases(aliases: Mapping[str, str]) -> list[str]:
    if not aliases:
        return []
    told = ", ".join(f"`{name}` is `{other}`" for name, other in sorted(aliases.items()))
    return [f"The same tensors under other names are stored once: {told}.", ""]


def _rows(root: Mapping[str, Any], tables: Sequence[str]) -> list[str]:
    said = root["attributes"]
    rows = ", ".join(f"{count:,} on `{dim}`" for dim, count in said["rows"].items()) or "none"
    arrays, dims = arrays_of(root), said["rows"]
    own = [one for one in said["coordinates"].split() if arrays[one]["dimension_names"][0] in dims]
    labels = ", ".join(f"`{name}`" for name in own)
    beside = ", ".join(f"`{name}`" for name in tables)
    return [
        f"Rows: {rows}. Each is one token position of one batch item in one pass; its labels are "
        f"{labels}.",
        "`token_id` and `token_text` are the row's input token, `step` the generated token that "
        "it predicted (−1: none).",
        f"The labels are in {beside} too." if tables else "",
        "",
    ]


def _model(said: Mapping[str, Any], hashes: Mapping[str, str]) -> list[str]:
    lines = []
    for run in said["runs"]:
        for model in model_identity(run):
            dtypes = ", ".join(model["dtypes"] or ())
            size = f"{model['parameters']:,}" if model["parameters"] else "?"
            lines += [
                f"- `{model['class']}` ({model['name']}), {size} parameters in {dtypes or '?'}; "
                f"SHA-256 of its configuration: `{model['config_sha256'] or 'unknown'}`"
            ]
        capture = run.get("capture", {})
        told = ", ".join(f"{name} {one}" for name, one in capture.items() if one not in (None, ""))
        writer = run.get("writer", {})
        lines.append(
            f"- run `{run.get('run_id')}`, captured by {writer.get('name')} "
            f"{writer.get('version')}: {told}"
        )
    lines += [f"- `{name}`: SHA-256 `{one}`" for name, one in sorted(hashes.items())]
    writer = said["provenance"]["writer"]
    made = f"{writer['name']} {writer['version']}, {said['provenance']['created']}"
    precision = " → ".join(
        (
            "the model's own dtype, bit for bit, in the log",
            "bfloat16 and float8 as float32 of the same values",
            "the precision above, where it isn't exact",
            f"lossless chunks (profile {said['profile']!r})",
        )
    )
    return [*lines, f"- archive made by {made}; precision: {precision}", ""]


def _opening(data: str) -> list[str]:
    if data.endswith(".h5"):
        code = f'import xarray as xr\nds = xr.open_dataset("{data}", engine="h5netcdf")  # or h5py'
    elif data.endswith(".zip"):
        code = (
            "import xarray as xr, zarr\n"
            f'ds = xr.open_zarr(zarr.storage.ZipStore("{data}", mode="r"))'
        )
    else:
        code = f'import xarray as xr\nds = xr.open_zarr("{data}")'
    own = f'import actstore\nds = actstore.open_dataset("{data}")  # ds.actstore chooses rows'
    return ["```python", code, "```", "", "or, with actstore", "", "```python", own, "```", ""]


def _codes(root: Mapping[str, Any]) -> list[str]:
    """Say how what isn't stored as floats is read without actstore."""
    arrays = arrays_of(root)
    coded = {
        name: one["attributes"]["code_offset"]
        for name, one in arrays.items()
        if "code_offset" in one["attributes"]
    }
    exact = [name for name in arrays if f"{name}{EXACT}" in arrays]
    lines = []
    if coded:
        name, middle = next(iter(coded.items()))
        told = ", ".join(f"`{one}`" for one in coded)
        wide = arrays[name]["attributes"]["source_dtype"] == "float64"
        kind = "float64" if wide else "float32"
        lines += [
            f"{told} are codes, which actstore decodes. Without it, with `mask_and_scale=False`: "
            f"`(ds.{name}.astype('{kind}') - {middle}) * ds.{name}{SCALE}`, the offset being the "
            "attribute `code_offset`; the code 0 is no value.",
            "",
        ]
    if exact:
        whole = ", ".join(f"`{one}`" for one in exact)
        lines += [
            f"Of {whole} some chunks are kept whole: where the code is 0, or xarray gives NaN, "
            f"the value is in the array `…{EXACT}`.",
            "",
        ]
    return lines


def _privacy(said: Mapping[str, Any]) -> list[str]:
    dropped = ", ".join(map(repr, said["dropped_labels"])) or "none"
    return [
        f"Texts of tokens: {said['text']}. Ids of tokens: {said['token_ids']}. Labels left out: "
        f"{dropped}. Whoever has the model can tell the tokens from the activations of its "
        "embedding and first blocks, and whoever has the tokenizer the likely next ones from "
        "`logits`, whatever was taken out of the labels.",
        "",
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[one.replace("|", "\\|") for one in row] for row in rows]
    return [
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
        *(f"| {' | '.join(row)} |" for row in cells),
    ]
