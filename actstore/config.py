"""Owns what a capture can be told: granularity, codec, budgets, layers; no torch here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Self

from actstore import machine
from actstore.arguments import check_positive
from actstore.errors import ConfigError

__all__ = ["HookConfig", "HookGranularity", "InstrumentationConfig", "Rows", "TargetLayers"]

#: Exact names and globs, or a predicate of a module's name (or of its name and the module).
TargetLayers = Sequence[str] | Callable[..., bool]

#: Which rows of a pass are kept; a callable is given its `actstore.packet.Axis`.
Rows = str | slice | Callable[[Any], Any]

_GIGABYTE = 10**9
_CODECS = ("lz4", "zstd", "none")
_LEAST_BUDGET = 1 << 20
_OUTPUTS = ("first", "all")
_ROWS = ("last", "generated")


class HookGranularity(Enum):
    """The level of detail to capture.

    ``FULL_TENSOR`` takes the output of every module that returns a tensor; ``SAMPLED_SLICES`` a
    random subset of its features; ``ATTENTION_ONLY`` and ``MLP_ONLY`` one module per block.
    """

    FULL_TENSOR = "full_tensor"
    SAMPLED_SLICES = "sampled_slices"
    ATTENTION_ONLY = "attention_only"
    MLP_ONLY = "mlp_only"


@dataclass(frozen=True, slots=True)
class InstrumentationConfig:
    """What a framework captures, and within which limits.

    Parameters
    ----------
    granularity : HookGranularity
        The level of detail.
    compression_algorithm : {"lz4", "zstd", "none"}
        The codec of the log: ``"lz4"`` is Blosc LZ4 with bit-shuffle, ``"zstd"`` the denser
        plane-split zstd; both lossless.
    target_throughput_gbps : float
        The rate, in 10**9 bytes of activations a second, that the run is held against: its
        summary says whether it was reached and what limited it.
    max_memory_gb : float, optional
        A hard budget, in 10**9 bytes, over all that is staged, sealed and encoded. By default a
        quarter of the memory that the process may use: the host's, or its container's. Past it,
        the model waits; nothing is dropped.

    Raises
    ------
    ConfigError
        A value is of the wrong kind, unknown, not positive or not finite.
    """

    granularity: HookGranularity
    compression_algorithm: str = "lz4"
    target_throughput_gbps: float = 1.0
    max_memory_gb: float | None = None

    def __post_init__(self) -> None:
        _check_granularity("granularity", self.granularity)
        if self.compression_algorithm not in _CODECS:
            wanted = ", ".join(map(repr, _CODECS))
            found = self.compression_algorithm
            msg = f"compression_algorithm must be one of {wanted}; got {found!r}"
            raise ConfigError(msg)
        check_positive("target_throughput_gbps", self.target_throughput_gbps, "GB/s, such as 1.0")
        if self.max_memory_gb is not None:
            check_positive("max_memory_gb", self.max_memory_gb, "GB, such as 4.0, or None")
            if self.max_memory_gb * _GIGABYTE < _LEAST_BUDGET:
                msg = (
                    f"max_memory_gb={self.max_memory_gb!r} is under the least budget that works, "
                    f"{_LEAST_BUDGET / _GIGABYTE:.6f} (1 MiB); give more"
                )
                raise ConfigError(msg)

    @classmethod
    def fast_capture(cls) -> Self:
        """Give a config for all modules, raw: the least work while the model runs."""
        return cls(HookGranularity.FULL_TENSOR, "none", 4.0)

    @classmethod
    def balanced(cls) -> Self:
        """Give a config for all modules, by LZ4."""
        return cls(HookGranularity.FULL_TENSOR, "lz4", 2.0)

    @classmethod
    def max_compression(cls) -> Self:
        """Give a config for all modules, as small as the log makes them."""
        return cls(HookGranularity.FULL_TENSOR, "zstd", 1.0)

    @classmethod
    def max(cls) -> Self:
        """Give a config for all modules, small, held against a high rate."""
        return cls(HookGranularity.FULL_TENSOR, "zstd", 6.0)

    @classmethod
    def attention_analysis(cls) -> Self:
        """Give a config for the attention of every block."""
        return cls(HookGranularity.ATTENTION_ONLY, "lz4", 2.0)

    @classmethod
    def mlp_analysis(cls) -> Self:
        """Give a config for the MLP of every block."""
        return cls(HookGranularity.MLP_ONLY, "lz4", 2.0)

    def with_granularity(self, granularity: HookGranularity) -> Self:
        """Give this config with another granularity."""
        return replace(self, granularity=granularity)

    def with_compression(self, compression_algorithm: str) -> Self:
        """Give this config with another codec."""
        return replace(self, compression_algorithm=compression_algorithm)

    def with_throughput(self, target_throughput_gbps: float) -> Self:
        """Give this config with another target, in GB/s."""
        return replace(self, target_throughput_gbps=target_throughput_gbps)

    def with_memory_limit(self, max_memory_gb: float | None) -> Self:
        """Give this config with another budget, in GB."""
        return replace(self, max_memory_gb=max_memory_gb)

    @property
    def budget(self) -> int:
        """The memory budget in bytes."""
        if self.max_memory_gb is not None:
            return int(self.max_memory_gb * _GIGABYTE)
        return max(machine.memory() // 4, _LEAST_BUDGET)


@dataclass(frozen=True, slots=True)
class HookConfig:
    """The fine control of what is hooked.

    Parameters
    ----------
    granularity : HookGranularity, optional
        None means the framework's; one that differs from it is refused at ``instrument_model``.
    sampling_rate : float
        For ``SAMPLED_SLICES``: of a tensor of width d, ``ceil(sampling_rate * d)`` features are
        kept; 0 < rate <= 1.
    target_layers : sequence of str or callable, optional
        Which of the modules of the granularity to hook: exact names and globs in the way of
        `fnmatch` (``"model.layers.*.mlp"``; ``*`` also matches dots), or a predicate of the name,
        or of the name and the module. None is all.
    sampling_seed : int
        Not negative. The seed of the features that ``SAMPLED_SLICES`` draws, recorded in the log.
    inputs : bool
        Keep also the first tensor that each module is given, as the layer ``name@in``.
    outputs : {"first", "all"}
        Of a module that returns several tensors keep the first only, or all of them, depth first:
        those behind the first as the layers ``name#1``, ``name#2``, …
    rows : {"last", "generated"}, slice or callable, optional
        Of outputs over a token axis keep only some rows; None is all. ``"last"``: of each batch
        item the last that is no padding; ``"generated"``: those behind the prompt, which is what
        the first pass of a generation is fed; a slice of the sequence; or what a callable gives
        for a pass's `actstore.packet.Axis`: bool [batch, sequence]. Items keep the same number of
        rows: where fewer are asked for, others fill up, marked as padding.
    attention_weights : bool
        Keep the weights that attention modules return beside their output: the layer
        ``name#weights``, float [batch, heads, queries, keys].
    stop_after_last_layer : bool
        End each forward when every hooked layer has fired; the model then returns None. Where
        the model itself is one of them, it runs to its end.

    Raises
    ------
    ConfigError
        A value is of the wrong kind or out of its range.
    """

    granularity: HookGranularity | None = None
    sampling_rate: float = 0.1
    target_layers: TargetLayers | None = None
    sampling_seed: int = 0
    inputs: bool = False
    outputs: str = "first"
    rows: Rows | None = None
    attention_weights: bool = False
    stop_after_last_layer: bool = False

    def __post_init__(self) -> None:
        if self.granularity is not None:
            _check_granularity("HookConfig.granularity", self.granularity)
        check_positive("sampling_rate", self.sampling_rate, "a share in (0, 1]")
        if self.sampling_rate > 1:
            msg = f"sampling_rate must be in (0, 1]; got {self.sampling_rate!r}"
            raise ConfigError(msg)
        seed = self.sampling_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            msg = f"sampling_seed must be a non-negative int; got {seed!r}"
            raise ConfigError(msg)
        _check_targets(self.target_layers)
        for name in ("inputs", "attention_weights", "stop_after_last_layer"):
            if not isinstance(getattr(self, name), bool):
                msg = f"{name} must be True or False; got {getattr(self, name)!r}"
                raise ConfigError(msg)
        if not isinstance(self.outputs, str) or self.outputs not in _OUTPUTS:
            msg = f"outputs must be one of 'first', 'all'; got {self.outputs!r}"
            raise ConfigError(msg)
        _check_rows(self.rows)


def _check_granularity(name: str, value: Any) -> None:
    if not isinstance(value, HookGranularity):
        wanted = ", ".join(f"HookGranularity.{entry.name}" for entry in HookGranularity)
        msg = f"{name} must be one of {wanted}; got {value!r}"
        raise ConfigError(msg)


def _check_rows(rows: Any) -> None:
    named = isinstance(rows, str) and rows in _ROWS
    if rows is not None and not (named or isinstance(rows, slice) or callable(rows)):
        msg = f"rows must be None, 'last', 'generated', a slice or a callable; got {rows!r}"
        raise ConfigError(msg)


def _check_targets(targets: Any) -> None:
    if targets is None or callable(targets):
        return
    names = isinstance(targets, Sequence) and not isinstance(targets, str | bytes)
    if not names or not targets or not all(isinstance(name, str) for name in targets):
        msg = (
            "target_layers must be None, a non-empty list of names and globs "
            f"(such as ['model.layers.*.mlp']), or a callable; got {targets!r}"
        )
        raise ConfigError(msg)
