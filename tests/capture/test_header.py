"""What a log says of its model and its run, and what can't be said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from oracle import capturing
from tiny_models import sequential
from torch import nn
from transformers import LlamaConfig

from actstore.errors import ConfigError
from actstore.stream.reader import open_stream


@pytest.mark.parametrize(("given", "wanted"), [("3", (3, 8)), ("", (0, 8)), (" 7 ", (7, 8))])
def test_a_launcher_s_rank_is_kept(
    given: str, wanted: tuple[int, int], log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", given)
    monkeypatch.setenv("WORLD_SIZE", "8")
    model = sequential()
    with capturing(model, log):
        model(torch.ones(1, 8))
    with open_stream(log) as reader:
        assert (reader.header["rank"], reader.header["world_size"]) == wanted


@pytest.mark.parametrize("given", ["x", "-3", "1.5"])
def test_a_rank_that_is_none_is_refused_by_name(
    given: str, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", given)
    with pytest.raises(ConfigError, match="RANK must be"), capturing(sequential(), log):
        pass
    assert not log.exists()


def test_lazy_parameters_are_refused_with_the_remedy(log: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(ConfigError, match="run it once before"), capturing(model, log):
        pass
    model(torch.ones(1, 8))
    with capturing(model, log):
        model(torch.ones(1, 8))


def test_a_config_with_nan_is_json_and_resumes(log: Path) -> None:
    def once(resume: bool) -> None:
        model = sequential()
        model.config = LlamaConfig(rope_theta=float("nan"))
        with capturing(model, log, track_per_token=True, resume_from_checkpoint=resume):
            model(torch.ones(1, 8))

    once(resume=False)
    once(resume=True)
    with open_stream(log) as reader:
        json.dumps(dict(reader.header), allow_nan=False)
        assert len(reader.passes) == 1  # a pass that no token follows belongs to no step
