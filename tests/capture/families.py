"""Model families, built small with random weights, and the modules that each site must be.

The names are written by hand from the families' own code: they are the oracle of the selection.
``{}`` stands for the index of a block. README's table of families is made of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final

import torch
import transformers
from torch import Tensor, nn

VOCABULARY: Final = 64
_PLAIN: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MLP: Final = _PLAIN | {"intermediate_size": 48}
_GATED: Final = _MLP | {"num_key_value_heads": 2}
_T5: Final = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
_BART: Final = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_MOE: Final = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_TOWER: Final = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 16,
}
Inputs = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True, slots=True)
class Family:
    """A family of models.

    Attributes
    ----------
    model, config : str
        Classes of transformers.
    settings : mapping
        Of a small one.
    sites : mapping of str to str
        Site -> the name of its module, ``{}`` for the block.
    inputs : callable
        Gives what it is fed.
    axes : mapping of str to (int, int)
        Token axis -> batch and sequence of those inputs.
    """

    model: str
    config: str
    settings: dict[str, Any]
    sites: dict[str, str]
    inputs: Inputs
    axes: dict[str, tuple[int, int]] = field(default_factory=lambda: {"token": (2, 5)})


def ids(batch: int = 2, sequence: int = 5) -> Tensor:
    """Give token ids without special ones; the same every time."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(4, VOCABULARY - 2, (batch, sequence), generator=generator)


def _tokens() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _pair() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids(2, 3)}


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def _image() -> dict[str, Tensor]:
    return {"pixel_values": _floats(2, 3, 32, 32)}


def _sound() -> dict[str, Tensor]:
    return {"input_features": _floats(2, 8, 32), "decoder_input_ids": ids(2, 3)}


def _picture_and_text() -> dict[str, Tensor]:
    given = ids(2, 9)
    given[:, 1:5] = VOCABULARY - 1
    return {"input_ids": given, **_image()}


def _decoder(blocks: str, attention: str, mlp: str, **others: str) -> dict[str, str]:
    """Give the sites of a decoder whose blocks stand at ``blocks``."""
    inside = {"attn": attention, "mlp": mlp}
    return {site: f"{blocks}.{name}" for site, name in inside.items()} | {"resid": blocks} | others


def _llama(**others: str) -> dict[str, str]:
    outside = {"embed": "model.embed_tokens", "final_norm": "model.norm", "logits": "lm_head"}
    return _decoder("model.layers.{}", "self_attn", "mlp", **(outside | others))


def _mamba(norm: str) -> dict[str, str]:
    return {
        "resid": "backbone.layers.{}",
        "embed": "backbone.embeddings",
        "final_norm": norm,
        "logits": "lm_head",
    }


_T5_SITES: Final = {
    "encoder_attn": "encoder.block.{}.layer.0.SelfAttention",
    "encoder_mlp": "encoder.block.{}.layer.1.DenseReluDense",
    "encoder_resid": "encoder.block.{}",
    "encoder_final_norm": "encoder.final_layer_norm",
    "decoder_attn": "decoder.block.{}.layer.0.SelfAttention",
    "decoder_cross_attn": "decoder.block.{}.layer.1.EncDecAttention",
    "decoder_mlp": "decoder.block.{}.layer.2.DenseReluDense",
    "decoder_resid": "decoder.block.{}",
    "decoder_final_norm": "decoder.final_layer_norm",
    "logits": "lm_head",
}
_BART_SITES: Final = {
    "encoder_attn": "model.encoder.layers.{}.self_attn",
    "encoder_mlp": "model.encoder.layers.{}.fc2",
    "encoder_resid": "model.encoder.layers.{}",
    "decoder_attn": "model.decoder.layers.{}.self_attn",
    "decoder_cross_attn": "model.decoder.layers.{}.encoder_attn",
    "decoder_mlp": "model.decoder.layers.{}.fc2",
    "decoder_resid": "model.decoder.layers.{}",
}
_PAIR_AXES: Final = {"encoder_token": (2, 5), "decoder_token": (2, 3)}

