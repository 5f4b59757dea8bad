"""Train the small Llama of ``examples/tiny-llama`` on documentation text that Python installs.

Owns the corpus, the tokenizer, the training and the measured report that the model card quotes.
``--minutes`` bounds the training, which goes on from its last checkpoint if it was interrupted;
``--report`` trains nothing and measures the model in ``--out``. Needs ``torch``, ``transformers``,
``tokenizers`` and ``safetensors``, and no network.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

HERE = Path(__file__).parent / "tiny-llama"
PACKAGES = ("numpy", "pandas", "xarray", "zarr", "dask", "matplotlib")
SKIPPED = frozenset({"test", "tests", "idlelib", "site-packages"})
PROMPTS = ("Return a new array", "The following exceptions")
COLUMNS = (
    "weights",
    "dtype",
    "block",
    "rms",
    "max / rms",
    "kurtosis",
    "features over 6 rms",
    "largest feature rms / median",
    "`<s>` norm / median",
    "max / rms, no `<s>`",
    "features over 6 rms, no `<s>`",
)
SITES = ("q_proj", "k_proj", "v_proj", "o_proj", "act_fn", "down_proj")
SITE_COLUMNS = (
    "weights",
    "module",
    "kurtosis",
    "largest feature rms / median",
    "features with over 3 times the median rms",
)
VOCABULARY = 2048
WINDOW = 256
BATCH = 16
MEASURED = 64
HELD_OUT_EVERY = 33
LEARNING_RATE = 2.5e-3
SAVE_EVERY = 120.0


def documents() -> dict[str, str]:
    """Map each text of more than 150 characters to the source that it was first found in."""
    found = {inspect.cleandoc(text): "pydoc topics" for text in topics.topics.values()}
    for source, folder in _folders():
        for path in sorted(folder.rglob("*.py")):
            if not SKIPPED & set(path.relative_to(folder).parts):
                for text in _docstrings(path):
                    found.setdefault(text, source)
    return {text: source for text, source in found.items() if len(text) > 150}


def _folders() -> Iterator[tuple[str, Path]]:
    yield "standard library", Path(ast.__file__).parent
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            yield name, Path(spec.origin).parent


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Hold out one document in ``HELD_OUT_EVERY``, by its hash."""
    held = [text for text in texts if _hash(text) % HELD_OUT_EVERY == 0]
    return [text for text in texts if _hash(text) % HELD_OUT_EVERY], held


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts ``<s>`` before a text."""
    special = ["<s>", "</s>", "<pad>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet
        ),
    )
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save the tokenizer under the class name that transformers 4 and 5 both know."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    found |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512}
    found["model_input_names"] = ["input_ids", "attention_mask"]
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Give all texts as one row of ids, each beginning with ``<s>``."""
    return torch.tensor([one for text in texts for one in tokenizer(text)["input_ids"]])


def make_model() -> LlamaForCausalLM:
    """Give the untrained model: 2.3 million parameters, so that bfloat16 fits in 5 MB."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


class Run:
    """A training run: what is saved in a checkpoint, and what goes on from one.

    Parameters
    ----------
    model : LlamaForCausalLM
        The model to train, in float32.
    checkpoint : Path
        The file to save to every ``SAVE_EVERY`` seconds, and to go on from where it exists.
    """

    def __init__(self, model: LlamaForCausalLM, checkpoint: Path) -> None:
        matrices = [one for one in model.parameters() if one.ndim > 1]
        vectors = [one for one in model.parameters() if one.ndim == 1]
        self.model, self.checkpoint = model, checkpoint
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
            betas=(0.9, 0.95),
        )
        self.generator = torch.Generator().manual_seed(0)
        self.step, self.seconds = 0, 0.0
        if checkpoint.exists():
            self._load(torch.load(checkpoint, weights_only=True))

    def _load(self, state: dict[str, object]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step, self.seconds = state["step"], state["seconds"]

    def save(self) -> None:
        """Write the checkpoint beside its place and move it there, so that one is always whole."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        part.replace(self.checkpoint)

    def advance(self, ids: torch.Tensor, done: float) -> float:
        """Take one step on random windows of ``ids``, with ``done`` of the time spent."""
        rate = LEARNING_RATE * min(1.0, (self.step + 1) / 100) * (0.02 + 0.98 * _cosine(done))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(ids) - WINDOW, (BATCH,), generator=self.generator)
        batch = torch.stack([ids[start : start + WINDOW] for start in starts])
        loss = self.model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.item()


def train(run: Run, ids: torch.Tensor, held: torch.Tensor, minutes: float) -> None:
    """Train for so many minutes of wall time; the learning rate follows the clock."""
    last = saved = time.monotonic()
    while (done := run.seconds / (60 * minutes)) < 1:
        loss = run.advance(ids, done)
        if run.step % 200 == 0:
            found = loss_on(run.model, held, 40)
            print(f"{done:.0%} step {run.step} loss {loss:.3f} held {found:.3f}", flush=True)
        now = time.monotonic()
        run.seconds, last = run.seconds + now - last, now
        if now - saved > SAVE_EVERY:
            run.save()
            saved = now
    print(f"{run.step} steps of {BATCH * WINDOW} tokens in {run.seconds / 60:.1f} minutes")


