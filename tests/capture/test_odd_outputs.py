"""Outputs that few models have: each is kept bit for bit, or named among what was skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, as_fired, assert_equals, capturing, framework, quiet, read
from tiny_models import Apply, Each, build, token_ids
from torch import Tensor, nn

from actstore.config import HookConfig
from actstore.errors import ActstoreError, ActstoreWarning
from actstore.stream.reader import open_stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*nested tensors.*prototype"),
    pytest.mark.filterwarnings("ignore:.*CSR tensor support.*beta"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
]

Make = Callable[[Tensor], Any]


def _x() -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(2, 3, 4)


def _capture(model: nn.Module, log: Path, run: Callable[[], Any] | None = None) -> Mapping:
    """Capture a run that may skip outputs; give the summary."""
    one = framework()
    one.instrument_model(model)
    with quiet(), pytest.warns(ActstoreWarning) as told, one.capture_activations(log):
        model(_x()) if run is None else run()
    for name in one.summary["skipped"]:
        assert any(name.partition(":")[0] in str(each.message) for each in told)
    return one.summary


# -- what is kept -------------------------------------------------------------------------------


def _bits(dtype: torch.dtype) -> Make:
    """Make all bit patterns of a dtype's bytes, NaNs of every payload among them."""
    size = torch.empty((), dtype=dtype).element_size()
    return lambda _: torch.arange(256, dtype=torch.uint8).repeat(2 * size).view(dtype).view(8, -1)


KEPT: dict[str, Make] = {
    **{
        name: _bits(getattr(torch, name))
        for name in (
            *("uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"),
            *("float16", "bfloat16", "float32", "float64", "complex64", "complex128"),
            *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
            "float8_e8m0fnu",
        )
        if hasattr(torch, name)
    },
    "bool": lambda x: x > 0,
    "strided_bfloat16": lambda x: x.bfloat16()[:, ::2, ::3],
    "transposed_int64": lambda x: (x * 100).long().transpose(0, 2),
    "expanded_bool": lambda x: (x[:1] > 0).expand(7, 3, 4),
    "expanded_float8": lambda x: x[0, 0].to(torch.float8_e5m2).expand(6, 4),
    "scalar_int64": lambda x: (x > 0).sum(),
    "scalar_complex": lambda x: torch.complex(x, x)[0, 0, 0],
    "scalar_conjugated": lambda x: torch.complex(x, x)[0, 0, 0].conj(),
    "empty_bool": lambda x: (x > 0)[:, :0],
    "empty_complex": lambda x: torch.complex(x, x)[:0].conj(),
    "empty_flat": lambda x: x.new_empty(0, dtype=torch.bfloat16),
    "conjugated_complex128": lambda x: torch.complex(x.double(), x.double()).conj(),
    "conjugated_twice": lambda x: torch.complex(x, x).conj().conj(),
    "conjugated_strided": lambda x: torch.complex(x, x + 1).conj()[:, 1:, ::2],
    "conjugated_transposed": lambda x: torch.complex(x, x + 1).mH,
    "negated_strided": lambda x: torch.complex(x, x + 1).conj().imag[..., ::2],
    "negated_conjugated": lambda x: torch._neg_view(torch.complex(x, x + 1).conj()),
    "negated_float": torch._neg_view,
    "real_of_conjugated": lambda x: torch.complex(x, x + 1).conj().real,
    "viewed_as_real": lambda x: torch.view_as_real(torch.complex(x, x + 1)),
    "overlapping_windows": lambda x: x.reshape(-1).unfold(0, 6, 2),
    "diagonal": lambda x: x[0].diagonal(),
    "of_many_dimensions_expanded": lambda x: x[..., None, None].expand(2, 3, 4, 5, 6),
    "needing_gradients": lambda x: x.clone().requires_grad_() * 2,
    "a_buffer": lambda x: nn.Buffer(x) if hasattr(nn, "Buffer") else x,
    "from_numpy": lambda x: torch.from_numpy(np.arange(6.0).reshape(2, 3)[::1]),
    "in_a_file": lambda x: x.clone().share_memory_(),
}


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_kept_bit_for_bit(name: str, mode: Any, log: Path) -> None:
    model = Each(odd=KEPT[name], after=lambda x: x + 1)
    with mode(), Oracle(model) as oracle, capturing(model, log):
        model(_x())
    assert [one.layer for one in oracle.fired] == ["odd", "after", ""]
    assert_equals(log, oracle.fired)


