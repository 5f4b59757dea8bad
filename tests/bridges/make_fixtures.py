"""Makes ``files/``: small files of other tools, written by their own code, and what is in them.

Run by hand, one package at a time, by a Python that has it::

    python tests/bridges/make_fixtures.py saelens            # sae-lens 6.54.12, datasets 5.2.0
    python tests/bridges/make_fixtures.py transformer_lens   # transformer-lens 3.9.0
    python tests/bridges/make_fixtures.py nnsight            # nnsight 0.8.1
    python tests/bridges/make_fixtures.py vllm DIR           # vllm 0.33.0, the wheel unpacked
    python tests/bridges/make_fixtures.py activault DIR      # a checkout of db6d1e4
    python tests/bridges/make_fixtures.py saev DIR           # a checkout of 3d73f1f
    python tests/bridges/make_fixtures.py saev_pypi DIR      # saev 0.1.0, the wheel unpacked

What a model computed is also saved, by NumPy, in ``<name>.npz``: the oracle of the tests. Of vLLM,
activault and saev the code that writes files is run, and not the engine, the upload or the model
around it: modules that these need are replaced by empty ones.
"""

from __future__ import annotations

import copy
import importlib
import importlib.machinery
import importlib.util
import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

FILES = Path(__file__).resolve().parent / "files"


def emptied(name: str) -> Path:
    folder = FILES / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def stub(name: str, **members: Any) -> types.ModuleType:
    """Let a module be importable that isn't there; anything can be taken from it."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    module.__getattr__ = lambda wanted: members.get(wanted, type(wanted, (), {}))
    sys.modules[name] = module
    return module


def package(name: str, place: Path) -> None:
    """Let a package's modules be imported without what it imports itself."""
    module = types.ModuleType(name)
    module.__path__ = [str(place)]
    sys.modules[name] = module