def _cosine(done: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def _windows(ids: torch.Tensor) -> torch.Tensor:
    return ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)


@torch.no_grad()
def loss_on(model: LlamaForCausalLM, ids: torch.Tensor, most: int | None = None) -> float:
    """Give the mean loss, in nats a token, over windows of ``ids``."""
    windows = _windows(ids)[:most]
    model.eval()
    losses = [model(part, labels=part).loss.item() * len(part) for part in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(windows)


def unigram_loss(ids: torch.Tensor, targets: torch.Tensor) -> float:
    """Give the loss on ``targets``, in nats a token, of the token frequencies of ``ids``."""
    counts = torch.bincount(ids, minlength=VOCABULARY).double() + 1
    return float(-(counts / counts.sum()).log()[targets].mean())


def byte_count(tokenizer: PreTrainedTokenizerFast, targets: torch.Tensor) -> int:
    """Count the bytes of text that ``targets`` stand for; ``<s>`` stands for none."""
    special = set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(list(range(VOCABULARY)))
    sizes = [0 if place in special else len(name) for place, name in enumerate(names)]
    return int(torch.tensor(sizes)[targets].sum())


def long_lines(text: str) -> list[str]:
    """Give the lines of 40 characters or more, which two documents seldom share by chance."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= 40]


@torch.no_grad()
def block_outputs(model: LlamaForCausalLM, windows: torch.Tensor) -> list[torch.Tensor]:
    """Give the residual stream after each decoder block, in float64."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda _module, _inputs, out: found.append(
                (out[0] if isinstance(out, tuple) else out).double()
            )
        )
        for layer in model.model.layers
    ]
    model.eval()(windows)
    for handle in handles:
        handle.remove()
    return found


def statistics(found: torch.Tensor) -> list[str]:
    """Give one block's cells of the table: ``found`` is windows, positions, features."""
    rms = found.pow(2).mean().sqrt()
    kurtosis = found.pow(4).mean() / rms.pow(4)
    norms = found.norm(dim=-1)
    each = found.pow(2).mean((0, 1)).sqrt()
    peaks = found.abs().amax((0, 1))
    later = found[:, 1:]
    later_peaks = later.abs().amax((0, 1)) / later.pow(2).mean().sqrt()
    return [
        f"{rms:.3f}",
        f"{peaks.max() / rms:.1f}",
        f"{kurtosis:.2f}",
        f"{int((peaks > 6 * rms).sum())}",
        f"{each.max() / each.median():.2f}",
        f"{norms[:, 0].median() / norms.median():.2f}",
        f"{later_peaks.max():.1f}",
        f"{int((later_peaks > 6).sum())}",
    ]


