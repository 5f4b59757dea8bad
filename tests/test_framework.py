"""The documented facade: its signatures, its examples, and what it needs."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import actstore
from actstore.config import HookGranularity, InstrumentationConfig
from actstore.errors import ActstoreError, ConfigError
from actstore.framework import InstrumentationFramework, analyze_activations_with_tokens

torch = pytest.importorskip("torch")


def _parameters(function: Any) -> list[tuple[str, Any]]:
    return [
        (one.name, one.default)
        for one in inspect.signature(function).parameters.values()
        if one.name != "self"
    ]


def test_the_signatures_are_the_documented_ones() -> None:
    empty = inspect.Parameter.empty
    assert _parameters(InstrumentationFramework) == [("config", empty)]
    assert _parameters(InstrumentationFramework.instrument_model)[0] == ("model", empty)
    assert _parameters(InstrumentationFramework.capture_activations) == [
        ("output_path", empty),
        ("track_per_token", False),
        ("checkpoint_interval_tokens", None),
        ("checkpoint_path", None),
        ("resume_from_checkpoint", False),
    ]
    assert _parameters(InstrumentationFramework.analyze_activations) == [("data_path", empty)]
    assert _parameters(analyze_activations_with_tokens) == [
        ("stream_path", empty),
        ("framework", empty),
    ]


def test_the_public_names_are_there_and_loaded_lazily() -> None:
    for name in (
        "InstrumentationConfig",
        "HookGranularity",
        "HookConfig",
        "InstrumentationFramework",
        "analyze_activations_with_tokens",
        "open_stream",
        "ActstoreError",
    ):
        assert getattr(actstore, name).__name__ == name
        assert name in dir(actstore)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = actstore.nonsense


def test_importing_actstore_and_the_facade_imports_no_torch() -> None:
    code = (
        "import sys, actstore\n"
        "assert not {'torch', 'zarr', 'xarray'} & set(sys.modules)\n"
        "import actstore.framework\n"
        "assert 'torch' not in sys.modules"
    )
    root = str(Path(actstore.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("name", ["analysis", "errors", "plots", "training"])
def test_a_public_submodule_is_there_without_being_imported(name: str) -> None:
    code = (
        "import sys, actstore\n"
        f"assert {name!r} in dir(actstore)\n"
        "assert not {'torch', 'zarr', 'xarray'} & set(sys.modules)\n"
        f"assert actstore.{name} is sys.modules['actstore.{name}']"
    )
    root = str(Path(actstore.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)


@pytest.mark.parametrize("config", [None, HookGranularity.FULL_TENSOR, {}, InstrumentationConfig])
def test_a_framework_wants_a_config(config: Any) -> None:
    with pytest.raises(ConfigError, match="InstrumentationConfig"):
        InstrumentationFramework(config)


class Tokenizer:
    """Decodes ids as their numbers."""

    def decode(self, ids: Any) -> str:
        """Decode ids."""
        return " ".join(str(int(one)) for one in ids)


class Output:
    """What a language model returns."""

    def __init__(self, logits: Any) -> None:
        self.logits = logits


class Model(torch.nn.Module):
    """A language model of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20)

    def forward(self, input_ids: Any) -> Output:
        """[batch, sequence] -> logits."""
        return Output(self.head(self.embed(input_ids).cumsum(1)))


def test_the_documented_example_of_tracking_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model, tokenizer, input_ids = Model(), Tokenizer(), torch.tensor([[1, 2, 3]])
    framework = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))
    framework.instrument_model(model)
    with (
        pytest.warns(actstore.errors.ActstoreWarning, match="never fired: ''"),
        framework.capture_activations("gen.stream", track_per_token=True) as tracker,
    ):
        ids = input_ids
        for _ in range(4):
            out = model(ids)
            next_tok = out.logits[:, -1, :].argmax(dim=-1, keepdim=True)
            tracker.record_token(next_tok[0].item(), tokenizer.decode(next_tok[0]))
            ids = torch.cat([ids, next_tok], dim=-1)
    found = analyze_activations_with_tokens("gen.stream", framework)
    assert found["token_metadata"]["total_tokens"] == 4
    assert [one["token_id"] for one in found["token_metadata"]["tokens"]] == ids[0, 3:].tolist()
    assert found["packets_per_token"] == 2
    assert found["packets"] == 8


def test_a_framework_captures_again_and_again(tmp_path: Path) -> None:
    framework = InstrumentationFramework(InstrumentationConfig(HookGranularity.FULL_TENSOR))
    model = torch.nn.Linear(2, 2)
    framework.instrument_model(model)
    for number in range(3):
        with framework.capture_activations(tmp_path / f"{number}.stream") as tracker:
            assert tracker is None
            for _ in range(number + 1):
                model(torch.ones(1, 2))
        assert framework.summary["packets"] == number + 1


def test_every_error_has_the_one_root() -> None:
    errors = actstore.errors
    for name in errors.__all__:
        one = getattr(errors, name)
        assert issubclass(one, ActstoreError | UserWarning)
