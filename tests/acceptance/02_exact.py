"""Part 2, capture is exact everywhere: what must hold, each with its figure.

Run by ``.venv/bin/python tests/acceptance/02_exact.py``; about three minutes.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent), str(ROOT / "tests/capture")]

import families
import numpy as np
import oracle
import torch
from report import run
from torch import Tensor, nn
from transformers.utils import logging

import actstore
from actstore import HookConfig
from actstore import HookGranularity as G

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RATE = 0.3
Call = Callable[[nn.Module, dict[str, Tensor]], Any]


def forward(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Call the model without gradients."""
    with torch.no_grad():
        return model(**given)


def infer(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Call the model in inference mode, where tensors have no version."""
    with torch.inference_mode():
        return model(**given)


def autocast(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Call a float32 model under autocast."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return model(**given)


def prompt(given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give what generation begins with: no decoder's inputs; ids with padding on the left."""
    fed = {key: one for key, one in given.items() if not key.startswith("decoder_")}
    if "input_ids" in fed:
        ids = fed["input_ids"].clone()
        mask = torch.ones_like(ids)
        ids[0, :1], mask[0, :1] = 0, 0
        fed |= {"input_ids": ids, "attention_mask": mask}
    return fed


def generate(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Generate greedily, with a cache."""
    return model.generate(**prompt(given), max_new_tokens=3, do_sample=False, pad_token_id=0)


def beams(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Generate with beams."""
    settings = {"max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    return model.generate(**prompt(given), **settings)


def sample(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Generate by sampling, seeded."""
    torch.manual_seed(11)
    settings = {"max_new_tokens": 3, "do_sample": True, "top_k": 8, "pad_token_id": 0}
    return model.generate(**prompt(given), **settings)


def train(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Take gradients in training mode, with dropout, seeded."""
    torch.manual_seed(11)
    model.train()
    try:
        model.zero_grad()
        out = first(model(**given))
        out.float().pow(2).mean().backward()
        return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    finally:
        model.zero_grad()
        model.eval()


def checkpointed(model: nn.Module, given: dict[str, Tensor]) -> Any:
    """Take gradients with activation checkpointing: every block runs again in backward."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        return train(model, given)
    finally:
        model.gradient_checkpointing_disable()


def first(value: Any) -> Tensor:
    """Give the first tensor of an output."""
    return next(oracle.tensors_of(value))


WAYS: dict[str, Call] = {
    "forward": forward,
    "inference_mode": infer,
    "autocast": autocast,
    "generate": generate,
    "beams": beams,
    "sampling": sample,
    "training": train,
    "checkpointing": checkpointed,
}
GENERATES = ("CausalLM", "LMHeadModel", "ForConditionalGeneration")
MASKED = ("BERT", "RoBERTa", "DistilBERT", "ViT")
NO_PARTS = ("Mamba", "Mamba 2")


def cases() -> Iterator[tuple[str, G, torch.dtype, str]]:
    """Yield family, granularity, dtype and way of running."""
    for name, family in families.FAMILIES.items():
        for granularity in G:
            for dtype in DTYPES:
                yield name, granularity, dtype, "forward"
        for way in WAYS:
            able = family.model.endswith(GENERATES) and name not in MASKED
            if way in ("generate", "beams", "sampling") and not able:
                continue
            if way != "forward":
                yield name, G.FULL_TENSOR, torch.float32, way
                yield name, G.SAMPLED_SLICES, torch.float32, way


@contextmanager
def log_file() -> Iterator[Path]:
    """Give the path of a log in a folder that is removed."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "run.stream"


def wanted_names(name: str, granularity: G, model: nn.Module) -> list[str]:
    """Give the layers of a granularity, from the names written by hand."""
    if granularity is G.ATTENTION_ONLY:
        return families.modules(name, "attn", "cross_attn")
    if granularity is G.MLP_ONLY:
        return families.modules(name, "mlp")
    return [one for one, _ in model.named_modules()]


def equal(one: Any, two: Any) -> bool:
    """Whether two outputs are the same, bit for bit."""
    mine, other = (list(map(oracle.bytes_of, oracle.tensors_of(v))) for v in (one, two))
    return bool(mine) and mine == other


def check(name: str, granularity: G, dtype: torch.dtype, way: str) -> Counter[str]:
    """Capture one case, and compare it with the oracle; give what was expected and found."""
    model, given, call = families.build(name, dtype), families.feed(name, dtype), WAYS[way]
    names = wanted_names(name, granularity, model)
    try:
        with oracle.Oracle(model, names) as plain:
            output = call(model, given)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Counter({f"the model itself can't: {str(error).splitlines()[0][:70]}": 1})
    hooks = HookConfig(sampling_rate=RATE)
    framework = oracle.framework(granularity)
    framework.instrument_model(model, hooks)
    with log_file() as log:
        with oracle.quiet(), framework.capture_activations(str(log)):
            captured = call(model, given)
        assert equal(output, captured), "the output differs under capture"
        summary = framework.summary
        with actstore.open_stream(log) as reader:
            kept, packets = reader.features, list(reader.packets())
    skipped = sum(summary["skipped"].values())
    recomputed = summary["ignored_recomputed"]
    fired = [one for one in plain.fired if one.layer in set(names)]
    if way == "checkpointing":  # the oracle sees the second run of each block too
        fired = once(fired)
    assert len(fired) == len(packets) + skipped, (len(fired), len(packets), skipped)
    for packet, wanted in zip(packets, fired, strict=True):
        assert (packet.layer, packet.values.dtype.name) == (wanted.layer, wanted.dtype)
        data, shape = wanted.data, wanted.shape
        if granularity is G.SAMPLED_SLICES and shape:
            size = packet.values.dtype.itemsize
            whole = np.frombuffer(data, np.uint8).reshape(*shape, size)
            chosen = whole[..., kept[shape[-1]], :]
            data, shape = chosen.tobytes(), chosen.shape[:-1]
        assert packet.values.shape == shape, packet.layer
        assert packet.values.tobytes() == data, packet.layer
    return Counter(cases=1, packets=len(packets), skipped=skipped, recomputed=recomputed)


def once(fired: list[oracle.Fired]) -> list[oracle.Fired]:
    """Leave out what fired again in backward: everything behind the root's one firing."""
    root = next(place for place, one in enumerate(fired) if one.layer == "")
    return fired[: root + 1]


def exact() -> str:
    """Compare the whole matrix."""
    total, failed, unable = Counter[str](), [], Counter[str]()
    for case in cases():
        name, granularity, dtype, way = case
        if name in NO_PARTS and granularity in (G.ATTENTION_ONLY, G.MLP_ONLY):
            total["refused by name"] += refused(name, granularity)
            continue
        try:
            found = check(*case)
        except Exception as error:  # every case is tried, and the check fails at its end
            failed.append(f"{name} {granularity.name} {dtype} {way}: {error!r:.200}")
            traceback.print_exc()
            continue
        if "cases" in found:
            total += found
        else:
            unable.update(f"{name} {dtype} {way}: {why}" for why in found)
    for line in failed:
        print(f"      {line}")
    for line in sorted(unable):
        print(f"      not a case, {line}")
    assert not failed, f"{len(failed)} cases differ"
    return (
        f"{total['cases']} cases of {len(families.FAMILIES)} families, {total['packets']} packets "
        f"bit for bit; expected = captured + {total['skipped']} named; {total['recomputed']} "
        f"recomputed firings ignored; {total['refused by name']} refused by name; "
        f"{len(unable)} that the model itself can't run"
    )


def refused(name: str, granularity: G) -> int:
    """Count a granularity that a family has nothing of: refused, never an empty capture."""
    framework = oracle.framework(granularity)
    try:
        framework.instrument_model(families.build(name))
    except ValueError as error:
        assert granularity.name in str(error)
        return 1
    msg = f"{name} has no {granularity.name}, and was not refused"
    raise AssertionError(msg)


class Odd(nn.Module):
    """Returns what it was given by name, from a module for each."""

    def __init__(self, outputs: dict[str, Callable[[], Any]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({name: Gives(make) for name, make in outputs.items()})

    def forward(self, x: Tensor) -> Tensor:
        """Call each."""
        for part in self.parts.values():
            part(x)
        return x


class Gives(nn.Module):
    """Returns what a function gives."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def forward(self, _x: Tensor) -> Any:
        """Give it."""
        return self.make()


def odd_outputs() -> str:
    """Capture every kind of tensor: kept exactly, or named."""
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    kept: dict[str, Callable[[], Any]] = {
        "strided": lambda: base.transpose(0, 2),
        "expanded": lambda: base[:1].expand(5, 3, 4),
        "scalar": lambda: torch.tensor(3.5),
        "empty": lambda: torch.empty(0, 4),
        "integer": lambda: torch.arange(7),
        "bool": lambda: base > 3,
        "complex": lambda: torch.complex(base, -base),
        "conjugate": lambda: torch.complex(base, base).conj(),
        "float8": lambda: base.to(torch.float8_e4m3fn),
        "huge": lambda: torch.arange(1 << 20, dtype=torch.float64),
        "dict": lambda: {"a": None, "b": [base]},
    }
    named: dict[str, Callable[[], Any]] = {
        "sparse": lambda: base[0].to_sparse(),
        "csr": lambda: base[0].to_sparse_csr(),
        "nested": lambda: torch.nested.nested_tensor([base[0], base[1, :2]]),
        "meta": lambda: torch.empty(3, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(base, 0.1, 0, torch.qint8),
    }
    model = Odd(kept | named)
    framework = actstore.InstrumentationFramework(
        actstore.InstrumentationConfig(G.FULL_TENSOR, "zstd", max_memory_gb=0.004)
    )
    framework.instrument_model(model)
    with warnings.catch_warnings(), log_file() as log:
        warnings.simplefilter("ignore")
        with framework.capture_activations(str(log)):
            model(base)
        with actstore.open_stream(log) as reader:
            for name, make in kept.items():
                (packet,) = reader.packets(f"parts.{name}")
                assert packet.values.tobytes() == oracle.bytes_of(first(make())), name
                assert packet.values.shape == tuple(first(make()).shape), name
    skipped = framework.summary["skipped"]
    assert len(skipped) == len(named), skipped
    assert all(any(f"parts.{name}:" in one for one in skipped) for name in named)
    return f"{len(kept)} kinds kept exactly (one above the budget), {len(skipped)} skipped by name"


def compiled() -> str:
    """Capture models that are compiled, before and inside the capture."""
    done = []
    for way in ("before", "in place", "inside", "a function"):
        torch._dynamo.reset()
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
        x = torch.randn(2, 8)
        with torch.no_grad(), oracle.Oracle(model) as plain:
            model(x)
        called: Any = model
        if way == "before":
            called = torch.compile(model, backend="eager")
        elif way == "in place":
            model.compile(backend="eager")
        elif way == "a function":
            called = torch.compile(lambda y, inner=model: inner(y), backend="eager")
        with torch.no_grad():
            called(x)
        framework = oracle.framework(G.FULL_TENSOR)
        framework.instrument_model(called if way == "before" else model)
        with log_file() as log, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with torch.no_grad(), framework.capture_activations(str(log)):
                if way == "inside":
                    called = torch.compile(model, backend="eager")
                called(x)
            oracle.assert_equals(log, plain.fired)
        done.append(way)
    return f"compiled {', '.join(done)}: every packet equal, none missing"


def stops_early() -> str:
    """End a forward at the last layer that is wanted, named as TransformerLens has it."""
    model, given = families.build("Llama"), families.feed("Llama")
    later = []
    handle = model.model.layers[1].register_forward_hook(lambda *_: later.append(1))
    hooks = HookConfig(target_layers=["blocks.0.hook_resid_post"], stop_after_last_layer=True)
    framework = oracle.framework(G.FULL_TENSOR)
    framework.instrument_model(model, hooks)
    with torch.no_grad(), oracle.Oracle(model, ["model.layers.0"]) as plain:
        model(**given)
    later.clear()
    with log_file() as log:
        with torch.no_grad(), framework.capture_activations(str(log)):
            assert model(**given) is None
        oracle.assert_equals(log, plain.fired)
    handle.remove()
    assert not later
    assert "forward" not in model.__dict__
    return "block 0 kept, block 1 never ran, the model's forward its own again"


def main() -> int:
    """Run the checks."""
    logging.set_verbosity_error()
    return run(
        "Part 2: capture is exact everywhere",
        {
            "families × granularities × dtypes × ways equal the oracle": exact,
            "odd outputs are kept or named": odd_outputs,
            "compiled models are captured": compiled,
            "a forward ends early on request": stops_early,
        },
    )


if __name__ == "__main__":
    sys.exit(main())
