"""How fast, small and readable peers leave the same block outputs on disk.

Run by ``.venv/bin/python tests/benchmarks/peers.py --install``, which first makes an environment
a peer in ``--venvs``, by pip and its settings (an index with CPU builds of torch keeps 3 GB of
CUDA libraries out of each). ``--peers`` and ``--cases`` take some of them (``nnsight``,
``bfloat16 decode``), ``--rounds``, ``--passes``, ``--steps`` and ``--folder`` the rest.

The model is ``speed_kept.py``'s Llama of random weights (d = 1024, 8 blocks), saved once; the
work is 8 forwards of 512 tokens, or 128 steps of decoding with a cache. "kept" is tokens a second
captured, to those of the plain runs before and after it in the same process, the median of the
rounds (and their range): from opening the file until all is durable on disk. "recorded" compares
what a fresh process reads back with what plain hooks saw, bit for bit. "RSS" is the peak over the
loaded model, captured (plain). "read" is from opening until one layer of all passes is an array,
in a fresh process that has read another one (so imports are done), the files still in the page
cache. The oracle keeps its clones in memory and saves once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).parents[2]

from machine import machine
from peer_captures import LAYERS, PEERS
from speed_kept import load
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TORCH = "torch==2.13.0"
#: The peers that need an environment of their own, and what is installed in it with torch.
OWN = {
    "nnsight": ("nnsight==0.8.1", "transformers==5.24.0"),
    # 5.24 renamed the cache: this bridge misses it there, and a step sees no earlier one
    "TransformerLens": ("transformer-lens==4.3.0", "transformers==5.9.0"),
    "TorchLens": ("torchlens==2.36.1", "transformers==5.24.0"),
    "SAELens": ("sae-lens==6.54.12", "transformers==5.24.0"),
    "llm-instrumentation": ("llm-instrumentation==1.3.1", "transformers==5.24.0"),
}
SECONDS = 3600


class PeerError(Exception):
    """A peer that could not be installed or run, and the last thing it said."""


def python(venvs: Path, peer: str) -> Path:
    """Give the interpreter that runs a peer."""
    if peer not in OWN:
        return Path(sys.executable)
    return venvs / OWN[peer][0].partition("==")[0] / "bin/python"


def call(command: Sequence[str | Path], env: dict[str, str] | None = None) -> str:
    """Run a command; give what it printed."""
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        raise PeerError(f"took more than {SECONDS} s") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["nothing said"]
        raise PeerError(f"exit {done.returncode}: {said[-1]}")
    return done.stdout


def install(venvs: Path, peer: str) -> str:
    """Make a peer's environment where it is missing; give why that failed, or nothing."""
    target = python(venvs, peer)
    if peer not in OWN or target.exists():
        return ""
    folder = target.parents[1]
    try:
        call([sys.executable, "-m", "venv", folder])
        call([target, "-m", "pip", "install", "--quiet", TORCH, *OWN[peer]])
    except PeerError as error:
        shutil.rmtree(folder)
        return str(error)
    return ""


def save_model(dtype: str, folder: Path) -> Path:
    """Save the model, with a tokenizer of no meaning, for the peers that insist on one."""
    load("llama-1024", dtype).save_pretrained(folder)
    words = models.WordLevel({f"w{one}": one for one in range(8192)}, unk_token="w0")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="w1", eos_token="w2", pad_token="w2"
    ).save_pretrained(folder)
    return folder


def run(
    interpreter: Path, peer: str, out: Path, oracle: Path, options: Sequence[str | Path]
) -> dict[str, Any]:
    """Measure a peer, then read what it left and compare it with the oracle's."""
    if not interpreter.exists():
        raise PeerError("not installed: see --install")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if peer.startswith("actstore"):
        env["PYTHONPATH"] = str(ROOT)
    script = [interpreter, Path(__file__).with_name("peer_process.py"), peer, "--out", out]
    said = json.loads(call([*script, *options], env).splitlines()[-1])
    if "skipped" in said:
        return said
    return said | json.loads(call([*script, "--oracle", oracle], env).splitlines()[-1])


