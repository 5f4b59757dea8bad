"""Wrapped, compiled, sharded, offloaded, shared, scripted modules: exact, by their own names."""

from __future__ import annotations

import contextlib
import datetime
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from oracle import FULL, Oracle, assert_equals, bytes_of, framework, quiet, read, tensors_of
from tiny_models import VOCABULARY, build, sequential, token_ids
from torch import Tensor, distributed, nn

from actstore.config import HookConfig, HookGranularity
from actstore.errors import ActstoreError, ActstoreWarning
from actstore.stream.reader import open_stream

Run = Callable[[], Any]
MLP = HookGranularity.MLP_ONLY


class Known(Oracle):
    """Sees the modules that a model had, by the names that they had, before it was wrapped."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__(nn.Identity(), ())
        self._modules = modules

    def __enter__(self) -> Known:
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._hook(name)))
        return self


def _bytes(value: Any) -> list[bytes]:
    return [bytes_of(one) for one in tensors_of(value)]


def _check(
    given: nn.Module,
    modules: Mapping[str, nn.Module],
    log: Path,
    run: Run,
    granularity: HookGranularity = FULL,
) -> list[Any]:
    """Capture a run of what is given under the oracle, and compare packets and outputs."""
    torch.manual_seed(4)
    wanted = _bytes(run())
    assert wanted
    one = framework(granularity)
    one.instrument_model(given, name="net")
    torch.manual_seed(4)
    with quiet(), Known(modules) as oracle, one.capture_activations(log):
        found = run()
    assert _bytes(found) == wanted
    assert one.summary["skipped"] == {}
    return assert_equals(log, oracle.fired)


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    return dict(model.named_modules())


def _input() -> Tensor:
    return torch.linspace(-1, 1, 24).reshape(3, 8)


def _generate(model: Any) -> Tensor:
    return model.generate(
        token_ids(),
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=0,
    )


def _step(wrapped: Any, model: Any, ids: Tensor) -> list[Tensor]:
    """Give loss and gradients of a step of training."""
    model.zero_grad()
    loss = wrapped(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    grads = [one.grad for one in model.parameters() if one.grad is not None]
    return [loss.detach(), *(getattr(one, "to_local", lambda one=one: one)() for one in grads)]


# -- compiled -----------------------------------------------------------------------------------


class Backend:
    """Runs what dynamo traced as it is, and counts how often."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        """Give what runs a graph."""

        def run(*args: Any) -> Any:
            self.runs += 1
            return graph.forward(*args)

        return run


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield Backend()
    torch._dynamo.reset()


class Part(nn.Module):
    """A norm and a linear. What torch itself defines, such as nn.Sequential, dynamo skips."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Compute it."""
        return self.out(self.norm(x))


