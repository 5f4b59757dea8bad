"""Owns what a capture would take, told before it runs: which modules, and how many bytes.

The estimate is a capture of one small forward, measured; nothing is modelled.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from actstore import codecs, markup
from actstore.capture.select import Target, find_stacks, fused_experts, select, unwrap
from actstore.capture.session import Capture, Instrumented, Options
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ConfigError
from actstore.packet import Packet
from actstore.stream.reader import StreamReader, open_stream

__all__ = ["Description", "Estimate", "describe", "estimate", "suggest_config"]

Bytes = NDArray[np.uint8]

_SAMPLE_TOKENS: Final = 64
_PIECE: Final = 1 << 20
_NAMED: Final = 6


@dataclass(frozen=True, slots=True)
class Description:
    """What each granularity would capture of a model; ``str()`` of it is a table.

    Attributes
    ----------
    model, architecture : str
        The model's class, and what its configuration calls its kind (``"llama"``); ``"unknown"``
        where there is none.
    stacks : mapping of str to int
        The lists of blocks by name, and the blocks in each.
    layers : mapping of str to tuple of str
        Granularity -> the names of the layers.
    sites : mapping of str to str
        Site -> the name of its module, ``{}`` for the index of a block.
    fused : tuple of str
        Modules that hold their experts in one tensor: no hook sees an expert's own output.
    attention : str or None
        The attention implementation, where the model has one; only ``"eager"`` has weights.
    """

    model: str
    architecture: str
    stacks: Mapping[str, int]
    layers: Mapping[str, tuple[str, ...]]
    sites: Mapping[str, str]
    fused: tuple[str, ...]
    attention: str | None

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        told = markup.facts(
            self.model,
            [
                ("architecture", self.architecture),
                ("blocks", dict(self.stacks)),
                ("attention", self.attention),
                ("experts fused in one tensor", self.fused[:_NAMED]),
                *((f"layers of {name}", len(names)) for name, names in self.layers.items()),
            ],
        )
        rows = [
            (site, pattern or "(the model)",
             *(sum(_matches(name, pattern) for name in names) for names in self.layers.values()))
            for site, pattern in self.sites.items()
        ]  # fmt: skip
        return told + markup.table("Sites", ("site", "module", *self.layers), rows)

    def __str__(self) -> str:
        """Give the table."""
        stacks = ", ".join(f"{count} blocks at {path!r}" for path, count in self.stacks.items())
        heads = ["site", "module", *(name for name in self.layers)]
        rows = [heads]
        for site, pattern in self.sites.items():
            marks = []
            for names in self.layers.values():
                count = sum(_matches(name, pattern) for name in names)
                marks.append(str(count) if count else "")
            rows.append([site, pattern or "(the model)", *marks])
        rows.append(["all", "", *(str(len(names)) for names in self.layers.values())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        kind = "" if self.architecture == "unknown" else f" ({self.architecture})"
        lines = [f"{self.model}{kind}: {stacks or 'no stack of blocks'}"]
        for row in rows:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  ".join(cells).rstrip())
        if self.attention not in (None, "eager"):
            lines.append(f"attention weights: not computed by {self.attention!r} attention")
        if self.fused:
            shown = ", ".join(self.fused[:_NAMED]) + (", …" if len(self.fused) > _NAMED else "")
            lines.append(f"experts fused in one tensor, not captured one by one: {shown}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a capture would write, measured on a small forward; ``str()`` of it is a table.

    Attributes
    ----------
    layers : int
        Layers that fired.
    packets_per_pass : float
        Packets of one pass.
    bytes_per_token : float
        Raw bytes of each row of a token axis.
    bytes_per_pass : float
        Raw bytes of what is over no token axis, each pass.
    ratios : mapping of str to float
        Codec -> raw bytes over encoded bytes, of the values of that forward.
    """

    layers: int
    packets_per_pass: float
    bytes_per_token: float
    bytes_per_pass: float
    ratios: Mapping[str, float]

    def bytes(self, tokens: int, codec: str = "none", passes: int = 1) -> float:
        """Give the bytes of so many tokens in so many passes, by a codec.

        Raises
        ------
        ConfigError
            There is no such codec.
        """
        codecs.check_name(codec)
        raw = self.bytes_per_token * tokens + self.bytes_per_pass * passes
        return raw / self.ratios[codec]

    def _repr_html_(self) -> str:
        """Give what a notebook shows."""
        told = markup.facts(
            "What a capture would write",
            [
                ("layers", self.layers),
                ("packets a pass", self.packets_per_pass),
                ("bytes a token", _size(self.bytes_per_token)),
                ("bytes a pass, beside", _size(self.bytes_per_pass)),
            ],
        )
        heads = ("tokens", *(f"{name} ({ratio:.2f}x)" for name, ratio in self.ratios.items()))
        rows = [
            (tokens, *(_size(self.bytes(tokens, name)) for name in self.ratios))
            for tokens in (1_000, 1_000_000, 1_000_000_000)
        ]
        return told + markup.table("By codec", heads, rows)

    def __str__(self) -> str:
        """Give the table."""
        lines = [
            f"{self.layers} layers, {self.packets_per_pass:.0f} packets a pass, "
            f"{_size(self.bytes_per_token)} a token, {_size(self.bytes_per_pass)} a pass beside",
            f"{'tokens':>12}" + "".join(f"{f'{name} ({ratio:.2f}x)':>16}"
                                        for name, ratio in self.ratios.items()),
        ]  # fmt: skip
        for tokens in (1_000, 1_000_000, 1_000_000_000):
            sizes = (_size(self.bytes(tokens, name)) for name in self.ratios)
            lines.append(f"{tokens:>12,}" + "".join(f"{size:>16}" for size in sizes))
        return "\n".join(lines)