@torch.no_grad()
def site_outputs(model: LlamaForCausalLM, windows: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Give the outputs of the modules inside the blocks, by the end of their name, in float64."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in SITES}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, _inputs, out: found[name].append(out.double())

    handles = [
        module.register_forward_hook(keep(site))
        for name, module in model.named_modules()
        for site in SITES
        if name.endswith(f".{site}")
    ]
    model.eval()(windows)
    for handle in handles:
        handle.remove()
    return found


def site_statistics(blocks: list[torch.Tensor]) -> list[str]:
    """Give one site's cells of the table, each the range over its blocks."""
    kurtosis, shares, counts = [], [], []
    for found in blocks:
        rms = found.pow(2).mean().sqrt()
        each = found.pow(2).mean((0, 1)).sqrt()
        kurtosis.append(float(found.pow(4).mean() / rms.pow(4)))
        shares.append(float(each.max() / each.median()))
        counts.append(int((each > 3 * each.median()).sum()))
    return [
        f"{min(kurtosis):.1f}–{max(kurtosis):.1f}",
        f"{min(shares):.2f}–{max(shares):.2f}",
        f"{min(counts)}–{max(counts)} of {blocks[0].shape[-1]}",
    ]


def report_corpus(found: dict[str, str], tokenizer: PreTrainedTokenizerFast) -> None:
    """Print a table of the sources: version, documents, bytes, tokens."""
    print("| source | version | documents | bytes | tokens |\n|---|---|---|---|---|")
    for source in dict.fromkeys(found.values()):
        texts = [text for text, where in found.items() if where == source]
        known = source in PACKAGES
        version = importlib.metadata.version(source) if known else platform.python_version()
        size = sum(len(text.encode()) for text in texts)
        count = len(encode(tokenizer, texts))
        print(f"| {source} | {version} | {len(texts)} | {size} | {count} |")


def report_losses(folder: Path, train_texts: list[str], held_texts: list[str]) -> None:
    """Print the losses of the saved weights: held out, held out and unlike, and trained on."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = {line for text in train_texts for line in long_lines(text)}
    lines = [line for text in held_texts for line in long_lines(text)]
    share = sum(line in known for line in lines) / len(lines)
    unlike = [text for text in held_texts if known.isdisjoint(long_lines(text))]
    print(f"held-out lines of 40 characters or more that stand in the training text: {share:.1%}")
    print(f"held-out documents without any such line: {len(unlike)} of {len(held_texts)}\n")
    ids, held = in_order(tokenizer, train_texts), encode(tokenizer, held_texts)
    rows = {
        "held out": held,
        "held out, documents without shared lines": encode(tokenizer, unlike),
        "training text, as much as is held out": ids[: len(held)],
    }
    heads = ["text", "tokens", "bytes", "unigram", "bfloat16", "float32", "bits a byte, float32"]
    print(f"| {' | '.join(heads)} |\n" + "|---" * len(heads) + "|")
    for name, row in rows.items():
        targets = _windows(row)[:, 1:]
        size = byte_count(tokenizer, targets)
        losses = [
            loss_on(LlamaForCausalLM.from_pretrained(folder, dtype=dtype), row)
            for dtype in (torch.bfloat16, torch.float32)
        ]
        bits = losses[1] * targets.numel() / size / math.log(2)
        found = [unigram_loss(ids, targets), *losses, bits]
        cells = [name, str(targets.numel()), str(size), *(f"{one:.3f}" for one in found)]
        print(f"| {' | '.join(cells)} |")


def report_samples(folder: Path) -> None:
    """Print what the model writes after ``PROMPTS``, greedily and sampled with seed 0."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ways = {"greedy": {"do_sample": False}}
    ways["sampled"] = {"do_sample": True, "temperature": 0.7, "top_k": 50}
    for prompt in PROMPTS:
        fed = tokenizer(prompt, return_tensors="pt")
        for name, way in ways.items():
            torch.manual_seed(0)
            out = model.generate(**fed, max_new_tokens=80, **way)
            print(f"\n--- {name}\n{tokenizer.decode(out[0])}")


def report_statistics(folder: Path, texts: list[str]) -> None:
    """Print the tables of the blocks' and their modules' outputs, trained and random."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(text)["input_ids"][:WINDOW] for text in texts]
    windows = torch.tensor([row for row in rows if len(row) == WINDOW][:MEASURED])
    print(f"\nblock outputs on {len(windows)} held-out documents' first {WINDOW} tokens")
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    for weights in ("trained", "random"):
        for dtype in (torch.bfloat16, torch.float32):
            model = make_model()
            if weights == "trained":
                model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            model = model.to(torch.bfloat16).to(dtype)
            name = str(dtype).removeprefix("torch.")
            for block, found in enumerate(block_outputs(model, windows)):
                cells = [weights, name, str(block), *statistics(found)]
                print(f"| {' | '.join(cells)} |")
    print("\noutputs of the modules inside the blocks, float32, the range over the blocks")
    print(f"| {' | '.join(SITE_COLUMNS)} |")
    print("|---" * len(SITE_COLUMNS) + "|")
    for weights in ("trained", "random"):
        model = make_model()
        if weights == "trained":
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for site, blocks in site_outputs(model, windows).items():
            print(f"| {' | '.join([weights, f'`{site}`', *site_statistics(blocks)])} |")


def report(folder: Path, found: dict[str, str]) -> None:
    """Print all that the model card says of the model in ``folder``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train_texts, held_texts = split(list(found))
    report_corpus(found, tokenizer)
    for name, texts in (("training", train_texts), ("held out", held_texts)):
        size = sum(len(text.encode()) for text in texts)
        tokens = len(encode(tokenizer, texts))
        print(f"\n{name}: {len(texts)} documents, {size} bytes, {tokens} tokens")
    report_losses(folder, train_texts, held_texts)
    report_samples(folder)
    report_statistics(folder, held_texts)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in files}
    print(f"\nfiles, {sum(sizes.values())} bytes in all: {sizes}")


def in_order(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode the training texts in the shuffled order that the training uses."""
    order = np.random.default_rng(0).permutation(len(texts))
    return encode(tokenizer, [texts[place] for place in order])


def make(folder: Path, found: dict[str, str], minutes: float) -> None:
    """Train the tokenizer and the model, and save both in ``folder``, weights in bfloat16."""
    folder.mkdir(parents=True, exist_ok=True)
    train_texts, held_texts = split(list(found))
    tokenizer = make_tokenizer(train_texts)
    save_tokenizer(tokenizer, folder)
    checkpoint = folder / "checkpoint.pt"
    run = Run(make_model(), checkpoint)
    train(run, in_order(tokenizer, train_texts), encode(tokenizer, held_texts), minutes)
    run.model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    checkpoint.unlink(missing_ok=True)


def main() -> None:
    """Train, save and report; or report only."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=32.0, help="wall time of the training")
    parser.add_argument("--out", type=Path, default=HERE, help="the model's folder")
    parser.add_argument("--report", action="store_true", help="train nothing, measure --out")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = documents()
    if not options.report:
        make(options.out, found, options.minutes)
    report(options.out, found)


if __name__ == "__main__":
    main()