def work_of(
    peers: dict[str, str], work: str, venvs: Path, folder: Path, options: Sequence[str | Path]
) -> list[str]:
    """Have peers (with why they can't be run, or nothing) do one kind of work; give the rows."""
    rows: list[str] = []
    oracle: dict[str, Any] = {}
    for peer, reason in peers.items():
        own = folder / peer.replace(" ", "-")
        own.mkdir(parents=True)
        try:
            if reason:
                raise PeerError(f"not installed: {reason}")
            where = folder / "oracle/run"
            said = run(python(venvs, peer), peer, own / "run", where, options)
        except PeerError as error:
            if peer == "oracle":
                raise
            said = {"skipped": str(error)}
        oracle = oracle or said
        rows.append(row(work, peer, said, oracle))
        print(rows[-1], file=sys.stderr, flush=True)
        if peer != "oracle":
            shutil.rmtree(own)
    shutil.rmtree(folder)
    return rows


def recorded(said: dict[str, Any], oracle: dict[str, Any]) -> str:
    """Say what a peer recorded, beside the oracle."""
    if "missing" in said:
        return "nothing"
    as_dtype = "" if said["dtype"] == oracle["dtype"] else f" as {said['dtype']}"
    if said["digest"] == oracle["digest"] and said["equal"] == len(LAYERS):
        return f"equal{as_dtype}"
    return f"{said['equal']} of {len(LAYERS)} equal{as_dtype}, off by ≤ {said['off']:.1e}"


def row(work: str, peer: str, said: dict[str, Any], oracle: dict[str, Any]) -> str:
    """Give what a peer did of a kind of work as a line of the table."""
    start = f"| {work} | {OWN.get(peer, (peer,))[0].replace('==', ' ')} | "
    if "skipped" in said:
        return f"{start}{said['skipped']} | | | | | | |"
    read = "–" if "missing" in said else f"{1e3 * said['seconds']:,.1f}"
    return start + (
        f"{recorded(said, oracle)} | "
        f"{said['kept']:.3f} ({said['kept_low']:.2f}–{said['kept_high']:.2f}) | "
        f"{said['tokens_per_second']:,.0f} ({said['plain_tokens_per_second']:,.0f}) | "
        f"{said['bytes'] / 1e6:,.1f} | {said['peak_mb']:,.0f} ({said['plain_peak_mb']:,.0f}) | "
        f"{read} | {said['torch']}, {said['transformers']} |"
    )


def main(argv: Sequence[str]) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--install", action="store_true", help="make what is missing in --venvs")
    parser.add_argument("--venvs", type=Path, default=Path.home() / ".cache/actstore-peers")
    parser.add_argument("--peers", nargs="*", default=[""], help="parts of their names")
    parser.add_argument("--cases", nargs="*", default=[""], help="words that a case has, each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=8, help="forwards of a prompt")
    parser.add_argument("--steps", type=int, default=128, help="of decoding")
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    wanted = [one for one in PEERS if any(part in one for part in given.peers)]
    wanted = ["oracle", *(one for one in wanted if one != "oracle")]
    peers = {one: install(given.venvs, one) if given.install else "" for one in wanted}
    rows = []
    with tempfile.TemporaryDirectory(dir=given.folder.resolve()) as folder:
        for dtype, phase in product(("float32", "bfloat16"), ("prefill", "decode")):
            if not any(set(words.split()) <= {dtype, phase} for words in given.cases):
                continue
            passes = given.passes if phase == "prefill" else given.steps
            rows += work_of(
                peers,
                f"{dtype} {phase}",
                given.venvs,
                Path(folder, f"{dtype}-{phase}"),
                [
                    "--model", save_model(dtype, Path(folder, dtype)), "--dtype", dtype,
                    "--phase", phase, "--passes", str(passes), "--rounds", str(given.rounds),
                ],
            )  # fmt: skip
    print(f"{machine()}\n")
    print(
        "| work | peer | recorded | kept | tokens/s (plain) | MB on disk | RSS MB (plain) | "
        "read ms | torch, transformers |\n|---|---|---|---|---|---|---|---|---|"
    )
    print("\n".join(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
