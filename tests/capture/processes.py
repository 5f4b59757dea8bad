"""Runs a small Llama on four processes in several ways, each captured into a log a rank.

The processes meet by a file and speak gloo, as those of torchrun do; no port is fixed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import actstore
from actstore import HookConfig, HookGranularity, InstrumentationConfig, Parallel

WORLD = 4
SHARDED = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "act_fn")


def llama() -> Any:
    """Give the model: the same one in each process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).eval()


def batches(replica: int = 0) -> list[Tensor]:
    """Give what a replica is fed: prompts of two lengths."""
    generator = torch.Generator().manual_seed(5 + replica)
    return [torch.randint(2, 64, (2, length), generator=generator) for length in (6, 3)]


def feed(model: nn.Module, replica: int, tracker: Any = None) -> None:
    """Run the model on what a replica is fed."""
    with torch.no_grad():
        for number, ids in enumerate(batches(replica)):
            model(ids, use_cache=False)
            if tracker is not None:
                tracker.record_token(40 + number, f"<{number}>")


@contextmanager
def captured(
    model: nn.Module, path: Path, parallel: Parallel | None = None, **how: Any
) -> Iterator[Any]:
    """Capture everything."""
    config = InstrumentationConfig(HookGranularity.FULL_TENSOR, "lz4", max_memory_gb=0.25)
    framework = actstore.InstrumentationFramework(config)
    framework.instrument_model(model, how.pop("hooks", None), parallel=parallel)
    with framework.capture_activations(path, **how) as tracker:
        yield tracker


def clones_of(model: nn.Module, run: Callable[[], None]) -> dict[str, list[np.ndarray[Any, Any]]]:
    """Give what a model's modules returned, by hooks that are no part of actstore."""
    found: dict[str, list[np.ndarray[Any, Any]]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor):
                plain = value.detach().clone()
                found.setdefault(name, []).append((plain + 0).numpy().copy())

        return hook

    handles = [one.register_forward_hook(keep(name)) for name, one in model.named_modules()]
    run()
    for handle in handles:
        handle.remove()
    return found