class Net(nn.Module):
    """A linear, something in place, and a part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.part = nn.Linear(8, 16), nn.ReLU(inplace=True), Part()

    def forward(self, x: Tensor) -> Tensor:
        """Compute it."""
        return self.part(self.act(self.first(x)))


#: In the order in which they return.
LAYERS = ["first", "act", "part.norm", "part.out", "part", ""]


def _net() -> Net:
    torch.manual_seed(11)
    return Net().eval()


def _whole(model: Any, backend: Any) -> nn.Module:
    return torch.compile(model, backend=backend)


def _own(model: Any, backend: Any) -> nn.Module:
    model.compile(backend=backend)
    return model


def _leaf(model: Any, backend: Any) -> nn.Module:
    model.first = torch.compile(model.first, backend=backend)
    return model


def _composite(model: Any, backend: Any) -> nn.Module:
    model.part = torch.compile(model.part, backend=backend)
    return model


def _own_part(model: Any, backend: Any) -> nn.Module:
    model.part.compile(backend=backend)
    return model


def _forward(model: Any, backend: Any) -> nn.Module:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def _forward_of_part(model: Any, backend: Any) -> nn.Module:
    model.part.forward = torch.compile(model.part.forward, backend=backend)
    return model


def _twice(model: Any, backend: Any) -> nn.Module:
    return _whole(_composite(model, backend), backend)


def _in_parallel(model: Any, backend: Any) -> nn.Module:
    return nn.DataParallel(_whole(model, backend))


COMPILED = [
    _whole,
    _own,
    _leaf,
    _composite,
    _own_part,
    _forward,
    _forward_of_part,
    _twice,
    _in_parallel,
]


@pytest.mark.parametrize("before", [True, False], ids=["run_before", "not_run_before"])
@pytest.mark.parametrize("compiled", COMPILED)
def test_what_is_compiled_is_captured_uncompiled_and_named_in_a_warning(
    compiled: Any, before: bool, backend: Backend, log: Path
) -> None:
    model, x = _net(), _input()
    modules, wanted = _modules(model), bytes_of(model(x))
    given = compiled(model, backend)
    if before:
        assert bytes_of(given(x)) == wanted
        assert backend.runs >= 1
    runs, one = backend.runs, framework()
    one.instrument_model(given, name="net")
    with quiet(), Known(modules) as oracle, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", ActstoreWarning)
        with one.capture_activations(log):
            found = [given(x), given(x[:2])]
        assert backend.runs == runs
    assert bytes_of(found[0]) == wanted
    packets = assert_equals(log, oracle.fired)
    assert [each.layer for each in packets] == LAYERS * 2
    # and when the capture is over, compiled code runs again
    assert bytes_of(given(x)) == wanted
    assert backend.runs > runs
    told = [str(each.message) for each in warned]
    assert len([text for text in told if "'net' is compiled" in text]) == 1, told


@pytest.mark.parametrize("when", ["before", "after", "inside"])
def test_a_compiled_wrapper_of_an_instrumented_model_is_captured_uncompiled(
    when: str, backend: Backend, log: Path
) -> None:
    model, x = _net(), _input()
    modules, wanted = _modules(model), bytes_of(model(x))
    wrapped: Any = torch.compile(model, backend=backend) if when == "before" else None
    one = framework()
    one.instrument_model(model)
    if when == "after":
        wrapped = torch.compile(model, backend=backend)
    if wrapped is not None:
        wrapped(x)
    runs = backend.runs
    with quiet(), Known(modules) as oracle, one.capture_activations(log):
        if wrapped is None:
            wrapped = torch.compile(model, backend=backend)
        assert bytes_of(wrapped(x)) == wanted
    assert backend.runs == runs
    assert len(assert_equals(log, oracle.fired)) == 6
    assert bytes_of(wrapped(x)) == wanted
    assert backend.runs == runs + 1


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", ["custom", "eager", "aot_eager"])
def test_a_compiled_function_that_calls_the_model_is_captured_uncompiled(
    name: str, before: bool, backend: Backend, log: Path
) -> None:
    model, x = _net(), _input()

    @torch.compile(backend=backend if name == "custom" else name)
    def function(x: Tensor) -> Tensor:
        return model(x).relu() + model(x * 2)

    wanted = bytes_of(model(x).relu() + model(x * 2))
    if before:
        assert bytes_of(function(x)) == wanted
    one = framework()
    one.instrument_model(model)
    with quiet(), Oracle(model) as oracle, one.capture_activations(log):
        assert bytes_of(function(x)) == wanted
    packets = assert_equals(log, oracle.fired)
    assert [(each.pass_index, each.call) for each in packets] == [(0, 0)] * 6 + [(1, 0)] * 6
    assert bytes_of(function(x)) == wanted


def test_compiling_a_model_inside_of_the_with_is_named_too(backend: Backend, log: Path) -> None:
    model, x, one = _net(), _input(), framework()
    one.instrument_model(model, name="net")
    with (
        quiet(),
        pytest.warns(ActstoreWarning, match="'net' is compiled"),
        Oracle(model) as oracle,
        one.capture_activations(log),
    ):
        model(x)
        model.compile(backend=backend)
        model(x)
    assert not backend.runs
    assert len(assert_equals(log, oracle.fired)) == 12
    model(x)
    assert backend.runs


def test_a_compiled_model_run_in_another_thread_is_captured_uncompiled(
    backend: Backend, log: Path
) -> None:
    model, x, one = _net(), _input(), framework()
    given = torch.compile(model, backend=backend)
    given(x)
    one.instrument_model(given)
    runs = backend.runs
    thread = threading.Thread(target=given, args=(x,))
    with (
        quiet(),
        pytest.warns(ActstoreWarning, match="is compiled"),
        Oracle(model) as oracle,
        one.capture_activations(log),
    ):
        thread.start()
        thread.join()
    assert backend.runs == runs
    assert len(assert_equals(log, oracle.fired)) == 6


def test_compiled_code_runs_again_after_a_capture_that_failed(backend: Backend, log: Path) -> None:
    model, x, one = _net(), _input(), framework()
    given = torch.compile(model, backend=backend)
    given(x)
    one.instrument_model(given)
    runs = backend.runs
    with pytest.raises(ZeroDivisionError), quiet(), one.capture_activations(log):
        given(x)
        raise ZeroDivisionError
    with pytest.raises(ActstoreError), one.capture_activations(log.parent / "none" / "a.stream"):
        pass
    assert backend.runs == runs
    given(x)
    assert backend.runs == runs + 1


def test_a_compiled_decoder_generates_the_same_and_equals_the_oracle(
    backend: Backend, log: Path
) -> None:
    model: Any = build.__wrapped__("llama")
    modules, wanted = _modules(model), bytes_of(_generate(model))
    model.compile(backend=backend)
    with pytest.warns(ActstoreWarning, match="'net' is compiled"):
        packets = _check(model, modules, log, lambda: _generate(model))
    assert {each.pass_index for each in packets} == {0, 1, 2}
    assert bytes_of(_generate(model)) == wanted


@pytest.mark.parametrize("own", [True, False])
def test_compiled_blocks_of_a_decoder_are_found_as_blocks(
    own: bool, backend: Backend, log: Path
) -> None:
    model: Any = build.__wrapped__("llama")
    modules = {name: one for name, one in model.named_modules() if name.endswith("mlp")}
    for number, block in enumerate(model.model.layers):
        if own:
            block.compile(backend=backend)
        else:
            model.model.layers[number] = torch.compile(block, backend=backend)
    one = framework(MLP)
    one.instrument_model(model)
    with (
        quiet(),
        pytest.warns(ActstoreWarning, match="is compiled"),
        Known(modules) as oracle,
        one.capture_activations(log),
    ):
        model(input_ids=token_ids())
    assert not backend.runs
    assert len(assert_equals(log, oracle.fired)) == 2
    with open_stream(log) as reader:
        found = [(each.name, each.site, each.block) for each in reader.layers.values()]
    assert found == [(f"model.layers.{block}.mlp", "mlp", block) for block in (0, 1)]


# -- wrappers -----------------------------------------------------------------------------------


def test_data_parallel_on_the_cpu_has_the_names_of_the_model(log: Path) -> None:
    model: Any = build("llama")
    wrapped = nn.DataParallel(model)

    def run() -> Any:
        with torch.no_grad():
            return wrapped(input_ids=token_ids()).logits

    _check(wrapped, _modules(model), log, run)
    with open_stream(log) as reader:
        assert [one.entry for one in reader.passes] == [""]
        assert {one.site for one in reader.layers.values()} >= {"attn", "mlp", "resid", "logits"}


def test_a_model_averaged_while_it_trains_keeps_its_prefix(log: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(sequential())
    packets = _check(averaged, _modules(averaged), log, lambda: averaged(_input()))
    assert packets[0].layer == "module.0"


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights_equal_the_oracle(norm: str, log: Path) -> None:
    model = sequential()
    getattr(nn.utils.parametrizations, norm)(model[5])
    packets = _check(model, _modules(model), log, lambda: model(_input()))
    assert any(one.layer.startswith("5.parametrizations") for one in packets)


# -- offloaded ----------------------------------------------------------------------------------


def _on_cpu_offload(model: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)


def _on_disk_offload(model: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    return accelerate.disk_offload(model, str(folder / "offload"), execution_device="cpu")


def _dispatched(model: nn.Module, folder: Path) -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    homes = {name: "cpu" for name, _ in model.named_children()} | {
        f"{name}.{child}": "disk" if child in ("layers", "h") else "cpu"
        for name, module in model.named_children()
        for child, _ in module.named_children()
    }
    homes = {
        name: home
        for name, home in homes.items()
        if not any(other.startswith(f"{name}.") for other in homes)
    }
    return accelerate.dispatch_model(
        model, homes, main_device="cpu", offload_dir=str(folder / "offload"), force_hooks=True
    )


@pytest.mark.parametrize("offload", [_on_cpu_offload, _on_disk_offload, _dispatched])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_offloaded_model_equals_the_oracle_and_computes_the_same(
    architecture: str, offload: Any, log: Path
) -> None:
    model = build.__wrapped__(architecture)
    wanted, names = bytes_of(_generate(model)), set(_modules(model))
    model = offload(model, log.parent)
    assert any(one.is_meta for one in model.parameters())
    found: list[Any] = []

    def run() -> Any:
        found.append(_generate(model))
        return found[-1]

    packets = _check(model, _modules(model), log, run)
    assert bytes_of(found[-1]) == wanted
    assert {one.layer for one in packets} <= names
    assert any(one.is_meta for one in model.parameters())
    with open_stream(log) as reader:
        (described,) = reader.header["models"]
    assert described["parameters"] == sum(one.numel() for one in model.parameters())


def test_an_offloaded_model_that_stops_early_is_left_as_it_was(log: Path) -> None:
    model = _on_disk_offload(build.__wrapped__("llama"), log.parent)
    forwards = {name: one.__dict__.get("forward") for name, one in model.named_modules()}
    one = framework(MLP)
    one.instrument_model(
        model, HookConfig(target_layers=["model.layers.0.mlp"], stop_after_last_layer=True)
    )
    with torch.no_grad(), Oracle(model, ["model.layers.0.mlp"]) as oracle:
        with one.capture_activations(log):
            assert model(input_ids=token_ids()) is None
        assert len(assert_equals(log, oracle.fired)) == 1
        assert {
            name: each.__dict__.get("forward") for name, each in model.named_modules()
        } == forwards
        found = bytes_of(model(input_ids=token_ids()).logits)
        assert found == bytes_of(build("llama")(input_ids=token_ids()).logits)


# -- quantized ----------------------------------------------------------------------------------


def _quantized(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_dynamically_quantized_linears_equal_the_oracle(architecture: str, log: Path) -> None:
    model: Any = _quantized(build(architecture))

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids()).logits

    packets = _check(model, _modules(model), log, run)
    kinds = {name: type(one).__module__ for name, one in model.named_modules()}
    assert sum("quantized" in kinds[one.layer] for one in packets) >= 14


@pytest.mark.parametrize(
    ("architecture", "pattern"),
    [
        ("llama", "model.layers.{}.mlp"),
        ("opt", "model.decoder.layers.{}.fc2"),
        ("bert", "bert.encoder.layer.{}.output.dense"),
    ],
)
def test_the_mlps_of_a_quantized_model_are_those_of_the_model(
    architecture: str, pattern: str, log: Path
) -> None:
    model: Any = _quantized(build(architecture))
    names = [pattern.format(block) for block in (0, 1)]

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids()).logits

    modules = {name: model.get_submodule(name) for name in names}
    packets = _check(model, modules, log, run, MLP)
    assert [one.layer for one in packets] == names


# -- shared -------------------------------------------------------------------------------------


def test_one_block_in_every_place_of_a_stack_gives_a_call_for_each(log: Path) -> None:
    model: Any = build.__wrapped__("llama")
    model.model.layers = nn.ModuleList([model.model.layers[0]] * 3)
    model.config.num_hidden_layers = 3

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids(), use_cache=False).logits

    packets = _check(model, _modules(model), log, run)
    for layer in ("model.layers.0", "model.layers.0.mlp", "model.layers.0.self_attn.q_proj"):
        assert [one.call for one in packets if one.layer == layer] == [0, 1, 2]
    assert not any(one.layer.startswith("model.layers.1") for one in packets)


@pytest.mark.parametrize("granularity", [FULL, MLP, HookGranularity.ATTENTION_ONLY])
def test_an_albert_whose_layers_are_one_gives_a_call_for_each(
    granularity: HookGranularity, log: Path
) -> None:
    config = transformers.AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=16,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    torch.manual_seed(6)
    model = transformers.AlbertModel(config).eval()
    part = "attention" if granularity is HookGranularity.ATTENTION_ONLY else "ffn_output"
    name = f"encoder.albert_layer_groups.0.albert_layers.0.{part}"
    modules = _modules(model) if granularity is FULL else {name: model.get_submodule(name)}

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids()).last_hidden_state

    packets = _check(model, modules, log, run, granularity)
    assert [one.call for one in packets if one.layer == name] == [0, 1, 2]


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "t5"])
def test_weights_that_are_tied_are_counted_once(architecture: str, log: Path) -> None:
    model: Any = build.__wrapped__(architecture)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    decoder = {"decoder_input_ids": token_ids(2, 3)} if architecture == "t5" else {}

    def run() -> Any:
        with torch.no_grad():
            return model(input_ids=token_ids(), **decoder).logits

    _check(model, _modules(model), log, run)
    with open_stream(log) as reader:
        (described,) = reader.header["models"]
    assert described["parameters"] == sum(one.numel() for one in model.parameters())


# -- scripted and traced ------------------------------------------------------------------------

_jit = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")


@_jit
def test_a_traced_part_equals_the_oracle(log: Path) -> None:
    model = sequential()
    wanted = bytes_of(model(_input()))
    model[5] = torch.jit.trace(model[5], torch.ones(3, 16))
    packets = _check(model, _modules(model), log, lambda: model(_input()))
    assert [one.layer for one in packets] == ["0", "1", "2", "3", "4", "5", ""]
    assert packets[-1].values.tobytes() == wanted


@_jit
def test_a_traced_model_gives_its_output_and_names_the_parts_that_call_no_hooks(
    log: Path,
) -> None:
    model = torch.jit.trace(sequential(), _input())
    wanted, one = bytes_of(model(_input())), framework()
    one.instrument_model(model)
    with (
        pytest.warns(ActstoreWarning, match="never fired: '0', '1'"),
        one.capture_activations(log),
    ):
        assert bytes_of(model(_input())) == wanted
    (packet,) = read(log)
    assert (packet.layer, packet.values.tobytes()) == ("", wanted)


@_jit
@pytest.mark.parametrize("whole", [True, False])
def test_a_scripted_module_which_takes_no_hooks_is_refused_by_name(whole: bool, log: Path) -> None:
    model: Any = sequential()
    if whole:
        model = torch.jit.script(model)
    else:
        model[5] = torch.jit.script(model[5])
    one = framework()
    with pytest.raises(ActstoreError, match=r"(?i)script" if whole else r"(?i)'5'.*script"):
        one.instrument_model(model)
        with one.capture_activations(log):
            model(_input())
    assert bytes_of(model(_input())) == bytes_of(sequential()(_input()))


@_jit
def test_a_scripted_part_that_is_left_out_does_no_harm(log: Path) -> None:
    model = sequential()
    model[5] = torch.jit.script(model[5])
    names, one = ["0", "1", "2", "3", "4"], framework()
    one.instrument_model(model, HookConfig(target_layers=names))
    with quiet(), Oracle(model, names) as oracle, one.capture_activations(log):
        model(_input())
    assert len(assert_equals(log, oracle.fired)) == 5


def test_a_graph_module_has_the_names_of_its_model(log: Path) -> None:
    model = torch.fx.symbolic_trace(sequential())
    packets = _check(model, _modules(model), log, lambda: model(_input()))
    assert [one.layer for one in packets] == ["0", "1", "2", "3", "4", "5", ""]


# -- several processes --------------------------------------------------------------------------

_RANKS = 2
_PATIENCE = 90


def _rank_ids(rank: int) -> Tensor:
    return token_ids(2 * _RANKS)[2 * rank : 2 * rank + 2]


def _compare(given: Any, model: Any, log: Path, ids: Tensor) -> None:
    """Train a step in this process under the oracle; gradients are those of every rank."""
    names = [*_modules(model)]
    packets = _check(given, _modules(model), log, lambda: _step(given, model, ids))
    assert {one.layer for one in packets} <= set(names)
    with open_stream(log) as reader:
        (info,) = reader.passes
        assert info.axes[0].token_ids.tolist() == ids.tolist()
        assert info.entry == ""


def _ddp(rank: int, log: Path) -> None:
    model = build.__wrapped__("llama").train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    _compare(wrapped, model, log, _rank_ids(rank))


def _compiled_ddp(rank: int, log: Path) -> None:
    model = build.__wrapped__("llama").train()
    wrapped = nn.parallel.DistributedDataParallel(model)
    compiled = torch.compile(wrapped, backend="eager")
    one = framework()
    one.instrument_model(compiled, name="net")
    with quiet(), Oracle(model) as oracle, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with one.capture_activations(log):
            _step(compiled, model, _rank_ids(rank))
    assert [str(each.message) for each in warned if "'net' is compiled" in str(each.message)]
    assert_equals(log, oracle.fired)


def _ddp_checkpointed(rank: int, log: Path) -> None:
    model: Any = build.__wrapped__("llama").train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    wrapped = nn.parallel.DistributedDataParallel(model)
    one, ids = framework(), _rank_ids(rank)
    wanted = _bytes(_step(wrapped, model, ids))
    one.instrument_model(wrapped)
    with quiet(), Oracle(model) as oracle, one.capture_activations(log):
        assert _bytes(_step(wrapped, model, ids)) == wanted
    recomputed = one.summary["ignored_recomputed"]
    assert recomputed > 0
    assert_equals(log, oracle.fired[:-recomputed])


def _fsdp(rank: int, log: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (_RANKS,))
    model: Any = build.__wrapped__("llama").train()
    whole = sum(one.numel() for one in model.parameters())
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _compare(model, model, log, _rank_ids(rank))
    with open_stream(log) as reader:
        (described,) = reader.header["models"]
        assert {one.site for one in reader.layers.values()} >= {"attn", "mlp", "resid", "logits"}
    assert described["parameters"] == whole


def _generating(rank: int, log: Path) -> None:
    model: Any = build.__wrapped__("llama")
    wrapped = nn.parallel.DistributedDataParallel(model)
    _check(wrapped, _modules(model), log, lambda: _generate(wrapped.module))


SCENARIOS: dict[str, Callable[[int, Path], None]] = {
    "ddp": _ddp,
    "ddp_that_generates": _generating,
    "ddp_with_checkpointing": _ddp_checkpointed,
    "compiled_ddp": _compiled_ddp,
    "fsdp": _fsdp,
}


def _work(rank: int, folder: Path) -> None:
    """Run every scenario in one of the processes; what fails is written beside its log."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=_RANKS,
        timeout=datetime.timedelta(seconds=20),
    )
    for name, scenario in SCENARIOS.items():
        try:
            scenario(rank, folder / f"{name}.{rank}.stream")
        except BaseException:
            (folder / f"{name}.{rank}.txt").write_text(traceback.format_exc())
        else:
            (folder / f"{name}.{rank}.done").touch()
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run two processes to their end; give the folder with what they left."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=_work, args=(rank, folder)) for rank in range(_RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_PATIENCE)
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()
    return folder


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_of_two_processes_has_a_log_that_equals_its_oracle(name: str, ranks: Path) -> None:
    layers = []
    for rank in range(_RANKS):
        failed = ranks / f"{name}.{rank}.txt"
        assert not failed.exists(), failed.read_text()
        assert (ranks / f"{name}.{rank}.done").exists(), "the process ended or hung before"
        with open_stream(ranks / f"{name}.{rank}.stream") as reader:
            assert reader.complete
            assert (reader.header["rank"], reader.header["world_size"]) == (rank, _RANKS)
            layers.append([one.name for one in reader.layers.values()])
    plain = [name for name, _ in build("llama").named_modules()]
    assert layers[0] == layers[1]
    assert set(layers[0]) <= set(plain)
    assert {"", "model.layers.0.mlp", "lm_head"} <= set(layers[0])


def test_the_logs_of_two_processes_hold_different_activations(ranks: Path) -> None:
    first, second = (read(ranks / f"ddp.{rank}.stream") for rank in range(_RANKS))
    assert [one.layer for one in first] == [one.layer for one in second]
    assert first[0].values.tobytes() != second[0].values.tobytes()


def test_a_sharded_model_of_one_process_equals_the_oracle_and_reshards(log: Path) -> None:
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    distributed.init_process_group(
        "gloo", init_method=f"file://{log.parent / 'meeting'}", rank=0, world_size=1
    )
    with contextlib.ExitStack() as stack:
        stack.callback(distributed.destroy_process_group)
        mesh = init_device_mesh("cpu", (1,))
        model: Any = build.__wrapped__("gpt2").train()
        model.config.loss_type = "ForCausalLM"
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        _check(model, _modules(model), log, lambda: _step(model, model, token_ids()))
        assert all(isinstance(one, DTensor) for one in model.parameters())
