"""Owns how each peer does the same work and captures the same block outputs of it.

A peer's imports stand in its methods: this runs in the peer's own environment, where neither
actstore nor another peer need be. ``peer_process.py`` measures, ``peers.py`` drives.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import torch

PROMPT = 512
WIDTH = 1024
LAYERS = [f"model.layers.{number}" for number in range(8)]
#: A forward of the peer's: ids and keywords -> logits.
Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Work:
    """Forwards of a prompt, or decoding with a cache.

    A step takes the argmax, as greedy decoding does, but goes on with a given token: else a
    peer's rounding (eager attention) could lead to another text, whose values say nothing.
    """

    phase: str
    passes: int

    @property
    def tokens(self) -> int:
        """How many positions go through the model, the prompt of a decoding apart."""
        return self.passes * (PROMPT if self.phase == "prefill" else 1)

    def run(self, config: Any, forward: Forward) -> None:
        """Run it by a forward."""
        from transformers import DynamicCache

        with torch.no_grad():
            if self.phase == "prefill":
                for _ in range(self.passes):
                    forward(torch.arange(PROMPT).unsqueeze(0), use_cache=False)
                return
            ids, cache = torch.tensor([[1, 2, 3, 4]]), DynamicCache(config=config)
            for number in range(self.passes):
                logits = forward(ids, past_key_values=cache, use_cache=True)
                ids = torch.full_like(logits[:, -1:].argmax(-1), 37 * number % config.vocab_size)


class Peer:
    """How one peer captures and reads; this one's plain hooks are the oracle."""

    phases: ClassVar[tuple[str, ...]] = ("prefill", "decode")

    def __init__(self, folder: Path, dtype: str) -> None:
        self.folder = str(folder)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.model = self.load()

    def load(self) -> Any:
        """Give the model once more, all of it in memory: weights on loan from a file come late."""
        from transformers import LlamaForCausalLM

        model = LlamaForCausalLM.from_pretrained(self.folder, dtype=self.dtype).eval()
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
        return model

    def plain(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        """Run the model alone."""
        return self.model(ids, **more).logits

    @contextmanager
    def hooked(self) -> Iterator[dict[str, torch.Tensor]]:
        """Clone what the blocks give into a dictionary."""
        kept: dict[str, torch.Tensor] = {}

        def hook(name: str) -> Callable[..., None]:
            def keep(_module: Any, _args: Any, output: torch.Tensor) -> None:
                kept[name] = output.clone()

            return keep

        with ExitStack() as stack:
            for name in LAYERS:
                stack.enter_context(
                    self.model.get_submodule(name).register_forward_hook(hook(name))
                )
            yield kept

    def capture(self, work: Work, out: Path) -> None:
        """Run the work and leave what it captured in an empty folder."""
        from safetensors.torch import save_file

        passes: list[dict[str, torch.Tensor]] = []
        with self.hooked() as kept:

            def forward(ids: torch.Tensor, **more: Any) -> torch.Tensor:
                logits = self.plain(ids, **more)
                passes.append(dict(kept))
                return logits

            work.run(self.model.config, forward)
        save_file(
            {name: torch.cat([one[name] for one in passes], 1) for name in LAYERS},
            out / "all.safetensors",
        )

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Give all that a layer gave, [1, tokens, width]; LookupError if there is nothing."""
        return joined_safetensors(out, layer)


def joined_safetensors(out: Path, layer: str) -> torch.Tensor:
    """Give a layer from a file a pass."""
    from safetensors import safe_open

    parts = []
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            parts.append(file.get_tensor(layer))
    return torch.cat(parts, 1)


class EachPass(Peer):
    """A peer that leaves a safetensors file a pass, of what it kept in memory until then."""

    def forward(self, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run one forward; give the logits and the blocks' outputs."""
        raise NotImplementedError

    def capture(self, work: Work, out: Path) -> None:
        """Save after each forward."""
        from safetensors.torch import save_file

        numbers = count()

        def forward(ids: torch.Tensor, **more: Any) -> torch.Tensor:
            logits, kept = self.forward(ids, **more)
            path = out / f"{next(numbers):06}.safetensors"
            save_file(dict(zip(LAYERS, kept, strict=True)), path)
            return logits

        work.run(self.model.config, forward)


class TorchSave(Peer):
    """Hooks that clone, and ``torch.save`` after each pass."""

    def capture(self, work: Work, out: Path) -> None:
        """Save after each forward."""
        numbers = count()
        with self.hooked() as kept:

            def forward(ids: torch.Tensor, **more: Any) -> torch.Tensor:
                logits = self.plain(ids, **more)
                torch.save(kept, out / f"{next(numbers):06}.pt")
                return logits

            work.run(self.model.config, forward)

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Map each file, and copy the layer out of it."""
        paths = sorted(out.glob("*.pt"))
        return torch.cat([torch.load(path, mmap=True)[layer] for path in paths], 1)


class HiddenStates(EachPass):
    """Transformers' own ``output_hidden_states``: the last one has the final norm applied."""

    def forward(self, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Ask for the hidden states."""
        output = self.model(ids, output_hidden_states=True, **more)
        return output.logits, list(output.hidden_states[1:])


class NNsight(EachPass):
    """nnsight's ``trace`` with ``tracer.cache``; it wraps a model of its own."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import nnsight

        super().__init__(folder, dtype)
        self.traced = nnsight.NNsight(self.load())

    def forward(self, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Trace one forward."""
        traced = self.traced
        blocks = list(traced.model.layers)
        with traced.trace(ids, **more) as tracer:
            cache = tracer.cache(modules=blocks).save()
            output = traced.output.save()
        return output.logits, [cache[f"model.{name}"].output for name in LAYERS]


class Bridge(EachPass):
    """TransformerLens' bridge with ``run_with_cache``; its attention is the eager one."""

    def __init__(self, folder: Path, dtype: str) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        super().__init__(folder, dtype)
        self.bridge = TransformerBridge.boot_transformers(
            self.folder, hf_model=self.load(), device="cpu", dtype=self.dtype
        )
        self.names = [f"blocks.{number}.hook_out" for number in range(len(LAYERS))]

    def forward(self, ids: torch.Tensor, **more: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run one forward with its cache."""
        logits, cache = self.bridge.run_with_cache(
            ids, names_filter=self.names, return_cache_object=False, **more
        )
        return logits, [cache[name] for name in self.names]


class TorchLens(Peer):
    """TorchLens' ``Recorder``, to one bundle on disk; torch stays wrapped in the plain runs."""

    def capture(self, work: Work, out: Path) -> None:
        """Log each forward."""
        import torchlens
        from torchlens.fastlog import Recorder

        wanted = torchlens.module(LAYERS[0])
        for name in LAYERS[1:]:
            wanted |= torchlens.module(name)
        storage = torchlens.to_disk(out / "bundle")
        with Recorder(self.model, save=wanted, storage=storage) as recorder:
            work.run(self.model.config, lambda ids, **more: recorder.log((ids,), more).logits)

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Load the bundle, and join the layer's records."""
        from torchlens.fastlog import load

        found = [one for one in load(out / "bundle") if one.ctx.address == layer]
        return torch.cat([one.disk_payload for one in found], 1)


class SAELens(Peer):
    """SAELens' cache runner: one layer a run, so eight runs; float32 in Arrow."""

    phases = ("prefill",)

    def __init__(self, folder: Path, dtype: str) -> None:
        from sae_lens.load_model import HookedProxyLM
        from transformers import AutoTokenizer

        super().__init__(folder, dtype)
        self.proxy = HookedProxyLM(self.load(), AutoTokenizer.from_pretrained(self.folder))

    def capture(self, work: Work, out: Path) -> None:
        """Run once a layer, over the same prompts, with the model that is loaded already."""
        from datasets import Dataset
        from sae_lens import cache_activations_runner as runner
        from sae_lens.config import CacheActivationsRunnerConfig

        runner.load_model = lambda **_: self.proxy
        prompts = Dataset.from_dict({"input_ids": [list(range(PROMPT))] * work.passes})
        for name in LAYERS:
            config = CacheActivationsRunnerConfig(
                dataset_path="", model_name=self.folder, model_class_name="AutoModelForCausalLM",
                model_batch_size=1, hook_name=name, d_in=WIDTH, training_tokens=work.tokens,
                context_size=PROMPT, new_cached_activations_path=str(out / name), shuffle=False,
                dtype="float32", device="cpu", prepend_bos=False, streaming=False,
                # one buffer of all passes: by default it would repeat them up to 2 GB
                buffer_size_gb=(work.tokens * WIDTH * 4 + 1) / 1e9,
            )  # fmt: skip
            runner.CacheActivationsRunner(config, override_dataset=prompts).run()

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Load the data set as arrays."""
        from datasets import load_from_disk

        rows = load_from_disk(str(out / layer)).with_format("numpy")[:][layer]
        return torch.from_numpy(rows).reshape(1, -1, WIDTH)


class LLMInstrumentation(Peer):
    """llm-instrumentation, given the list of blocks: it hooks a module's direct children only."""

    def capture(self, work: Work, out: Path) -> None:
        """Capture by its framework."""
        from llm_instrumentation import (
            HookGranularity,
            InstrumentationConfig,
            InstrumentationFramework,
        )

        framework = InstrumentationFramework(
            InstrumentationConfig(granularity=HookGranularity.FULL_TENSOR)
        )
        framework.instrument_model(self.model.model.layers)
        with framework.capture_activations(str(out / "run.stream")):
            work.run(self.model.config, self.plain)

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Unpack its frames by hand, for it has no reader: lz4 of fp16, without shapes."""
        import lz4.frame

        data, at, found = (out / "run.stream").read_bytes(), 0, b""
        while at < len(data):
            name_size, size = struct.unpack_from("!HI", data, at)
            name_end = at + 6 + name_size
            if data[at + 6 : name_end].decode() == layer.rpartition(".")[2]:
                found += lz4.frame.decompress(data[name_end : name_end + size])
            at = name_end + size
        if not found:
            raise LookupError(layer)
        return torch.frombuffer(bytearray(found), dtype=torch.float16).reshape(1, -1, WIDTH)


class Actstore(Peer):
    """actstore, with a codec."""

    codec: ClassVar[str] = "none"

    def capture(self, work: Work, out: Path) -> None:
        """Capture to a log."""
        import actstore

        framework = actstore.InstrumentationFramework(
            actstore.InstrumentationConfig(
                actstore.HookGranularity.FULL_TENSOR, self.codec, target_throughput_gbps=1e-6
            )
        )
        framework.instrument_model(self.model, actstore.HookConfig(target_layers=LAYERS))
        with framework.capture_activations(str(out / "run.stream")):
            work.run(self.model.config, self.plain)

    @staticmethod
    def read(out: Path, layer: str) -> torch.Tensor:
        """Join the layer's packets."""
        import numpy as np

        import actstore

        with actstore.open_stream(out / "run.stream") as reader:
            values = np.concatenate([one.values for one in reader.packets(layer)], 1)
        if values.dtype.name == "bfloat16":
            return torch.from_numpy(values.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(values)


PEERS: dict[str, type[Peer]] = {
    "oracle": Peer,
    "actstore none": Actstore,
    "actstore lz4": type("ActstoreLZ4", (Actstore,), {"codec": "lz4"}),
    "actstore zstd": type("ActstoreZstd", (Actstore,), {"codec": "zstd"}),
    "clone hooks + torch.save": TorchSave,
    "output_hidden_states + safetensors": HiddenStates,
    "nnsight": NNsight,
    "TransformerLens": Bridge,
    "TorchLens": TorchLens,
    "SAELens": SAELens,
    "llm-instrumentation": LLMInstrumentation,
}