def work(rank: int, folder: Path) -> None:
    """Run every way, in one process of `WORLD`."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD
    )
    for way in (data, pipeline, data_tensor, pipeline_tensor, hugging_face):
        place = folder / way.__name__
        place.mkdir(exist_ok=True)
        torch.distributed.barrier()
        way(rank, place)
    torch.distributed.barrier()
    killed(rank, folder / "killed")
    torch.distributed.destroy_process_group()


def data(rank: int, folder: Path) -> None:
    """Run a replica a process, which say so."""
    model = llama()
    with captured(model, folder / f"{rank}.stream", Parallel(data=(rank, WORLD))):
        feed(model, rank)


def pipeline(rank: int, folder: Path) -> None:
    """Run a block a process, the way of Hugging Face."""
    model = llama()
    _staged(model, _mesh((WORLD,), ("pp",)))
    with captured(model, folder / f"{rank}.stream", track_per_token=True) as tracker:
        feed(model, 0, tracker)


def data_tensor(rank: int, folder: Path) -> None:
    """Run two replicas of two processes each, the way of PyTorch."""
    model = llama()
    mesh = _mesh((2, 2), ("dp", "tp"))
    _divided(model, mesh["tp"])
    replica = mesh.get_coordinate()[0]
    with captured(model, folder / f"{rank}.stream"):
        clones = clones_of(model, lambda: feed(model, replica))
    np.savez(folder / f"{rank}.npz", **_flat(clones))


def pipeline_tensor(rank: int, folder: Path) -> None:
    """Run two stages of two processes each, which say so."""
    model = llama()
    mesh = _mesh((2, 2), ("pp", "tp"))
    _divided(model, mesh["tp"])
    _staged(model, mesh["pp"])
    stage, place = mesh.get_coordinate()
    parallel = Parallel(pipeline=(stage, 2), tensor=(place, 2))
    with captured(model, folder / f"{rank}.stream", parallel):
        clones = clones_of(model, lambda: feed(model, 0))
    np.savez(folder / f"{rank}.npz", **_flat(clones))


def hugging_face(rank: int, folder: Path) -> None:
    """Run one model divided among all, by its own plan."""
    from transformers.distributed.configuration_utils import DistributedConfig

    if rank == 0:
        llama().save_pretrained(folder / "model")
    torch.distributed.barrier()
    model = LlamaForCausalLM.from_pretrained(
        folder / "model",
        distributed_config=DistributedConfig(tp_size=WORLD),
        attn_implementation="eager",
    ).eval()
    with captured(model, folder / f"{rank}.stream"):
        clones = clones_of(model, lambda: feed(model, 0))
    np.savez(folder / f"{rank}.npz", **_flat(clones))


class Columns(nn.Module):
    """The columns of a linear that one process has."""

    def __init__(self, place: int, size: int) -> None:
        super().__init__()
        self.body = nn.Linear(8, 12)
        torch.manual_seed(1)
        whole = nn.Linear(8, 12)
        part = 12 // size
        self.columns = nn.Linear(8, part)
        with torch.no_grad():
            self.columns.weight.copy_(whole.weight[place * part : (place + 1) * part])
            self.columns.bias.copy_(whole.bias[place * part : (place + 1) * part])

    def forward(self, x: Tensor) -> Tensor:
        """Compute the part of the output."""
        return self.columns(x)


STEPS, DIES_AT = 6, 3
COLUMNS = HookConfig(target_layers=["columns"])


def place_of(rank: int) -> Parallel:
    """Give the place of a process that may be killed."""
    return Parallel(tensor=(rank, WORLD), sharded={"col*": 2}, run_id="a job")


def step(model: nn.Module, number: int) -> None:
    """Run a pass."""
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        model(torch.randn(1, 4, 8, generator=generator))


def killed(rank: int, folder: Path) -> None:
    """Run processes of which one is killed in the middle; none waits for another."""
    folder.mkdir(exist_ok=True)
    model = Columns(rank, WORLD)
    with captured(
        model,
        folder / f"{rank}.stream",
        place_of(rank),
        hooks=COLUMNS,
        track_per_token=True,
        checkpoint_interval_tokens=1,
    ) as tracker:
        for number in range(STEPS):
            step(model, number)
            tracker.record_token(number, str(number))
            if rank == WORLD - 1 and number == DIES_AT - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    os._exit(0)  # the group can't be taken apart without the one that died


def _mesh(shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _divided(model: nn.Module, mesh: Any) -> None:
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    columns = (
        *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *("mlp.gate_proj", "mlp.up_proj"),
    )
    plan: dict[str, Any] = {f"model.layers.*.{name}": ColwiseParallel() for name in columns}
    rows = ("self_attn.o_proj", "mlp.down_proj")
    plan |= {f"model.layers.*.{name}": RowwiseParallel() for name in rows}
    parallelize_module(model, mesh, plan)


def _staged(model: nn.Module, mesh: Any) -> None:
    from transformers.distributed.pipeline_parallel import apply_pipeline_parallelism

    apply_pipeline_parallelism(model, mesh)


def _flat(clones: dict[str, list[np.ndarray[Any, Any]]]) -> dict[str, Any]:
    return {f"{name}|{n}": one for name, many in clones.items() for n, one in enumerate(many)}


def run(folder: Path) -> Path:
    """Run all of it; one of the processes is killed at the end."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, folder)) for rank in range(WORLD)]
    for one in processes:
        one.start()
    for one in processes:
        one.join(300)
    codes = [one.exitcode for one in processes]
    for one in processes:
        if one.is_alive():
            one.kill()
    if codes != [0] * (WORLD - 1) + [-signal.SIGKILL]:
        msg = f"the processes ended with {codes}"
        raise RuntimeError(msg)
    return folder