@pytest.mark.parametrize("name", ["float32", "negated_float", "expanded_bool", "scalar_complex"])
def test_it_is_kept_also_where_only_rows_are_asked_for(name: str, log: Path) -> None:
    model = nn.Sequential(Apply(lambda x: x.clone()), Apply(KEPT[name]))
    hooks = HookConfig(rows=slice(1, 2))
    with torch.no_grad(), Oracle(model) as oracle, capturing(model, log, hooks=hooks):
        model(_x())
    for packet, (layer, tensor) in zip(read(log), oracle._clones, strict=True):
        wanted = tensor[:, 1:2] if tensor.shape[:2] == (2, 3) else tensor
        assert packet.layer == layer
        assert packet.values.tobytes() == wanted.resolve_neg().numpy().tobytes()


@pytest.mark.parametrize("codec", ["none", "lz4", "zstd"])
def test_an_output_larger_than_the_whole_budget_is_kept(codec: str, log: Path) -> None:
    model = Each(small=lambda x: x, large=lambda x: torch.rand(700, 1000), after=lambda x: x + 1)
    one = framework(codec=codec, max_memory_gb=0.00105)
    one.instrument_model(model)
    with torch.no_grad(), Oracle(model) as oracle, quiet(), one.capture_activations(log):
        model(_x())
        model(_x())
    assert_equals(log, oracle.fired)
    assert one.summary["staging_high_water_bytes"] <= 1_050_000
    with open_stream(log) as reader:
        assert reader.table.parts.max() > 1


def test_a_view_larger_than_the_budget_of_a_small_storage_is_kept(log: Path) -> None:
    model = Each(large=lambda x: x[0, 0].conj().expand(100_000, 4), after=lambda x: x)
    one = framework(max_memory_gb=0.00105)
    one.instrument_model(model)
    with torch.no_grad(), Oracle(model) as oracle, quiet(), one.capture_activations(log):
        model(_x())
    assert_equals(log, oracle.fired)


class _Views(nn.Module):
    """Returns views of one storage, and writes through them and to them."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("whole", "upper", "lower", "turned", "again"):
            self.add_module(name, nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        whole = self.whole(y)
        upper = self.upper(y[:1])
        upper.mul_(2)
        self.lower(y[1:])
        whole[1:].zero_()
        turned = self.turned(y.transpose(0, 2))
        turned.neg_()
        return self.again(whole)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_views_of_one_storage_are_kept_as_they_were_when_they_were_returned(
    mode: Any, log: Path
) -> None:
    model = _Views()
    with mode(), Oracle(model) as oracle, capturing(model, log):
        model(_x())
    assert_equals(log, oracle.fired)
    found = {one.layer: one.values for one in read(log)}
    assert not np.array_equal(found["whole"], found["again"])


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x > 0,
        lambda x: (x * 100).int(),
        lambda x: torch.complex(x, x).conj(),
        lambda x: torch._neg_view(x.clone()),
        lambda x: x.to(torch.float8_e4m3fn),
        lambda x: x.bfloat16()[..., ::2],
    ],
    ids=["bool", "int32", "conjugated", "negated", "float8", "strided"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_odd_output_that_is_changed_afterwards_keeps_what_it_was(
    make: Make, mode: Any, log: Path
) -> None:
    model = nn.Sequential(Apply(make), Apply(lambda y: y.copy_(y.clone().flip(0))), nn.Identity())
    with mode(), Oracle(model) as oracle, capturing(model, log):
        model(_x()).zero_()
    assert_equals(log, oracle.fired)


# -- what is skipped by name --------------------------------------------------------------------


class _Tagged(Tensor):
    """A subclass that has its own memory, as many libraries have one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class _Plain(Tensor):
    """A subclass that says nothing of how functions treat it."""


