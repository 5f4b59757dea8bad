"""Write the logs of an older tool that `schemas/vectors/legacy` keeps, with that tool itself.

    python -m venv legacy
    legacy/bin/pip install -c constraints.txt llm-instrumentation==1.3.1 transformers
    legacy/bin/python tests/legacy/make_logs.py [FOLDER]

writes, for each capture below, `NAME.stream`, the `NAME_tokens.json` or `NAME.stream.ckpt.json`
that the tool left beside it, and `NAME.json`, which says what a reader must return:

- `values`: for each layer, in the order of firing, the `dtype`, `shape` and bytes (hexadecimal) of
  what the tool was given, as hooks of this script saw it, float32 rounded to float16;
- `analysis`: what the tool's own `analyze_activations_with_tokens` says of the log;
- `complete`: false where the process was killed. Its log then holds the first of the packets.

The tool's workers may write packets in another order than they fired in, and its JSON has times:
two runs of this script don't write the same bytes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "schemas" / "vectors" / "legacy"
KILLED_STEPS = 12


def sequential(dtype: str = "float32") -> Any:
    """Give an embedding, a linear and an activation, whose zeros compress."""
    import torch

    model = torch.nn.Sequential(
        torch.nn.Embedding(32, 16), torch.nn.Linear(16, 24), torch.nn.ReLU()
    )
    return model.to(getattr(torch, dtype))


def named() -> Any:
    """Give a model whose children have names, one of them called twice in a pass."""
    import torch

    class Named(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(32, 8)
            self.mlp = torch.nn.Linear(8, 8)
            self.attn = torch.nn.Linear(8, 8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            hidden = self.embed(ids)
            return self.mlp(self.mlp(hidden)) + self.attn(hidden)

    return Named()


def dtypes() -> Any:
    """Give a model whose layers return what is no float32."""
    import torch

    class Cast(torch.nn.Module):
        def __init__(self, dtype: torch.dtype) -> None:
            super().__init__()
            self.dtype = dtype

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return given.to(self.dtype)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_float64 = Cast(torch.float64)
            self.to_int64 = Cast(torch.int64)
            self.to_bool = Cast(torch.bool)
            self.to_bfloat16 = Cast(torch.bfloat16)  # the tool drops these silently
            self.to_nothing = Cast(torch.float16)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            values = ids[:, :3] * 0.7 - 1
            for layer in (self.to_float64, self.to_int64, self.to_bool, self.to_bfloat16):
                layer(values)
            self.to_nothing(values[:, :0])
            return values

    return Model()


def llama() -> Any:
    """Give a tiny Llama, of which the tool captures the head alone: the rest returns no tensor."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


#: name -> the model, the codec, the granularity, and how many tokens are recorded (None: no
#: tracking).
CAPTURES: dict[str, tuple[Any, str, str, int | None]] = {
    "lz4": (sequential, "lz4", "FULL_TENSOR", None),
    "zstd": (sequential, "zstd", "FULL_TENSOR", None),
    "none": (sequential, "none", "FULL_TENSOR", None),
    "lz4-tokens": (sequential, "lz4", "FULL_TENSOR", 3),
    "zstd-tokens": (sequential, "zstd", "FULL_TENSOR", 3),
    "none-tokens": (sequential, "none", "FULL_TENSOR", 3),
    "float16": (lambda: sequential("float16"), "zstd", "FULL_TENSOR", None),
    "dtypes-lz4": (dtypes, "lz4", "FULL_TENSOR", None),
    "dtypes-zstd": (dtypes, "zstd", "FULL_TENSOR", None),
    "dtypes-none": (dtypes, "none", "FULL_TENSOR", None),
    "named": (named, "lz4", "FULL_TENSOR", None),
    "mlp-only": (named, "zstd", "MLP_ONLY", None),
    "llama": (llama, "zstd", "FULL_TENSOR", 2),
}


