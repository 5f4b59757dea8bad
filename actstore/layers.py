"""Owns which layers a dataset has, and which of them a name means; reads labels, and no values.

Choosing their rows is ``accessor.py``'s.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from actstore import hook_names

__all__ = ["Layer", "instead", "layers_of", "no_layer", "sites_meant"]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer of a dataset: where its rows are, its place on ``layer``, and its block or -1."""

    name: str
    variable: str
    axis: str
    site: str
    place: int
    block: int


def layers_of(dataset: xr.Dataset, axes: Collection[str]) -> list[Layer]:
    """Find the layers that have rows on token axes; first in the variable of the shortest name."""
    found = []
    for name in sorted(map(str, dataset.data_vars), key=len):
        variable = dataset.variables[name]
        modules, site = variable.attrs.get("modules"), str(variable.attrs.get("site"))
        if not isinstance(modules, list | tuple):  # of ragged values it is a mapping
            continue
        axis = next((str(dim) for dim in variable.dims if dim in axes), "")
        if "layer" not in variable.dims and len(modules) == 1:
            found.append(Layer(modules[0], name, axis, site, 0, -1))
            continue
        if "layer" not in dataset.coords:  # one was chosen, and which is forgotten
            continue
        blocks = np.atleast_1d(dataset["layer"].values)
        for place, module in enumerate(_modules_left(dataset, modules, blocks)):
            if module:
                found.append(Layer(module, name, axis, site, place, int(blocks[place])))
    return found


def _modules_left(
    dataset: xr.Dataset, modules: Sequence[str], blocks: NDArray[np.int64]
) -> Sequence[str]:
    """Give the modules of the places on ``layer`` that the dataset still has; "" for none."""
    if len(blocks) == len(modules) and np.all(np.diff(blocks) > 0):
        return modules
    found = [""] * len(blocks)
    for label in dataset.coords:  # places were chosen: a module is known by that of its block
        if str(label).endswith("module") and dataset[label].dims in ((), ("layer",)):
            heads = np.atleast_1d(dataset[label].values).tolist()
            for place, head in enumerate(map(str, heads)):
                inside = (one for one in modules if _is_within(one, head))
                found[place] = next(inside, found[place])
    return found


def _is_within(module: str, head: str) -> bool:
    """Whether a layer is a module, is inside it, or is another of its tensors (``name@in``)."""
    return bool(head) and module.startswith(head) and module[len(head) :][:1] in ("", *".@#")


def sites_meant(name: str, aliases: Mapping[str, str]) -> list[tuple[str, int]]:
    """Give the stored sites, and blocks or -1, that a name of no stored layer can mean."""
    named = hook_names.parse(name)
    if named is not None:
        site, block = named
        return [] if block is None else [(aliases.get(site, site), block)]
    site = name or "output"  # the root's
    found = [(aliases.get(site, site), -1)]
    parts = name.split(".")
    for place, part in enumerate(parts):
        site = ".".join(parts[:place] + parts[place + 1 :])
        if part.isdecimal() and site in aliases:
            found.append((aliases[site], int(part)))
    return found


def no_layer(dataset: xr.Dataset, name: str, known: list[str]) -> str:
    """Say where a layer is instead, or which are near."""
    if "*" in name:
        return (
            f"layer takes the name of one layer; got {name!r}: take a variable for all of a site"
        )
    for variable in map(str, dataset.data_vars):
        modules = dataset.variables[variable].attrs.get("modules")
        if isinstance(modules, Mapping) and name in modules.values():
            stem = variable.removesuffix("_values")
            return (
                f"the outputs of {name!r} are no rows of a token axis: they are one after the "
                f"other in {variable!r}, beginning at {stem}_offset, with {stem}_shape"
            )
    said = f"no layer {name!r}; {instead(name, known)}; actstore.layers has all {len(known)}"
    aliases = dataset.attrs.get("aliases")
    return f"{said}, and attrs['aliases'] the sites that others hold" if aliases else said


def instead(name: str, known: list[str]) -> str:
    """Say which names are near, or some that there are."""
    near = get_close_matches(name, known, n=5)
    said = ", ".join(map(repr, near or known[:5])) or "none"
    return f"near are {said}" if near else f"there are {said}{', …' if len(known) > 5 else ''}"