@pytest.mark.parametrize("kind", [_Tagged, _Plain])
def test_a_subclass_with_memory_of_its_own_is_kept(kind: Any, log: Path) -> None:
    model = nn.Sequential(Apply(lambda x: x.as_subclass(kind)), Apply(lambda x: x[:, ::2] * 2))
    with torch.no_grad(), Oracle(model) as oracle, capturing(model, log):
        assert type(model(_x())) is kind
    assert len(oracle.fired) == 3
    assert_equals(log, oracle.fired)


class _Wrapper(Tensor):
    """A subclass without memory, which holds a tensor; says how it is taken apart."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Any:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __tensor_flatten__(self) -> Any:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: Any, *_: Any) -> Any:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = [one.inner if isinstance(one, _Wrapper) else one for one in args]
        found = func(*plain, **(kwargs or {}))
        return cls(found) if isinstance(found, Tensor) else found


SKIPPED: dict[str, tuple[Make, str]] = {
    "coo": (lambda x: x[0].to_sparse(), "sparse_coo"),
    "coo_hybrid": (lambda x: x.to_sparse(1), "sparse_coo"),
    "csr": (lambda x: x[0].to_sparse_csr(), "sparse_csr"),
    "csc": (lambda x: x[0].to_sparse_csc(), "sparse_csc"),
    "bsr": (lambda x: x.reshape(6, 4).to_sparse_bsr((2, 2)), "sparse_bsr"),
    "nested": (lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]), "nested"),
    "jagged": (
        lambda x: torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged),
        "nested",
    ),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.qint8), "qint8"),
    "quantized_by_channel": (
        lambda x: torch.quantize_per_channel(x, torch.ones(3), torch.zeros(3), 1, torch.quint8),
        "quint8",
    ),
    "meta": (lambda x: x.to("meta"), "meta"),
    "complex32": (lambda x: torch.complex(x, x).to(torch.complex32), "complex32"),
    "wrapper": (_Wrapper, "_Wrapper"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_it_is_skipped_by_name_with_the_reason(name: str, log: Path) -> None:
    make, reason = SKIPPED[name]
    summary = _capture(Each(odd=make, after=lambda x: x + 1), log)
    ((told, count),) = summary["skipped"].items()
    assert told.startswith("odd: ")
    assert reason in told
    assert count == 1
    assert [one.layer for one in read(log)] == ["after", ""]


def test_a_skipped_output_is_counted_each_time_and_is_not_told_never_to_have_fired(
    log: Path,
) -> None:
    model = Each(odd=lambda x: x[0].to_sparse(), after=lambda x: x)
    summary = _capture(model, log, lambda: [model(_x()) for _ in range(3)])
    assert list(summary["skipped"].values()) == [3]
    assert summary["never_fired"] == []
    assert [one.pass_index for one in read(log) if one.layer == "after"] == [0, 1, 2]


def test_a_layer_that_is_odd_only_now_and_then_keeps_the_other_times(log: Path) -> None:
    turns = iter([False, True, False])
    model = Each(odd=lambda x: x[0].to_sparse() if next(turns) else x[0])
    summary = _capture(model, log, lambda: [model(_x()) for _ in range(3)])
    assert sum(summary["skipped"].values()) == 2  # of the layer, and of the model that returns it
    assert [(one.layer, one.pass_index) for one in read(log)] == [
        (name, index) for index in (0, 2) for name in ("odd", "")
    ]


def test_the_first_tensor_counts_also_where_it_is_one_that_is_skipped(log: Path) -> None:
    summary = _capture(Each(pair=lambda x: (x[0].to_sparse(), x), after=lambda x: x), log)
    assert [name.partition(":")[0] for name in summary["skipped"]] == ["pair"]
    assert [one.layer for one in read(log)] == ["after", ""]


def test_of_all_outputs_the_others_are_kept(log: Path) -> None:
    model = Each(many=lambda x: (x[0].to_sparse(), x, x.to("meta"), x + 1), after=lambda x: x)
    one = framework()
    one.instrument_model(model, HookConfig(outputs="all"))
    with pytest.warns(ActstoreWarning), one.capture_activations(log):
        model(_x())
    assert [name.partition(":")[0] for name in one.summary["skipped"]] == ["many", "many#2"]
    assert [each.layer for each in read(log)] == ["many#1", "many#3", "after", ""]


# -- memory that is not there: each in a process of its own, which may crash --------------------

_CRASHING = """
import json, os, sys, warnings
sys.path.insert(0, sys.argv[1])
import torch
from pathlib import Path
from torch import Tensor, nn
from oracle import framework, read
from tiny_models import Each
from torch.masked import masked_tensor