def describe(model: nn.Module, hooks: HookConfig | None = None) -> Description:
    """Say what each granularity would capture of a model, without running it.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a wrapper of it.
    hooks : HookConfig, optional
        As for ``instrument_model``.

    Returns
    -------
    Description
        Print it.
    """
    _check_model(model, "describe")
    inner, hooks = unwrap(model), hooks or HookConfig()
    found: dict[str, list[Target]] = {}
    for granularity in HookGranularity:
        try:
            found[granularity.name] = select(inner, granularity, hooks)
        except ConfigError:
            found[granularity.name] = []
    config = getattr(inner, "config", None)
    return Description(
        type(inner).__name__,
        str(getattr(config, "model_type", None) or "unknown"),
        {stack.path: len(stack.blocks) for stack in find_stacks(inner)},
        {name: tuple(one.name for one in targets) for name, targets in found.items()},
        _patterns(found[HookGranularity.FULL_TENSOR.name]),
        tuple(fused_experts(inner)),
        getattr(config, "_attn_implementation", None),
    )


def suggest_config(model: nn.Module, purpose: str = "interpretability") -> InstrumentationConfig:
    """Suggest a config for a model, by what it has and what the capture is for.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a wrapper of it.
    purpose : {"interpretability", "debugging", "performance_analysis", "full_capture"}
        One module a block: its attention, else its MLP, where there are blocks; all modules, raw;
        all modules, small; all modules.

    Returns
    -------
    InstrumentationConfig
        To be changed with its ``with_…`` methods.

    Raises
    ------
    ConfigError
        There is no such purpose.
    """
    _check_model(model, "suggest_config")
    all_modules = {
        "debugging": InstrumentationConfig.fast_capture,
        "performance_analysis": InstrumentationConfig.max_compression,
        "full_capture": InstrumentationConfig.balanced,
    }
    if purpose in all_modules:
        return all_modules[purpose]()
    if purpose != "interpretability":
        wanted = ", ".join(map(repr, ("interpretability", *all_modules)))
        msg = f"purpose must be one of {wanted}; got {purpose!r}"
        raise ConfigError(msg)
    layers = describe(model).layers
    if layers[HookGranularity.ATTENTION_ONLY.name]:
        return InstrumentationConfig.attention_analysis()
    if layers[HookGranularity.MLP_ONLY.name]:
        return InstrumentationConfig.mlp_analysis()
    return InstrumentationConfig.balanced()


def _patterns(targets: Sequence[Target]) -> dict[str, str]:
    """Give each site the name of its modules, with ``{}`` for the block's index."""
    by_site: dict[str, list[Target]] = {}
    for one in targets:
        by_site.setdefault(one.site, []).append(one)
    found = {}
    for site, mine in by_site.items():
        names = [(one.name.split("."), one.block) for one in mine]
        first, block = names[0]
        places = [
            place
            for place, part in enumerate(first)
            if part == str(block)
            and all(place < len(name) and name[place] == str(index) for name, index in names)
        ]
        parts = list(first)
        if places and len(names) > 1:
            parts[places[0]] = "{}"
        found[site] = ".".join(parts)
    return found


