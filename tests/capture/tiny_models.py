"""Small, seeded models: one of each architecture, built once a process, never changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.utils import ModelOutput

VOCABULARY = 64
_PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GATED = _PLAIN | {"intermediate_size": 48, "num_key_value_heads": 2}
_GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
_BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}

#: name -> (class of model, class of config, config, attention names, MLP names), ``{}`` the block.
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str, str]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        _GATED,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp",
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        "transformer.h.{}.attn",
        "transformer.h.{}.mlp",
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _PLAIN | {"intermediate_size": 48},
        "gpt_neox.layers.{}.attention",
        "gpt_neox.layers.{}.mlp",
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        _GATED,
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp",
    ),
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GATED | {"head_dim": 8, "sliding_window": 4},
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp",
    ),
    "phi": (
        "PhiForCausalLM",
        "PhiConfig",
        _PLAIN | {"intermediate_size": 48},
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp",
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        _GATED | {"num_local_experts": 4},
        "model.layers.{}.self_attn",
        "model.layers.{}.mlp",
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        _PLAIN | _OPT,
        "model.decoder.layers.{}.self_attn",
        "model.decoder.layers.{}.fc2",
    ),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        _BLOOM,
        "transformer.h.{}.self_attention",
        "transformer.h.{}.mlp",
    ),
    "falcon": (
        "FalconForCausalLM",
        "FalconConfig",
        _PLAIN,
        "transformer.h.{}.self_attention",
        "transformer.h.{}.mlp",
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        _PLAIN | {"intermediate_size": 48},
        "bert.encoder.layer.{}.attention",
        "bert.encoder.layer.{}.output.dense",
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5, "", ""),
}
DECODERS = [name for name in ARCHITECTURES if name not in ("bert", "t5")]


@cache
def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Give the model of an architecture, in eval mode."""
    model_class, config_class, settings, *_ = ARCHITECTURES[name]
    state = torch.get_rng_state()
    torch.manual_seed(7)
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)(config).to(dtype).eval()
    torch.set_rng_state(state)
    return model


def token_ids(batch: int = 2, sequence: int = 5) -> Tensor:
    """Give token ids without the padding id 0; the same ones every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(2, VOCABULARY, (batch, sequence), generator=generator)


class Apply(nn.Module):
    """A module that computes a given function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute it."""
        return self.function(*args, **kwargs)


class Each(nn.Module):
    """Calls each of its children on its input; returns what the last one returns."""

    def __init__(self, **functions: Callable[..., Any] | nn.Module) -> None:
        super().__init__()
        for name, function in functions.items():
            module = function if isinstance(function, nn.Module) else Apply(function)
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        """Call them in order of registration."""
        out = None
        for child in self.children():
            out = child(x)
        return out


class Pair(NamedTuple):
    """A named tuple, as models return them."""

    first: Any
    second: Any


@dataclass
class Output(ModelOutput):
    """A `ModelOutput`, as Hugging Face models return it."""

    loss: Any = None
    logits: Any = None
    hidden: Any = None


def sequential() -> nn.Sequential:
    """Give a plain ``nn.Sequential``, seeded."""
    torch.manual_seed(11)
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Identity(),
        nn.Dropout(0.5),
        nn.LayerNorm(16),
        nn.Linear(16, 4),
    ).eval()