class Opaque(Tensor):
    @staticmethod
    def __new__(cls, inner):
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made
    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = [one.inner if isinstance(one, Opaque) else one for one in args]
        found = func(*plain, **(kwargs or {}))
        return cls(found) if isinstance(found, Tensor) else found

def freed(x):
    y = x.clone()
    y.untyped_storage().resize_(0)
    return y

def sharded(x):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    return distribute_tensor(x, init_device_mesh("cpu", (1,)), [Replicate()])

def faked(x):
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode() as mode:
        return mode.from_tensor(x)

CASES = {
    "opaque_wrapper": Opaque,
    "masked": lambda x: masked_tensor(x, x > 0),
    "freed_storage": freed,
    "zero_tensor": lambda x: torch._efficientzerotensor(2, 3),
    "uninitialized": lambda x: nn.parameter.UninitializedParameter(),
    "distributed": sharded,
    "fake": faked,
}
warnings.simplefilter("ignore")
for name, make in CASES.items():
    out = Path(sys.argv[2], name + ".json")
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        continue
    try:
        model = Each(odd=make, after=lambda x: x + 1)
        one = framework()
        one.instrument_model(model)
        log = Path(sys.argv[2], name + ".stream")
        with torch.no_grad(), one.capture_activations(log):
            model(torch.ones(2, 3, 4))
        found = {"skipped": dict(one.summary["skipped"]), "kept": [p.layer for p in read(log)]}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    out.write_text(json.dumps(found))
    os._exit(0)
"""


@pytest.fixture(scope="module")
def without_memory(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Capture outputs without memory; give what became of each, of a crashed one nothing."""
    folder = tmp_path_factory.mktemp("without_memory")
    here = str(Path(__file__).parent)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _CRASHING, here, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=env,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {one.stem: json.loads(one.read_text()) for one in folder.glob("*.json")}


@pytest.mark.parametrize(
    "name",
    [
        *("opaque_wrapper", "masked", "freed_storage", "zero_tensor"),
        *("uninitialized", "fake"),
    ],
)
def test_an_output_without_memory_is_skipped_by_name_and_no_crash(
    name: str, without_memory: dict[str, Any]
) -> None:
    assert name in without_memory, "the process crashed"
    found = without_memory[name]
    assert "error" not in found, found["error"]
    assert [told.partition(":")[0] for told in found["skipped"]] == ["odd"]
    assert found["kept"] == ["after", ""]


def test_of_a_distributed_output_what_is_here_is_kept(without_memory: dict[str, Any]) -> None:
    assert without_memory["distributed"] == {"skipped": {}, "kept": ["odd", "after", ""]}


# -- functions of models ------------------------------------------------------------------------


def _linear() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