FAMILIES: Final[dict[str, Family]] = {
    "Llama": Family("LlamaForCausalLM", "LlamaConfig", _GATED, _llama(), _tokens),
    "GPT-2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        _decoder(
            "transformer.h.{}",
            "attn",
            "mlp",
            embed="transformer.wte",
            final_norm="transformer.ln_f",
            logits="lm_head",
        ),
        _tokens,
    ),
    "GPT-NeoX": Family(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _MLP,
        _decoder(
            "gpt_neox.layers.{}",
            "attention",
            "mlp",
            embed="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            logits="lm_head",
        ),
        _tokens,
    ),
    "Qwen2": Family("Qwen2ForCausalLM", "Qwen2Config", _GATED, _llama(), _tokens),
    "Qwen3": Family(
        "Qwen3ForCausalLM", "Qwen3Config", _GATED | {"head_dim": 8}, _llama(), _tokens
    ),
    "Qwen3-MoE": Family(
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig", _GATED | _MOE | {"head_dim": 8}, _llama(), _tokens
    ),
    "Gemma 2": Family(
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GATED | {"head_dim": 8, "sliding_window": 4},
        _llama(),
        _tokens,
    ),
    "Gemma 3": Family(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _GATED | {"head_dim": 8, "sliding_window": 4},
        _llama(),
        _tokens,
    ),
    "Phi": Family(
        "PhiForCausalLM",
        "PhiConfig",
        _MLP,
        _llama(final_norm="model.final_layernorm"),
        _tokens,
    ),
    "OLMo 2": Family("Olmo2ForCausalLM", "Olmo2Config", _GATED, _llama(), _tokens),
    "Mixtral": Family(
        "MixtralForCausalLM",
        "MixtralConfig",
        _GATED | {"num_local_experts": 4},
        _llama(),
        _tokens,
    ),
    "DeepSeek-V3": Family(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        _GATED
        | {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        _llama(),
        _tokens,
    ),
    "gpt-oss": Family(
        "GptOssForCausalLM",
        "GptOssConfig",
        _GATED | {"head_dim": 8, "num_local_experts": 4, "sliding_window": 4},
        _llama(),
        _tokens,
    ),
    "OPT": Family(
        "OPTForCausalLM",
        "OPTConfig",
        _PLAIN | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
        _decoder(
            "model.decoder.layers.{}",
            "self_attn",
            "fc2",
            embed="model.decoder.embed_tokens",
            final_norm="model.decoder.final_layer_norm",
            logits="lm_head",
        ),
        _tokens,
    ),
    "Bloom": Family(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        _decoder(
            "transformer.h.{}",
            "self_attention",
            "mlp",
            embed="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            logits="lm_head",
        ),
        _tokens,
    ),
    "Falcon": Family(
        "FalconForCausalLM",
        "FalconConfig",
        _PLAIN,
        _decoder(
            "transformer.h.{}",
            "self_attention",
            "mlp",
            embed="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            logits="lm_head",
        ),
        _tokens,
    ),
    "Mamba": Family(
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        _mamba("backbone.norm_f"),
        _tokens,
    ),
    "Mamba 2": Family(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "expand": 2,
        },
        _mamba("backbone.norm_f"),
        _tokens,
    ),
    "BERT": Family(
        "BertForMaskedLM",
        "BertConfig",
        _MLP,
        _decoder(
            "bert.encoder.layer.{}",
            "attention",
            "output.dense",
            embed="bert.embeddings.word_embeddings",
            logits="cls.predictions.decoder",
        ),
        _tokens,
    ),
    "RoBERTa": Family(
        "RobertaForMaskedLM",
        "RobertaConfig",
        _MLP | {"max_position_embeddings": 64},
        _decoder(
            "roberta.encoder.layer.{}",
            "attention",
            "output.dense",
            embed="roberta.embeddings.word_embeddings",
            logits="lm_head.decoder",
        ),
        _tokens,
    ),
    "DistilBERT": Family(
        "DistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "pad_token_id": 0,
        },
        _decoder(
            "distilbert.transformer.layer.{}",
            "attention",
            "ffn",
            embed="distilbert.embeddings.word_embeddings",
            logits="vocab_projector",
        ),
        _tokens,
    ),
    "ViT": Family(
        "ViTForImageClassification",
        "ViTConfig",
        _TOWER,
        _decoder("vit.layers.{}", "attention", "mlp", final_norm="vit.layernorm"),
        _image,
        {"token": (2, 5)},
    ),
    "T5": Family("T5ForConditionalGeneration", "T5Config", _T5, _T5_SITES, _pair, _PAIR_AXES),
    "BART": Family(
        "BartForConditionalGeneration",
        "BartConfig",
        _BART | {"max_position_embeddings": 64},
        _BART_SITES | {"logits": "lm_head"},
        _pair,
        _PAIR_AXES,
    ),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _BART | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16},
        _BART_SITES
        | {
            "encoder_final_norm": "model.encoder.layer_norm",
            "decoder_final_norm": "model.decoder.layer_norm",
            "logits": "proj_out",
        },
        _sound,
        {"encoder_token": (2, 16), "decoder_token": (2, 3)},
    ),
    "LLaVA": Family(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {"model_type": "clip_vision_model", "projection_dim": 32, **_TOWER},
            "text_config": {"model_type": "llama", **_GATED},
            "image_token_index": VOCABULARY - 1,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -1,
        },
        _decoder(
            "model.language_model.layers.{}",
            "self_attn",
            "mlp",
            embed="model.language_model.embed_tokens",
            final_norm="model.language_model.norm",
            logits="lm_head",
        )
        | {
            "vision_attn": "model.vision_tower.encoder.layers.{}.self_attn",
            "vision_mlp": "model.vision_tower.encoder.layers.{}.mlp",
            "vision_resid": "model.vision_tower.encoder.layers.{}",
        },
        _picture_and_text,
        {"vision_token": (2, 5), "token": (2, 9)},
    ),
}


@cache
def build(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> nn.Module:
    """Give the model of a family, seeded, in eval mode."""
    family = FAMILIES[name]
    state = torch.get_rng_state()
    torch.manual_seed(7)
    config = getattr(transformers, family.config)(**family.settings, **settings)
    model = getattr(transformers, family.model)(config).to(dtype).eval()
    torch.set_rng_state(state)
    return model


def feed(name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Give what a family's model is fed, floats in the model's dtype."""
    given = FAMILIES[name].inputs()
    return {key: one.to(dtype) if one.is_floating_point() else one for key, one in given.items()}


def modules(name: str, *sites: str) -> list[str]:
    """Give the names of the modules of some sites (their ends), block by block."""
    family = FAMILIES[name]
    found = []
    for site, pattern in family.sites.items():
        if site in sites or any(site.endswith(f"_{one}") for one in sites):
            blocks = (0, 1) if "{}" in pattern else (0,)
            found += [pattern.format(block) for block in blocks]
    return found