def _matches(name: str, pattern: str) -> bool:
    head, gap, tail = pattern.partition("{}")
    if not gap:
        return name == pattern
    middle = name[len(head) : len(name) - len(tail) if tail else None]
    return name.startswith(head) and name.endswith(tail) and middle.isdecimal()


def estimate(
    model: nn.Module,
    granularity: HookGranularity = HookGranularity.FULL_TENSOR,
    hooks: HookConfig | None = None,
    inputs: Mapping[str, Any] | Tensor | None = None,
) -> Estimate:
    """Measure what a capture would write, by capturing one small forward.

    Parameters
    ----------
    model : torch.nn.Module
        The model, or a wrapper of it. It is run once, in the mode that it is in, without
        gradients.
    granularity, hooks
        As for the capture.
    inputs : mapping or torch.Tensor, optional
        What to feed it: keyword arguments, or the one argument. By default 64 random token ids.
        Ratios are those of these inputs: give real ones.

    Returns
    -------
    Estimate
        Print it.

    Raises
    ------
    ConfigError
        The model has no vocabulary to draw from, and no inputs are given.
    """
    _check_model(model, "estimate")
    inner = unwrap(model)
    given = _inputs(inner) if inputs is None else inputs
    config = InstrumentationConfig(granularity, "none", target_throughput_gbps=1e-9)
    one = Instrumented(inner, hooks or HookConfig(), None, "model", model)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "estimate.stream"
        with torch.no_grad(), Capture([one], config, log, Options(), warns=False):
            model(**given) if isinstance(given, Mapping) else model(given)
        with open_stream(log) as reader:
            return _measure(reader)


def _measure(reader: StreamReader) -> Estimate:
    rows = {info.index: {one.name: one for one in info.axes} for info in reader.passes}
    tokens = max((axis.rows for axes in rows.values() for axis in axes.values()), default=0)
    of_tokens = others = count = 0
    sites: dict[tuple[str, int], list[Bytes]] = {}
    aliases = reader.table.alias_of[reader.table.whole()] >= 0
    for packet, alias in zip(reader.packets(), aliases.tolist(), strict=True):
        count += 1
        if alias:  # stored once
            continue
        axes = rows[packet.pass_index].values()
        if any(_is_over(packet, one.batch, one.sequence) for one in axes):
            of_tokens += packet.values.nbytes
        else:
            others += packet.values.nbytes
        size = packet.values.dtype.itemsize
        data = np.ascontiguousarray(packet.values).reshape(-1).view(np.uint8)
        sites.setdefault((reader.layers[packet.layer].site, size), []).append(data)
    encoded = {
        name: sum(
            _encoded(np.concatenate(parts), size, number) for (_, size), parts in sites.items()
        )
        for name, number in codecs.NAMES.items()
    }
    raw, passes = of_tokens + others, max(len(rows), 1)
    return Estimate(
        len(reader.layers),
        count / passes,
        of_tokens / tokens if tokens else 0.0,
        others / passes,
        {name: raw / size if size else 1.0 for name, size in encoded.items()},
    )


def _is_over(packet: Packet, batch: int, sequence: int) -> bool:
    shape = packet.values.shape
    return shape[:2] == (batch, sequence) or shape[:1] == (batch * sequence,)


def _encoded(data: Bytes, itemsize: int, codec: int) -> int:
    """Give how many bytes values take, encoded together as a log encodes passes of one layer."""
    pieces = range(0, data.nbytes, _PIECE)
    return sum(len(codecs.encode(codec, data[at : at + _PIECE], itemsize)[1]) for at in pieces)


def _inputs(model: nn.Module) -> dict[str, Tensor]:
    """Draw token ids from the model's vocabulary."""
    config = getattr(model, "config", None)
    size = getattr(config, "vocab_size", None)
    if not isinstance(size, int) or getattr(config, "is_encoder_decoder", False):
        msg = (
            f"estimate can't draw inputs for {type(model).__name__}; give inputs=: keyword "
            "arguments, or the one tensor that it takes"
        )
        raise ConfigError(msg)
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, _SAMPLE_TOKENS), generator=generator)
    return {"input_ids": ids.to(device)}


def _check_model(model: Any, asked: str) -> None:
    if not isinstance(model, nn.Module):
        msg = f"{asked} wants a torch.nn.Module; got {type(model).__name__}"
        raise ConfigError(msg)


def _size(count: float) -> str:
    """Give a number of bytes with a decimal unit."""
    power = min(int(math.log(max(count, 1), 1000)), 5)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