def loaded(name: str, path: Path) -> Any:
    """Import one file of a package whose other modules are stubs."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def tiny_hooked_transformer() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=2,
        d_model=8,
        n_ctx=16,
        d_head=4,
        n_heads=2,
        d_vocab=32,
        act_fn="gelu",
        seed=1,
        device="cpu",
    )
    return HookedTransformer(config)


def saelens(*_: str) -> None:
    from datasets import Dataset
    from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig

    folder = emptied("saelens")
    model = tiny_hooked_transformer()
    model.tokenizer = mock.Mock(bos_token_id=0, eos_token_id=0, sep_token_id=None)
    tokens = torch.randint(1, 32, (12, 6), generator=torch.Generator().manual_seed(2))
    config = CacheActivationsRunnerConfig(
        dataset_path="none",
        model_name="tiny",
        model_batch_size=2,
        hook_name="blocks.1.hook_resid_pre",
        d_in=8,
        training_tokens=48,
        context_size=6,
        new_cached_activations_path=str(folder),
        shuffle=False,
        device="cpu",
        prepend_bos=False,
        streaming=False,
        buffer_size_gb=4 * 6 * 8 * 4 / 1e9,  # of four sequences: two shards
    )
    dataset = Dataset.from_list([{"tokens": row} for row in tokens.tolist()])
    with mock.patch("sae_lens.cache_activations_runner.load_model", return_value=model):
        made = CacheActivationsRunner(config, override_dataset=dataset).run()
    ids = np.array(made["token_ids"])
    _, cache = model.run_with_cache(torch.tensor(ids))
    np.savez(
        FILES / "saelens.npz", ids=ids, values=cache["blocks.1.hook_resid_pre"].detach().numpy()
    )


def transformer_lens(*_: str) -> None:
    model = tiny_hooked_transformer()
    tokens = torch.randint(1, 32, (2, 5), generator=torch.Generator().manual_seed(3))
    _, cache = model.run_with_cache(tokens)
    torch.save(cache.cache_dict, FILES / "transformer_lens.pt")
    values = {name: tensor.detach().numpy() for name, tensor in cache.items()}
    np.savez(FILES / "transformer_lens.npz", tokens=tokens.numpy(), **values)


class _Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = torch.nn.Linear(4, 4)

    def forward(self, given: torch.Tensor) -> tuple[torch.Tensor, None]:
        return given + self.mlp(given), None


class _Decoder(torch.nn.Module):
    """A decoder as Hugging Face builds them, but for attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, 4)
        self.layers = torch.nn.ModuleList([_Block(), _Block()])
        self.head = torch.nn.Linear(4, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.embed(ids)
        for layer in self.layers:
            rows, _ = layer(rows)
        return self.head(rows)


def nnsight(*_: str) -> None:
    """Keep by hand what a cache's entries were, since a cache can only be pickled."""
    from nnsight import NNsight

    torch.manual_seed(4)
    plain = _Decoder().to(torch.bfloat16)
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    model = NNsight(plain)
    with model.trace(ids) as tracer:
        cache = tracer.cache(include_inputs=True).save()
    entries = {
        path: [_shown(entry.output) for entry in cache._cache.entries[path]]
        for path in cache.keys()  # noqa: SIM118 - it is no mapping
    }
    found = {}
    handles = [
        module.register_forward_hook(
            lambda _m, _i, out, name=name: found.__setitem__(
                name, (out[0] if isinstance(out, tuple) else out).detach().float().numpy()
            )
        )
        for name, module in plain.named_modules()
    ]
    plain(ids)
    for handle in handles:
        handle.remove()
    np.savez(FILES / "nnsight.npz", ids=ids.numpy(), **found)
    said = {"keys": list(cache.keys()), "entries": entries}
    (FILES / "nnsight.json").write_text(json.dumps(said, indent=1) + "\n")


def _shown(value: Any) -> Any:
    """Give the shape of what an entry holds: a tensor as its dtype, shape and values."""
    if isinstance(value, torch.Tensor):
        return {
            "dtype": str(value.dtype),
            "shape": list(value.shape),
            "values": value.float().flatten().tolist(),
        }
    return [_shown(one) for one in value] if isinstance(value, tuple) else value


def vllm(sources: str) -> None:
    """Run what its connector does with a finished request: take rows from the cache, write."""
    place = Path(sources) / "vllm/distributed/kv_transfer/kv_connector/v1"
    names = (
        "vllm",
        "vllm.config",
        "vllm.distributed",
        "vllm.distributed.kv_transfer",
        "vllm.distributed.kv_transfer.kv_connector",
        "vllm.distributed.kv_transfer.kv_connector.v1",
        "vllm.distributed.kv_transfer.kv_connector.v1.base",
        "vllm.distributed.parallel_state",
        "vllm.utils",
        "vllm.utils.gpu_sync_debug",
        "vllm.v1",
        "vllm.v1.attention",
        "vllm.v1.attention.backend",
        "vllm.v1.core",
        "vllm.v1.core.sched",
        "vllm.v1.core.sched.output",
    )
    for name in names:
        stub(name)
    stub("vllm.logger", init_logger=lambda _name: mock.Mock())
    code = loaded("connector", place / "example_hidden_states_connector.py")
    folder = emptied("vllm")
    generator = torch.Generator().manual_seed(5)
    # blocks × heads (one for each layer that was asked for) × slots × features
    cache = torch.randn(8, 3, 4, 8, generator=generator).to(torch.bfloat16)
    kept = {}
    for request, (blocks, ids) in {
        "cmpl-0-0": ([2, 5], [11, 12, 13, 14, 15, 16]),
        "cmpl-0-1": ([1], [21, 22, 23]),
    }.items():
        slots = torch.cat([torch.arange(4) + 4 * block for block in blocks])
        rows = code.extract_from_kv_cache(cache, slots, len(ids))
        tensors = {"hidden_states": rows, "token_ids": torch.tensor(ids)}
        path = folder / f"{request}.safetensors"
        code.ExampleHiddenStatesConnector._write_tensors(tensors, mock.Mock(), str(path), None)
        for number, block in enumerate(blocks):
            mine = cache[block].transpose(0, 1).float().numpy()  # slots × layers × features
            kept.setdefault(request, []).append(mine[: len(ids) - 4 * number])
    np.savez(FILES / "vllm.npz", **{name: np.concatenate(rows) for name, rows in kept.items()})


class _Bucket:
    """Stands for S3: keeps what is uploaded in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[bytes] = []

    def create_multipart_upload(self, **_: Any) -> dict[str, str]:
        self.parts = []
        return {"UploadId": "1"}

    def upload_part(self, *, Body: bytes, **_: Any) -> dict[str, str]:  # noqa: N803 - as S3 has it
        self.parts.append(Body)
        return {"ETag": "1"}

    def complete_multipart_upload(self, *, Key: str, **_: Any) -> None:  # noqa: N803
        self.put_object(Key=Key, Body=b"".join(self.parts))

    def put_object(self, *, Key: str, Body: Any, **_: Any) -> None:  # noqa: N803
        path = self.folder / Key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(Body if isinstance(Body, bytes) else Body.encode())


def activault(sources: str) -> None:
    stub("boto3")
    stub("s3")
    stub("s3.utils")
    code = loaded("hook_uploader", Path(sources) / "pipeline/vault/hook_uploader.py")
    folder = emptied("activault")
    bucket = _Bucket(folder)
    generator = torch.Generator().manual_seed(6)
    kept: dict[str, Any] = {}
    groups = ("0f909221-ff28-4a94-a43f-cfe973e835cf", "5a0d53a9-7c37-4dd2-9b57-6d3cf1f4cb58")
    batches = {
        group: [torch.randint(0, 99, (2, 4), generator=generator) for _ in range(2)]
        for group in groups
    }
    for hook in ("models.layers.1.mlp.post", "models.layers.1.self_attn.pre"):
        queued = mock.Mock()
        uploader = code.HookUploader.__new__(code.HookUploader)
        vars(uploader).update(
            batches_per_upload=2,
            prefix_path=f"tiny/{hook}",
            _in_mem=[],
            s3_client=bucket,
            metadata=None,
            bucket_name="b",
            upload_attempt_count=0,
            mp_upload_queue=queued,
        )
        for group, given in batches.items():
            for ids in given:
                states = torch.randn(2, 4, 6, generator=generator).to(torch.bfloat16)
                kept.setdefault(f"{hook}/{group}", []).append(states.float().numpy())
                uploader.append({"states": states, "input_ids": ids}, group)
            # another process does this, so that what it says of the file stays there
            copy.copy(uploader)._save(*queued.put.call_args.args[0])
    (folder / "tiny/cfg.json").write_text(
        json.dumps({"run_name": "tiny", "transformer_config": {"model_name": "some/model"}})
    )
    ids = {f"ids/{group}": torch.cat(given).numpy() for group, given in batches.items()}
    values = {name: np.concatenate(given) for name, given in kept.items()}
    np.savez(FILES / "activault.npz", **ids, **values)


def saev(sources: str) -> None:
    package("saev", Path(sources) / "src/saev")
    package("saev.data", Path(sources) / "src/saev/data")
    stub("torchvision")
    stub("torchvision.datasets", ImageFolder=type("ImageFolder", (), {}))
    sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]
    code = importlib.import_module("saev.data.shards")
    root = emptied("saev") / "saev/shards"
    root.mkdir(parents=True)
    described = code.Metadata(
        family="fake-clip",
        ckpt="tiny",
        layers=(1, 3),
        content_tokens_per_example=2,
        cls_token=True,
        d_model=4,
        n_examples=5,
        max_tokens_per_shard=18,  # three examples
        data="gANYAwAAAGZvb3EALg==",
        dataset=Path("images"),
    )
    described.dump(root)
    values = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(7))
    with code.ShardWriter(root, described) as writer:
        writer.write_batch(values[:2], 0)
        writer.write_batch(values[2:], 2)
    np.savez(FILES / "saev.npz", values=values.numpy())


def saev_pypi(sources: str) -> None:
    stub("torchvision")
    stub("torchvision.datasets", ImageFolder=type("ImageFolder", (), {}))
    sys.modules["torchvision"].datasets = sys.modules["torchvision.datasets"]
    package("saev", Path(sources) / "saev")
    code = importlib.import_module("saev.activations")
    folder = emptied("saev_pypi")
    described = code.Metadata("clip", "tiny", (-2, -1), 2, True, 4, 42, 5, 18, "none")
    described.dump(str(folder / "metadata.json"))
    writer = code.ShardWriter.__new__(code.ShardWriter)
    vars(writer).update(
        logger=mock.Mock(), root=str(folder), n_imgs_per_shard=3, shape=(3, 2, 3, 4), shard=-1
    )
    writer.acts = None
    writer.next_shard()
    values = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(8))
    writer[0:2] = values[:2]
    writer[2:5] = values[2:]
    writer.flush()
    np.savez(FILES / "saev_pypi.npz", values=values.numpy())


if __name__ == "__main__":
    kinds = (saelens, transformer_lens, nnsight, vllm, activault, saev, saev_pypi)
    {kind.__name__: kind for kind in kinds}[sys.argv[1]](*sys.argv[2:])