def watch(model: Any, granularity: str, seen: dict[str, list[Any]]) -> None:
    """Record the tensors that the tool's hooks are given and can keep."""
    import torch

    for name, module in [("", model), *model.named_children()]:
        if granularity == "MLP_ONLY" and "mlp" not in name:
            continue

        def hook(_module: Any, _given: Any, output: Any, name: str = name) -> None:
            if isinstance(output, torch.Tensor) and output.dtype != torch.bfloat16:
                kept = output.detach().clone()
                kept = kept.half() if kept.dtype == torch.float32 else kept
                seen.setdefault(name, []).append(kept.numpy())

        module.register_forward_hook(hook)


def described(seen: dict[str, list[Any]]) -> dict[str, Any]:
    """Give the tensors as JSON."""
    return {
        name: [
            {"dtype": one.dtype.name, "shape": list(one.shape), "hex": one.tobytes().hex()}
            for one in values
        ]
        for name, values in seen.items()
    }


def framework(compression: str, granularity: str) -> Any:
    """Give the tool."""
    from llm_instrumentation import (
        HookGranularity,
        InstrumentationConfig,
        InstrumentationFramework,
    )

    config = InstrumentationConfig(
        granularity=HookGranularity[granularity], compression_algorithm=compression
    )
    return InstrumentationFramework(config)


def capture(name: str, folder: Path) -> None:
    """Make one log, and say what it holds."""
    import torch
    from llm_instrumentation import analyze_activations_with_tokens

    make, compression, granularity, tokens = CAPTURES[name]
    torch.manual_seed(0)
    model, tool, seen = make(), framework(compression, granularity), {}
    watch(model, granularity, seen)
    tool.instrument_model(model)
    log = folder / f"{name}.stream"
    ids = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad(), tool.capture_activations(str(log), tokens is not None) as tracker:
        for step in range(tokens or 2):
            model(ids)
            if tracker is not None:
                tracker.record_token(5 + step, f" téxt{step}")
            ids = torch.cat([ids, torch.tensor([[5 + step]])], dim=1)
    analysis = analyze_activations_with_tokens(str(log), tool)
    del analysis["stream_path"]
    said = {"values": described(seen), "analysis": analysis, "complete": True}
    write(folder / f"{name}.json", said)


def killed(folder: Path) -> None:
    """Capture with checkpoints, and end the process in the middle of it.

    What the tool has in its buffers is then lost, and a packet may be cut.
    """
    import torch

    torch.manual_seed(0)
    log = folder / "killed.stream"
    model, tool, seen = sequential(), framework("none", "FULL_TENSOR"), {}
    watch(model, "FULL_TENSOR", seen)
    tool.instrument_model(model)
    ids = torch.tensor([[3, 1, 4, 1]])
    with torch.no_grad(), tool.capture_activations(str(log), True, 4) as tracker:
        for step in range(KILLED_STEPS):
            model(ids)
            tracker.record_token(5 + step, f" t{step}")
            time.sleep(0.1)  # its workers write meanwhile
        write(folder / "killed.json", {"values": described(seen), "complete": False})
        os._exit(9)


def write(path: Path, said: dict[str, Any]) -> None:
    """Write JSON with a line for each member of `values`."""
    layers = []
    for name, packets in said["values"].items():
        lines = ",\n      ".join(map(json.dumps, packets))
        layers.append(f"    {json.dumps(name)}: [\n      {lines}\n    ]")
    values = ",\n".join(layers)
    rest = "".join(
        f',\n  "{key}": {json.dumps(value)}' for key, value in said.items() if key != "values"
    )
    path.write_text(f'{{\n  "values": {{\n{values}\n  }}{rest}\n}}\n', "ascii")


def main(folder: Path) -> None:
    """Write every log below a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in CAPTURES:
        capture(name, folder)
    subprocess.run([sys.executable, __file__, str(folder), "killed"], check=False)


if __name__ == "__main__":
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if sys.argv[2:] == ["killed"]:
        killed(place)
    else:
        main(place)