TRANSFORMED: dict[str, Callable[[nn.Module], Any]] = {
    "vmap": lambda model: torch.func.vmap(model)(_x()),
    "vmap_twice": lambda model: torch.func.vmap(torch.func.vmap(model))(_x()),
    "grad": lambda model: torch.func.grad(lambda x: model(x).sum())(_x()),
    "jacrev": lambda model: torch.func.jacrev(model)(_x()[0, 0]),
    "jacfwd": lambda model: torch.func.jacfwd(model)(_x()[0, 0]),
    "jvp": lambda model: torch.func.jvp(model, (_x(),), (_x(),)),
    "of_parameters": lambda model: torch.func.grad(
        lambda given: torch.func.functional_call(model, given, (_x(),)).sum()
    )({name: one.detach() for name, one in model.named_parameters()}),
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_what_a_transform_of_functions_wraps_is_skipped_by_name_and_computes_the_same(
    name: str, log: Path
) -> None:
    model = _linear()
    wanted = torch.utils._pytree.tree_leaves(TRANSFORMED[name](model))
    found: list[Tensor] = []

    def run() -> None:
        found.extend(torch.utils._pytree.tree_leaves(TRANSFORMED[name](model)))
        model(_x())

    summary = _capture(model, log, run)
    assert all(map(torch.equal, found, wanted))
    named = {told.partition(":")[0] for told in summary["skipped"]}
    assert named == {"0", "1", "2", ""}
    packets = read(log)
    assert [one.layer for one in packets][-4:] == ["0", "1", "2", ""]
    with torch.no_grad():
        np.testing.assert_array_equal(packets[-1].values, model(_x()).numpy())


def test_ids_that_a_transform_wraps_give_a_clear_error_or_named_skips(log: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2))
    ids = torch.tensor([[1, 2, 3], [4, 5, 6]])
    wanted = torch.func.vmap(model)(ids)
    one = framework()
    one.instrument_model(model)
    found, told = wanted, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActstoreWarning)
        with one.capture_activations(log):
            try:
                found = torch.func.vmap(model)(ids)
            except ActstoreError as error:
                told = str(error)
            model(ids)
    assert torch.equal(found, wanted)
    named = {name.partition(":")[0] for name in one.summary["skipped"]}
    assert "vmap" in told or named == {"0", "1", ""}
    assert [each.layer for each in read(log)] == ["0", "1", ""]


def test_a_model_that_has_no_memory_is_skipped_by_name_whatever_it_is_fed(log: Path) -> None:
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)).to("meta")
    ids = torch.tensor([[1, 2, 3]], device="meta")
    one = framework()
    one.instrument_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ActstoreWarning)
        with one.capture_activations(log):
            assert model(ids).shape == (1, 3, 2)
    assert {name.partition(":")[0] for name in one.summary["skipped"]} == {"0", "1", ""}
    assert read(log) == []


def test_dual_tensors_of_forward_gradients_are_kept_by_their_values(log: Path) -> None:
    model = _linear()
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(_x(), torch.ones_like(_x()))
        with Oracle(model) as oracle, capturing(model, log):
            model(x)
    assert [as_fired(one) for one in read(log)] == oracle.fired


# -- all of them --------------------------------------------------------------------------------


def test_what_fires_is_what_was_kept_and_what_was_skipped_by_name(log: Path) -> None:
    functions = KEPT | {name: make for name, (make, _) in SKIPPED.items()}
    model = Each(**{f"m_{name}": make for name, make in functions.items()}, last=lambda x: x)
    one = framework()
    one.instrument_model(model)
    with torch.no_grad(), pytest.warns(ActstoreWarning), one.capture_activations(log):
        for _ in range(2):
            model(_x())
    skipped = one.summary["skipped"]
    fired = 2 * (len(functions) + 2)
    assert {told.partition(":")[0] for told in skipped} == {f"m_{name}" for name in SKIPPED}
    assert set(skipped.values()) == {2}
    assert one.summary["never_fired"] == []
    packets = read(log)
    assert len(packets) == one.summary["packets"] == fired - sum(skipped.values())
    names = [f"m_{name}" for name in KEPT] + ["last", ""]
    assert [each.layer for each in packets] == names * 2


def test_a_language_model_beside_odd_outputs_is_kept_whole(log: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama, self.odd = build("llama"), Apply(lambda x: x[0].to_sparse())

        def forward(self, input_ids: Tensor) -> Tensor:
            logits = self.llama(input_ids).logits
            self.odd(logits)
            return logits

    model = Both()
    with torch.no_grad(), Oracle(model) as oracle:
        summary = _capture(model, log, lambda: model(token_ids()))
    kept = [each for each in oracle._clones if each[0] != "odd"]
    assert list(summary["skipped"]) == ["odd: torch.float32 in layout torch.sparse_coo on cpu"]
    packets = read(log)
    assert [each.layer for each in packets] == [name for name, _ in kept]
    for packet, (_, tensor) in zip(packets, kept, strict=True):
        assert packet.values.tobytes() == tensor.numpy().tobytes()
