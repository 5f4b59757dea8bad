"""A tracked capture that can be killed and resumed: the child process of ``01_main_job.py``.

Arguments: the log, the number of tokens. Prints a line when each token is recorded.
"""

from __future__ import annotations

import sys
import warnings

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from actstore import HookGranularity, InstrumentationConfig, InstrumentationFramework

PROMPT = [[5, 9, 2, 7]]
INTERVAL = 4


def main() -> None:
    """Generate by feeding everything again, as API.md does; resume where a log is there."""
    log, steps = sys.argv[1], int(sys.argv[2])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    framework = InstrumentationFramework(
        InstrumentationConfig(HookGranularity.FULL_TENSOR, "zstd", max_memory_gb=0.002)
    )
    framework.instrument_model(model)
    with (
        torch.no_grad(),
        framework.capture_activations(
            log,
            track_per_token=True,
            checkpoint_interval_tokens=INTERVAL,
            resume_from_checkpoint=True,
        ) as tracker,
    ):
        known = [token["token_id"] for token in tracker.tokens]
        ids = torch.tensor([[*PROMPT[0], *known]])
        print(f"begun {len(known)}", flush=True)
        while len(tracker.tokens) < steps:
            following = model(ids).logits[:, -1, :].argmax(dim=-1, keepdim=True)
            tracker.record_token(following[0].item(), f"<{following.item()}>")
            ids = torch.cat([ids, following], dim=-1)
            print(f"token {len(tracker.tokens)}", flush=True)


if __name__ == "__main__":
    main()
