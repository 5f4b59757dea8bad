"""What a capture can be told, and what it refuses."""

from __future__ import annotations

import dataclasses
import os
import pickle
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreError, ConfigError

FULL = HookGranularity.FULL_TENSOR
NOT_POSITIVE = [0, -1, 0.0, -0.5, float("nan"), float("inf"), -float("inf"), True, False]
NO_NUMBERS = ["1", None, [1.0], 1j, Decimal(1)]


def test_the_defaults_are_the_documented_ones() -> None:
    config = InstrumentationConfig(FULL)
    assert config.compression_algorithm == "lz4"
    assert config.target_throughput_gbps == 1.0
    assert config.max_memory_gb is None
    assert [one.name for one in dataclasses.fields(config)] == [
        "granularity",
        "compression_algorithm",
        "target_throughput_gbps",
        "max_memory_gb",
    ]


def test_the_granularities_are_the_documented_ones() -> None:
    assert [one.name for one in HookGranularity] == [
        "FULL_TENSOR",
        "SAMPLED_SLICES",
        "ATTENTION_ONLY",
        "MLP_ONLY",
    ]


@pytest.mark.parametrize("granularity", ["FULL_TENSOR", "full_tensor", None, 0, HookGranularity])
def test_a_granularity_that_is_none_is_refused_naming_those_there_are(granularity: Any) -> None:
    with pytest.raises(ConfigError, match=r"HookGranularity\.FULL_TENSOR, .*MLP_ONLY; got"):
        InstrumentationConfig(granularity)


@pytest.mark.parametrize("codec", ["gzip", "LZ4", "", None, 1, ["lz4"], b"lz4", {}])
def test_an_unknown_codec_is_refused_naming_those_there_are(codec: Any) -> None:
    with pytest.raises(ConfigError, match="'lz4', 'zstd', 'none'; got"):
        InstrumentationConfig(FULL, codec)


@pytest.mark.parametrize("field", ["target_throughput_gbps", "max_memory_gb"])
@pytest.mark.parametrize(
    "value", [*NOT_POSITIVE, *(one for one in NO_NUMBERS if one), 10**400, 1e300]
)
def test_a_size_that_is_no_positive_finite_number_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{field} must be a positive, finite number"):
        InstrumentationConfig(FULL, **{field: value})


def test_a_rate_of_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="target_throughput_gbps"):
        InstrumentationConfig(FULL, target_throughput_gbps=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [1e-9, 0.001, 0.00104])
def test_a_budget_too_small_to_work_with_is_refused_naming_the_least(value: float) -> None:
    with pytest.raises(ConfigError, match=r"0\.001049"):
        InstrumentationConfig(FULL, max_memory_gb=value)


@pytest.mark.parametrize(("given", "wanted"), [(1, 10**9), (0.5, 5 * 10**8), (0.002, 2 * 10**6)])
def test_the_budget_is_in_units_of_a_billion_bytes(given: float, wanted: int) -> None:
    assert InstrumentationConfig(FULL, max_memory_gb=given).budget == wanted


def test_the_default_budget_is_a_quarter_of_what_the_process_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < InstrumentationConfig(FULL).budget <= host // 4
    monkeypatch.setattr("actstore.machine.memory", lambda: 8 << 30)  # a container's
    assert InstrumentationConfig(FULL).budget == 2 << 30


@pytest.mark.parametrize("rate", [*NOT_POSITIVE, *NO_NUMBERS, 1.0000001, 2])
def test_a_sampling_rate_outside_of_0_to_1_is_refused(rate: Any) -> None:
    with pytest.raises(ConfigError, match="sampling_rate must be"):
        HookConfig(sampling_rate=rate)


@pytest.mark.parametrize("seed", [1.0, "1", None, True])
def test_a_seed_that_is_no_int_is_refused(seed: Any) -> None:
    with pytest.raises(ConfigError, match="sampling_seed must be"):
        HookConfig(sampling_seed=seed)


@pytest.mark.parametrize("seed", [-1, -(10**30)])
def test_a_seed_that_can_not_be_drawn_from_is_refused_at_once(seed: int) -> None:
    with pytest.raises(ConfigError, match="sampling_seed must be"):
        HookConfig(sampling_seed=seed)


@pytest.mark.parametrize(
    "targets", ["model.layers.*", b"a", [], (), [3], [None], {"a"}, 5, ["a", 3]]
)
def test_targets_that_are_no_list_of_names_are_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match="target_layers must be None, a non-empty list"):
        HookConfig(target_layers=targets)


def test_a_hook_granularity_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"HookConfig\.granularity must be one of"):
        HookConfig(granularity="mlp_only")  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [InstrumentationConfig(FULL, "zstd", 2, 3), HookConfig()])
def test_a_config_is_a_value(config: Any) -> None:
    assert config == dataclasses.replace(config)
    assert hash(config) == hash(dataclasses.replace(config))
    assert pickle.loads(pickle.dumps(config)) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.granularity = None


def test_config_errors_are_value_errors_and_ours() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, ActstoreError)


def test_configuring_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from actstore.config import *\n"
        "InstrumentationConfig(HookGranularity.MLP_ONLY)"
    )
    root = str(Path(actstore.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


# -- presets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "granularity", "codec", "target"),
    [
        ("fast_capture", HookGranularity.FULL_TENSOR, "none", 4.0),
        ("balanced", HookGranularity.FULL_TENSOR, "lz4", 2.0),
        ("max_compression", HookGranularity.FULL_TENSOR, "zstd", 1.0),
        ("max", HookGranularity.FULL_TENSOR, "zstd", 6.0),
        ("attention_analysis", HookGranularity.ATTENTION_ONLY, "lz4", 2.0),
        ("mlp_analysis", HookGranularity.MLP_ONLY, "lz4", 2.0),
    ],
)
def test_presets_are_those_of_llm_instrumentation_within_the_hosts_memory(
    name: str, granularity: HookGranularity, codec: str, target: float
) -> None:
    assert getattr(InstrumentationConfig, name)() == InstrumentationConfig(
        granularity, codec, target, None
    )


def test_a_config_is_changed_by_giving_another() -> None:
    first = InstrumentationConfig.balanced()
    second = (
        first.with_compression("zstd")
        .with_memory_limit(2.5)
        .with_throughput(0.5)
        .with_granularity(HookGranularity.MLP_ONLY)
    )
    assert second == InstrumentationConfig(HookGranularity.MLP_ONLY, "zstd", 0.5, 2.5)
    assert first == InstrumentationConfig.balanced()
    with pytest.raises(ConfigError, match="compression_algorithm must be one of"):
        first.with_compression("gzip")
