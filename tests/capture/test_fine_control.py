"""What a `HookConfig` keeps besides first outputs, and what of it: against plain hooks."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch
from oracle import FULL, Oracle, as_fired, bytes_of, capturing, framework, quiet, read, tensors_of
from tiny_models import ARCHITECTURES, Apply, Each, Output, Pair, build, sequential, token_ids
from torch import Tensor, nn

import actstore
from actstore.capture.select import select
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ConfigError
from actstore.stream.reader import open_stream

ATTENTION = HookGranularity.ATTENTION_ONLY


class Seen(NamedTuple):
    """What a plain hook saw: in which call of an entry, of which layer, a clone."""

    index: int
    layer: str
    tensor: Tensor


class Taps:
    """Clones what modules are given and return while it is open, by torch's own hooks."""

    def __init__(
        self,
        model: nn.Module,
        *,
        inputs: bool = False,
        every: bool = False,
        entries: tuple[str, ...] = ("",),
    ) -> None:
        self.model, self.inputs, self.every, self.entries = model, inputs, every, entries
        self.seen: list[Seen] = []
        self._index, self._depth = -1, 0
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name in self.entries:
            module = self.model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
        for name, module in self.model.named_modules():
            if self.inputs:
                hook = module.register_forward_pre_hook(self._given(name), with_kwargs=True)
                self._handles.append(hook)
            self._handles.append(module.register_forward_hook(self._returned(name)))
        for name in self.entries:
            self._handles.append(self.model.get_submodule(name).register_forward_hook(self._leave))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _enter(self, _module: nn.Module, _args: Any) -> None:
        self._index += not self._depth
        self._depth += 1

    def _leave(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._depth -= 1

    def _keep(self, layer: str, tensor: Tensor) -> None:
        self.seen.append(Seen(self._index, layer, tensor.detach().clone()))

    def _given(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            for tensor in list(tensors_of((args, kwargs)))[:1]:
                self._keep(f"{name}@in", tensor)

        return hook

    def _returned(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = list(tensors_of(output))
            for place, tensor in enumerate(tensors if self.every else tensors[:1]):
                self._keep(f"{name}#{place}" if place else name, tensor)

        return hook


def _assert_same(log: Path, wanted: list[Seen]) -> None:
    """Compare a log with what was seen: order, names, passes, shapes, dtypes, bytes."""
    packets = read(log)
    assert [(one.layer, one.pass_index) for one in packets] == [
        (one.layer, one.index) for one in wanted
    ]
    for packet, one in zip(packets, wanted, strict=True):
        assert packet.shape == tuple(one.tensor.shape), one.layer
        assert packet.dtype.name == str(one.tensor.dtype).removeprefix("torch."), one.layer
        assert packet.values.tobytes() == bytes_of(one.tensor), one.layer


def _check(
    model: nn.Module, log: Path, run: Callable[[], Any], hooks: HookConfig, **how: Any
) -> list[Seen]:
    taps = Taps(model, inputs=hooks.inputs, every=hooks.outputs == "all", **how)
    with torch.no_grad(), taps, capturing(model, log, hooks=hooks):
        run()
    assert taps.seen
    _assert_same(log, taps.seen)
    return taps.seen


def _stored(log: Path) -> dict[str, int]:
    """Give each layer's stored bytes."""
    found = framework().analyze_activations(log)["per_layer"]
    return {name: one["bytes"] for name, one in found.items()}


# -- inputs -------------------------------------------------------------------------------------

INPUTS = HookConfig(inputs=True)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "t5"])
def test_inputs_are_what_every_module_was_given(architecture: str, log: Path) -> None:
    model = build(architecture)
    more = {"decoder_input_ids": token_ids(2, 4)} if architecture == "t5" else {}
    seen = _check(model, log, lambda: model(input_ids=token_ids(), **more), INPUTS)
    assert sum(one.layer.endswith("@in") for one in seen) > 20


def test_an_input_that_the_module_writes_in_place_is_what_it_was_before(log: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Apply(lambda x: x.mul_(3)), nn.ReLU(inplace=True))
    _check(model, log, lambda: model(torch.linspace(-1, 1, 8).reshape(2, 4)), INPUTS)
    found = {one.layer: one.values for one in read(log)}
    np.testing.assert_array_equal(found["1"], found["1@in"] * 3)
    assert not np.array_equal(found["2"], found["2@in"])


class _ByName(nn.Module):
    """Gives its child everything by name, and other things before the first tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Apply(lambda flag, pair, x, y: x + y)
        self.empty = Apply(lambda **_: torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        self.empty(nothing=None)
        return self.child(flag=None, pair=(3, "text"), x=x + 1, y=x)


def test_an_input_given_by_name_only_is_kept(log: Path) -> None:
    model = _ByName()
    seen = _check(model, log, lambda: model(x=torch.ones(2, 3)), INPUTS)
    assert [one.layer for one in seen] == ["@in", "empty", "child@in", "child", ""]
    assert torch.equal(seen[2].tensor, torch.full((2, 3), 2.0))


@pytest.mark.parametrize(
    "given", [(None, [torch.ones(1), torch.zeros(2)]), {"a": 3, "b": torch.ones(4)}, Pair(1, 2)]
)
def test_the_first_tensor_of_a_nested_input_is_kept(given: Any, log: Path) -> None:
    model = nn.Sequential(Apply(lambda x: torch.ones(5)))
    _check(model, log, lambda: model(given), INPUTS)


def test_an_input_that_was_an_output_before_takes_no_bytes(log: Path) -> None:
    model = sequential()
    _check(model, log, lambda: model(torch.ones(2, 8)), INPUTS)
    stored = _stored(log)
    assert stored["@in"] > 0
    assert stored["0@in"] == stored["1@in"] == stored["5@in"] == 0
    assert stored["1"] > 0  # changed in place since it was an input


def test_inputs_of_the_targets_only_are_kept(log: Path) -> None:
    model = build("llama")
    hooks = HookConfig(inputs=True, target_layers=["model.layers.*.mlp"])
    with torch.no_grad(), Taps(model, inputs=True) as taps, capturing(model, log, hooks=hooks):
        model(token_ids())
    ends = (".mlp", ".mlp@in")
    _assert_same(log, [one for one in taps.seen if one.layer.endswith(ends)])
    with open_stream(log) as reader:
        assert reader.layers["model.layers.1.mlp@in"].site == "mlp@in"


@pytest.mark.parametrize(
    ("targets", "wanted"),
    [
        (["model.layers.1.mlp@in"], ["model.layers.1.mlp@in"]),
        (["model.layers.*.mlp@in"], ["model.layers.0.mlp@in", "model.layers.1.mlp@in"]),
        (["lm_head", "lm_head@in"], ["lm_head@in", "lm_head"]),
        (["@in"], ["@in"]),
    ],
)
def test_a_target_with_the_ending_in_names_what_a_module_is_given(
    targets: list[str], wanted: list[str], log: Path
) -> None:
    model = build("llama")
    hooks = HookConfig(target_layers=targets)
    with torch.no_grad(), Taps(model, inputs=True) as taps, capturing(model, log, hooks=hooks):
        model(token_ids())
    assert [one.layer for one in read(log)] == wanted
    _assert_same(log, [one for one in taps.seen if one.layer in wanted])


def test_a_glob_without_the_ending_in_means_outputs_only() -> None:
    model = build("llama")
    found = select(model, FULL, HookConfig(target_layers=["model.layers.0*"]))
    assert {one.tap for one in found} == {"out"}


# -- all outputs --------------------------------------------------------------------------------

MANY: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, x + 1, x + 2),
    "none_between": lambda x: (None, x, None, "text", x * 2),
    "dict": lambda x: {"a": x, "b": None, "c": x * 3},
    "named_tuple": lambda x: Pair(x + 4, x + 5),
    "model_output": lambda x: Output(logits=x, hidden=(x * 7, [x * 8])),
    "nested": lambda x: ([x, {"a": (x + 1,), "b": [(), x.sum()]}], x[:0]),
    "one_tensor": lambda x: x,
    "one_in_a_list": lambda x: [x + 1],
    "the_same_twice": lambda x: (x, x),
    "dtypes": lambda x: (x.int(), x.double(), x > 0),
}


@pytest.mark.parametrize("name", MANY)
def test_all_outputs_are_kept_depth_first(name: str, log: Path) -> None:
    model = Each(many=MANY[name], after=lambda x: x + 1)
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    seen = _check(model, log, lambda: (model(x), model(x)), HookConfig(outputs="all"))
    mine = {one.layer for one in seen if one.layer.startswith("many")}
    assert mine == {"many", *(f"many#{place}" for place in range(1, len(mine)))}


def test_outputs_that_come_only_later_are_layers_from_then_on(log: Path) -> None:
    model = Each(many=lambda x: tuple(x.unbind()), after=lambda x: x)

    def run() -> None:
        for count in (1, 3, 0, 2):
            model(torch.ones(count, 4))

    _check(model, log, run, HookConfig(outputs="all"))


def test_all_outputs_of_a_language_model_have_sites_of_their_own(log: Path) -> None:
    model = build("llama")
    hooks = HookConfig(outputs="all")
    run = {"output_hidden_states": True, "use_cache": False}
    _check(model, log, lambda: model(token_ids(), **run), hooks)
    with open_stream(log) as reader:
        for name, info in reader.layers.items():
            stem, _, place = name.partition("#")
            if place:
                first = reader.layers[stem]
                assert (info.site, info.block) == (f"{first.site}#{place}", first.block)
                assert info.kind == first.kind
        assert "#1" in reader.layers


def test_all_inputs_and_all_outputs_are_kept_together(log: Path) -> None:
    model = Each(many=MANY["nested"], after=lambda x: (x, x + 1))
    hooks = HookConfig(inputs=True, outputs="all")
    _check(model, log, lambda: model(torch.ones(2, 3, 4)), hooks)


# -- rows ---------------------------------------------------------------------------------------

_LEFT = [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]
_RIGHT = [[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]]
MASKS = {"left": _LEFT, "right": _RIGHT, "none": [[1] * 6] * 3}


def _by_length(axis: Any) -> Any:
    """Ask for one row more of each item than of the one before it: 0, 1, 2 …"""
    return np.arange(axis.sequence) < np.arange(axis.batch).reshape(-1, 1)


def _last_of(row: list[int]) -> int:
    return max(place for place, real in enumerate(row) if real)


#: rows -> for each item of a mask the places that are asked for.
WANTED: dict[str, tuple[Any, Callable[[list[list[int]]], list[list[int]]]]] = {
    "last": ("last", lambda mask: [[_last_of(row)] for row in mask]),
    "first_two": (slice(2), lambda mask: [[0, 1] for _ in mask]),
    "every_other": (slice(None, None, 2), lambda mask: [[0, 2, 4] for _ in mask]),
    "from_the_end": (slice(-2, None), lambda mask: [[4, 5] for _ in mask]),
    "beyond": (slice(4, 99), lambda mask: [[4, 5] for _ in mask]),
    "by_length": (_by_length, lambda mask: [list(range(item)) for item in range(len(mask))]),
    "tensor": (
        lambda axis: torch.from_numpy(axis.mask.copy()),
        lambda mask: [[place for place, real in enumerate(row) if real] for row in mask],
    ),
}


def _filled(wanted: list[list[int]], sequence: int) -> list[list[int]]:
    """Fill up what items keep to the same number, with the first of the other rows."""
    most = max(map(len, wanted))
    filled = []
    for mine in wanted:
        others = [place for place in range(sequence) if place not in mine]
        filled.append(sorted(mine + others[: most - len(mine)]))
    return filled


def _pick(tensor: Tensor, batch: int, sequence: int, places: list[list[int]]) -> Tensor | None:
    """Pick rows of a tensor over [batch, sequence] by hand; None where none are kept."""
    if tensor.shape[:2] == (batch, sequence):
        by_item = tensor
    elif sequence > 1 and tensor.shape[:1] == (batch * sequence,):
        by_item = tensor.reshape(batch, sequence, *tensor.shape[1:])
    else:
        return tensor
    if not places[0]:
        return None
    found = torch.stack(
        [torch.stack([by_item[b, s] for s in mine]) for b, mine in enumerate(places)]
    )
    merged = tensor.shape[:2] != (batch, sequence)
    return found.reshape(-1, *found.shape[2:]) if merged else found


class Fed(NamedTuple):
    """What a pass was fed, and which of its rows are to be kept."""

    ids: Tensor
    positions: Any
    mask: Any
    wanted: list[list[int]]

    @property
    def places(self) -> list[list[int]]:
        return _filled(self.wanted, self.ids.shape[1])

    def kept(self, values: Any) -> np.ndarray:
        values = np.broadcast_to(np.asarray(values), tuple(self.ids.shape))
        rows = [[item[s] for s in mine] for item, mine in zip(values, self.places, strict=True)]
        return np.array(rows).reshape(len(rows), -1)

    @property
    def real(self) -> np.ndarray:
        """Whether each kept row was asked for and is no padding."""
        asked = np.zeros(tuple(self.ids.shape), bool)
        for row, mine in zip(asked, self.wanted, strict=True):
            row[mine] = True
        return self.kept(asked & np.asarray(self.mask, bool)).astype(bool)


def _assert_rows(log: Path, seen: list[Seen], fed: list[Fed], *, archive: bool = True) -> None:
    """Compare a log, its passes, its dataset and its archive with rows that are picked by hand."""
    picked = []
    for one in seen:
        info = fed[one.index]
        tensor = _pick(one.tensor, *info.ids.shape, info.places)
        if tensor is not None:
            picked.append(one._replace(tensor=tensor))
    _assert_same(log, picked)
    with open_stream(log) as reader:
        assert len(reader.passes) == len(fed)
        for info, wanted in zip(reader.passes, fed, strict=True):
            (axis,) = info.axes
            assert (axis.batch, axis.sequence) == wanted.kept(wanted.ids).shape
            if axis.sequence:
                np.testing.assert_array_equal(axis.token_ids, wanted.kept(wanted.ids))
                np.testing.assert_array_equal(axis.positions, wanted.kept(wanted.positions))
                np.testing.assert_array_equal(axis.mask, wanted.real)
    paths = [log]
    if archive:
        paths.append(log.with_name("run.zarr"))
        actstore.compact(log, paths[-1])
    for path in paths:
        with actstore.open_dataset(path, chunks=None) as dataset:
            _assert_dataset(dataset, picked, fed)


def _assert_dataset(dataset: Any, picked: list[Seen], fed: list[Fed]) -> None:
    columns = {
        "token_id": [one.kept(one.ids) for one in fed],
        "position": [one.kept(one.positions) for one in fed],
        "is_padding": [~one.real for one in fed],
        "pass_index": [np.full(one.kept(one.ids).shape, i) for i, one in enumerate(fed)],
    }
    for name, parts in columns.items():
        wanted = np.concatenate([part.ravel() for part in parts])
        if name in dataset.coords or wanted.size:
            np.testing.assert_array_equal(dataset[name].values, wanted)
    for site, layer in (("resid", "model.layers.1"), ("logits", "lm_head")):
        parts = [one.tensor.flatten(0, 1).numpy() for one in picked if one.layer == layer]
        if parts:
            values = dataset[site].values
            np.testing.assert_array_equal(
                values[1] if site == "resid" else values, np.concatenate(parts)
            )
        else:
            assert site not in dataset


@pytest.mark.parametrize("side", MASKS)
@pytest.mark.parametrize("name", WANTED)
def test_of_a_padded_batch_the_rows_that_are_asked_for_are_kept(
    name: str, side: str, log: Path
) -> None:
    model, (rows, places) = build("llama"), WANTED[name]
    ids, mask = token_ids(3, 6), torch.tensor(MASKS[side])
    positions = (mask.cumsum(1) - 1).clip(min=0)
    hooks = HookConfig(rows=rows)
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(ids, attention_mask=mask, position_ids=positions)
    fed = Fed(ids, positions, mask, places(MASKS[side]))
    _assert_rows(log, taps.seen, [fed], archive=name in ("last", "by_length"))


@pytest.mark.parametrize(
    "rows",
    ["generated", slice(9, None), lambda axis: np.zeros((axis.batch, axis.sequence), bool)],
)
def test_a_prefill_of_which_no_rows_are_asked_for_stores_nothing_and_is_not_taken_for_silence(
    rows: Any, log: Path
) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model, HookConfig(rows=rows))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with one.capture_activations(log):
            model(torch.ones(2, 3, 8))
    assert read(log) == []
    assert one.summary["never_fired"] == []
    assert not any("no layer fired" in str(each.message) for each in told)
    with open_stream(log) as reader:
        assert [axis.rows for axis in reader.passes[0].axes] == [0]


@pytest.mark.parametrize("rows", ["last", slice(-1, None)])
@pytest.mark.parametrize("inputs", [False, True])
def test_rows_of_a_generation_are_those_of_each_of_its_passes(
    rows: Any, inputs: bool, log: Path
) -> None:
    model, ids = build("llama"), token_ids()
    hooks = HookConfig(rows=rows, inputs=inputs)
    with torch.no_grad(), Taps(model, inputs=inputs) as taps, capturing(model, log, hooks=hooks):
        out = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    fed = [Fed(ids, np.arange(5), np.ones((2, 5)), [[4], [4]])]
    fed += [
        Fed(out[:, at : at + 1], np.full((2, 1), at), np.ones((2, 1)), [[0], [0]])
        for at in range(5, 8)
    ]
    seen = []
    for one in taps.seen:
        head = one.index == 0 and one.layer in ("", "lm_head")  # which computes row 4 only
        seen.append(one._replace(tensor=one.tensor.expand(2, 5, 64)) if head else one)
    _assert_rows(log, seen, fed)


@pytest.mark.parametrize("side", ["left", "none"])
def test_generated_rows_of_a_cached_generation_are_all_but_the_prefill(
    side: str, log: Path
) -> None:
    model, ids, mask = build("llama"), token_ids(3, 6), torch.tensor(MASKS[side])
    hooks = HookConfig(rows="generated")
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        out = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0
        )
    positions = (mask.cumsum(1) - 1).clip(min=0)
    fed = [Fed(ids, positions, mask, [[]] * 3)]
    for at in range(6, 9):
        now = mask.sum(1, keepdim=True) + at - 6
        fed.append(Fed(out[:, at : at + 1], now, np.ones((3, 1)), [[0]] * 3))
    seen = [one for one in taps.seen if one.index or one.layer not in ("", "lm_head")]
    _assert_rows(log, seen, fed)


def test_where_every_item_is_padded_on_the_left_the_prefill_is_still_the_prompt(log: Path) -> None:
    model, ids, mask = build("llama"), token_ids(2, 6), torch.tensor([_LEFT[0], _LEFT[2]])
    hooks = HookConfig(rows="generated", target_layers=["model.norm"])
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with Oracle(model, ["model.norm"]) as oracle, capturing(model, log, hooks=hooks):
        model.generate(ids, attention_mask=mask, **how)
    assert [as_fired(one) for one in read(log)] == oracle.fired[1:]


def test_generated_rows_of_a_loop_that_feeds_everything_again_are_those_behind_the_prompt(
    log: Path,
) -> None:
    model, ids, fed = build("llama"), token_ids(1, 3), []
    hooks = HookConfig(rows="generated")
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        for step in range(4):
            shape = (1, 3 + step)
            fed.append(Fed(ids, np.arange(3 + step), np.ones(shape), [list(range(3, 3 + step))]))
            following = model(ids, use_cache=False).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, following], dim=1)
    _assert_rows(log, taps.seen, fed)


def test_another_prompt_begins_another_generation(log: Path) -> None:
    model, fed = build("llama"), []
    hooks = HookConfig(rows="generated")
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        for prompt in (token_ids(2, 3), token_ids(2, 3).flip(1), token_ids(3, 4)):
            for more in range(2):
                ids = torch.cat([prompt, torch.full((len(prompt), more), 9)], dim=1)
                length = ids.shape[1]
                wanted = [list(range(prompt.shape[1], length))] * len(ids)
                fed.append(Fed(ids, np.arange(length), np.ones(ids.shape), wanted))
                model(ids, use_cache=False)
    _assert_rows(log, taps.seen, fed)


class _Flat(nn.Module):
    """A language model of one sequence without a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.head = nn.Embedding(64, 8), nn.Linear(8, 8), nn.Linear(8, 64)
        self.batched = Apply(lambda x: x.unsqueeze(0))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.block(self.embed(input_ids))
        self.batched(x)
        return self.head(x)


@pytest.mark.parametrize("rows", ["last", slice(1, 3), lambda axis: axis.token_ids % 2 == 0])
def test_rows_of_ids_without_a_batch_are_those_of_one_sequence(rows: Any, log: Path) -> None:
    model, ids = _Flat(), torch.tensor([4, 7, 6, 8, 3])
    places = [4] if rows == "last" else [1, 2] if isinstance(rows, slice) else [0, 2, 3]
    hooks = HookConfig(rows=rows)
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(ids)
    wanted = [
        one if one.layer == "batched" else one._replace(tensor=one.tensor[places])
        for one in taps.seen
    ]
    _assert_same(log, wanted)
    with actstore.open_dataset(log, chunks=None) as dataset:
        assert dataset["token_id"].values.tolist() == ids[places].tolist()
        assert dataset["position"].values.tolist() == places
        assert not dataset["is_padding"].values.any()
        block = next(one.tensor for one in wanted if one.layer == "block")
        np.testing.assert_array_equal(dataset["block"].values, block.numpy())


def test_rows_of_inputs_without_tokens_are_their_leading_dimensions(log: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
    hooks = HookConfig(rows=slice(1, None))
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(torch.rand(2, 3, 4))
    _assert_same(log, [one._replace(tensor=one.tensor[:, 1:]) for one in taps.seen])


def test_rows_of_a_batch_merged_with_its_sequence_know_their_tokens(log: Path) -> None:
    model, ids = build("mixtral"), token_ids()
    hooks = HookConfig(rows="last", target_layers=["*.gate", "model.layers.1"])
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(ids)
    wanted = []
    for one in taps.seen:
        if one.layer.endswith(".gate"):
            wanted.append(one._replace(tensor=one.tensor.reshape(2, 5, -1)[:, -1]))
        elif one.layer == "model.layers.1":
            wanted.append(one._replace(tensor=one.tensor[:, -1:]))
    packets = read(log)
    assert [one.layer for one in packets] == [one.layer for one in wanted]
    for packet, one in zip(packets, wanted, strict=True):
        assert packet.values.tobytes() == bytes_of(one.tensor)
    with actstore.open_dataset(log, chunks=None) as dataset:
        gate = dataset["model.layers.mlp.gate"]
        assert gate.dims[:2] == ("layer", "token")
        np.testing.assert_array_equal(gate.values[1], wanted[1].tensor.numpy())


_ENCODED, _DECODED = 6, 4


def _t5_rows(log: Path, decoded: int, rows: Any) -> tuple[dict[str, Tensor], Any]:
    """Run T5 with an encoder that is padded on the right; give clones, by layer."""
    model = build("t5")
    ids, mask = token_ids(2, _ENCODED), torch.ones(2, _ENCODED, dtype=torch.long)
    mask[0, 4:] = 0
    hooks = HookConfig(rows=rows)
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=token_ids(2, decoded))
    return {one.layer: one.tensor for one in taps.seen}, ids


def _last_rows(layer: str, tensor: Tensor, decoded: int) -> Tensor:
    """Pick the last rows by hand: of what T5's encoder computes items 0 and 1 end at 3 and 5."""
    of_encoder = layer.startswith("encoder") or layer.endswith(
        ("EncDecAttention.k", "EncDecAttention.v")
    )
    length, last = (_ENCODED, [3, 5]) if of_encoder else (decoded, [decoded - 1] * 2)
    if tensor.shape[:2] != (2, length):
        return tensor
    return torch.stack([tensor[item, place] for item, place in enumerate(last)]).unsqueeze(1)


def test_rows_of_an_encoder_and_of_a_decoder_are_each_their_own(log: Path) -> None:
    clones, ids = _t5_rows(log, _DECODED, "last")
    clones.pop("shared", None)
    packets = [one for one in read(log) if one.layer in clones]
    last = {one.layer: one for one in packets}  # the oracle's dict also has the last call
    assert set(last) == set(clones)
    for layer, tensor in clones.items():
        wanted = _last_rows(layer, tensor, _DECODED)
        assert last[layer].shape == tuple(wanted.shape), layer
        assert last[layer].values.tobytes() == bytes_of(wanted), layer
    with open_stream(log) as reader:
        encoder, decoder = reader.passes[0].axes
    assert (encoder.name, decoder.name) == ("encoder_token", "decoder_token")
    np.testing.assert_array_equal(encoder.token_ids, [[ids[0, 3]], [ids[1, 5]]])
    np.testing.assert_array_equal(encoder.positions, [[3], [5]])
    np.testing.assert_array_equal(decoder.token_ids, token_ids(2, _DECODED)[:, -1:])
    assert encoder.mask.all()
    assert decoder.mask.all()


def test_a_decoder_as_long_as_its_encoder_keeps_its_own_rows(log: Path) -> None:
    clones, _ = _t5_rows(log, _ENCODED, "last")
    packets = {one.layer: one for one in read(log)}
    for layer in (
        *("decoder.block.1", "decoder.block.0.layer.0.SelfAttention.q"),
        *("decoder.final_layer_norm", "lm_head", ""),
    ):
        wanted = _last_rows(layer, clones[layer], _ENCODED)
        assert packets[layer].values.tobytes() == bytes_of(wanted), layer


def test_in_a_dataset_kept_rows_of_encoder_and_decoder_know_their_tokens(log: Path) -> None:
    clones, ids = _t5_rows(log, _DECODED, "last")
    actstore.compact(log, log.with_name("run.zarr"))
    for path in (log, log.with_name("run.zarr")):
        with actstore.open_dataset(path, chunks=None) as dataset:
            wanted = [int(ids[0, 3]), int(ids[1, 5])]
            assert dataset["encoder_token_id"].values.tolist() == wanted
            assert dataset["encoder_position"].values.tolist() == [3, 5]
            assert dataset["decoder_position"].values.tolist() == [_DECODED - 1] * 2
            for site, layer in (("encoder_resid", "encoder.block.1"), ("logits", "lm_head")):
                one = dataset[site]
                values = one.values[1] if site == "encoder_resid" else one.values
                rows = _last_rows(layer, clones[layer], _DECODED)
                np.testing.assert_array_equal(values, rows[:, 0].numpy())


def test_generated_rows_of_an_encoder_decoder_are_what_it_decodes(log: Path) -> None:
    model, ids, hooks = build("t5"), token_ids(2, _ENCODED), HookConfig(rows="generated")
    entries = ("", "encoder", "decoder")
    with Taps(model, entries=entries) as taps, capturing(model, log, hooks=hooks):
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    wanted = []
    for one in taps.seen:
        rows = one.tensor.shape[:2]
        encoded, start = (
            one.index == 0 and rows == (2, _ENCODED),
            one.index == 1 and rows == (2, 1),
        )
        if not (encoded or start):
            wanted.append(one)
    _assert_same(log, wanted)
    assert {one.index for one in wanted if one.layer == "lm_head"} == {2, 3, 4}


@pytest.mark.parametrize(
    ("rows", "places"), [("last", [4]), (slice(-2, None), [3, 4]), (slice(3, 4), [3])]
)
def test_rows_of_a_head_that_computes_the_last_ones_are_picked_among_them(
    rows: Any, places: list[int], log: Path
) -> None:
    model, ids = build("llama"), token_ids()
    hooks = HookConfig(rows=rows)
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        model(ids, logits_to_keep=2)
    seen = []
    for one in taps.seen:
        whole = one.tensor
        if one.layer in ("", "lm_head"):  # rows 3 and 4; the others are not there
            whole = torch.cat([torch.full((2, 3, 64), torch.nan), whole], dim=1)
        seen.append(one._replace(tensor=whole))
    _assert_rows(log, seen, [Fed(ids, np.arange(5), np.ones((2, 5)), [places] * 2)])


def test_rows_that_a_head_did_not_compute_are_named_and_the_others_kept(log: Path) -> None:
    model = build("llama")
    one = framework()
    one.instrument_model(model, HookConfig(rows=slice(2)))
    with pytest.warns(actstore.errors.ActstoreWarning) as warned, one.capture_activations(log):
        model(token_ids(), logits_to_keep=2)
    assert any("lm_head" in str(each.message) for each in warned)
    assert {name.partition(":")[0] for name in one.summary["skipped"]} == {"lm_head", ""}
    found = {each.layer for each in read(log)}
    assert "model.norm" in found
    assert not found & {"lm_head", ""}


class _OwnHead(nn.Module):
    """A head that is not known as one, whose output the model returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.unembed = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: Tensor, logits_to_keep: int = 0) -> Tensor:
        return self.unembed(self.embed(input_ids)[:, -logits_to_keep:])


def test_an_alias_is_of_a_packet_that_has_the_same_rows(log: Path) -> None:
    model = _OwnHead()
    with (
        torch.no_grad(),
        Taps(model) as taps,
        capturing(model, log, hooks=HookConfig(rows="last")),
    ):
        model(token_ids(), logits_to_keep=2)
    found = {one.layer: one.values for one in read(log)}
    wanted = {one.layer: one.tensor.numpy() for one in taps.seen}
    np.testing.assert_array_equal(found["embed"], wanted["embed"][:, -1:])
    np.testing.assert_array_equal(found["unembed"][:, -1:], wanted["unembed"][:, -1:])
    np.testing.assert_array_equal(found[""][:, -1:], wanted[""][:, -1:])


@pytest.mark.parametrize("rows", ["last", "generated", slice(2)])
def test_a_pass_of_no_rows_is_no_error_whatever_rows_are_asked_for(rows: Any, log: Path) -> None:
    model = _OwnHead()
    with torch.no_grad(), capturing(model, log, hooks=HookConfig(rows=rows)):
        model(token_ids()[:, :0])
        model(token_ids())
    with open_stream(log) as reader:
        assert reader.passes[0].axes[0].sequence == 0


@pytest.mark.parametrize(
    "rows",
    [
        lambda axis: np.ones(axis.sequence, bool),
        lambda axis: np.ones((axis.batch, axis.sequence)),
        lambda axis: np.ones((axis.batch, axis.sequence + 1), bool),
        lambda axis: True,
        lambda axis: None,
        lambda axis: [[0], [1]],
    ],
)
def test_a_callable_that_gives_anything_but_bool_of_each_row_is_refused(
    rows: Any, log: Path
) -> None:
    model = sequential()
    with (
        pytest.raises(ConfigError, match=r"rows must give bool \(2, 3\)"),
        capturing(model, log, hooks=HookConfig(rows=rows)),
    ):
        model(torch.ones(2, 3, 8))


def test_a_refused_callable_leaves_the_capture_as_it_was(log: Path) -> None:
    model, shapes = sequential(), iter([(1, 1), (2, 3)])
    hooks = HookConfig(rows=lambda axis: np.ones(next(shapes), bool))
    with torch.no_grad(), Taps(model) as taps, capturing(model, log, hooks=hooks):
        with pytest.raises(ConfigError):
            model(torch.ones(2, 3, 8))
        taps.__exit__(None, None, None)
        with Taps(model) as after:
            model(torch.ones(2, 3, 8))
    _assert_same(log, after.seen)


@pytest.mark.parametrize("inputs", [False, True])
def test_of_the_rows_that_are_kept_a_sample_has_only_its_features(inputs: bool, log: Path) -> None:
    model, hooks = build("llama"), HookConfig(rows="last", sampling_rate=0.3, inputs=inputs)
    sampled = HookGranularity.SAMPLED_SLICES
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with Taps(model, inputs=inputs) as taps, capturing(model, log, sampled, hooks=hooks):
        model.generate(token_ids(3, 5), **how)
    with open_stream(log) as reader:
        features = {width: kept.astype(int) for width, kept in reader.features.items()}
        packets = list(reader.packets())
    for packet, one in zip(packets, taps.seen, strict=True):
        whole = one.tensor[:, -1:] if one.tensor.shape[:2] == (3, 5) else one.tensor
        wanted = whole.numpy()[..., features[whole.shape[-1]]]
        assert (packet.layer, packet.shape) == (one.layer, wanted.shape)
        assert packet.values.tobytes() == wanted.tobytes(), packet.layer


# -- TransformerLens' names ---------------------------------------------------------------------

LENS = {
    "blocks.1.hook_resid_post": ["model.layers.1"],
    "blocks.*.hook_mlp_out": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "blocks.0.hook_attn_out": ["model.layers.0.self_attn"],
    "blocks.0.hook_resid_pre": ["model.layers.0@in"],
    "blocks.*.hook_resid_pre": ["model.layers.0@in", "model.layers.1@in"],
    "hook_embed": ["model.embed_tokens"],
    "ln_final.hook_normalized": ["model.norm"],
}


@pytest.mark.parametrize("name", LENS)
def test_the_names_of_transformer_lens_are_targets(name: str, log: Path) -> None:
    model, wanted = build("llama"), LENS[name]
    hooks = HookConfig(target_layers=[name])
    with torch.no_grad(), Taps(model, inputs=True) as taps, capturing(model, log, hooks=hooks):
        model(token_ids())
    seen = [one for one in taps.seen if one.layer in wanted]
    assert [one.layer for one in seen] == wanted
    _assert_same(log, seen)
    if "*" not in name:
        with open_stream(log) as reader:
            assert reader.layer(name).name == wanted[0]
            (packet,) = reader.packets(name)
            assert packet.layer == wanted[0]
            assert packet.values.tobytes() == bytes_of(seen[0].tensor)


def test_the_pattern_of_transformer_lens_is_the_attention_weights(log: Path) -> None:
    model = _eager("llama")
    hooks = HookConfig(target_layers=["blocks.0.attn.hook_pattern"])
    with torch.no_grad(), capturing(model, log, hooks=hooks):
        wanted = model(token_ids(), output_attentions=True).attentions[0]
    with open_stream(log) as reader:
        (packet,) = reader.packets("blocks.0.attn.hook_pattern")
        assert list(reader.layers) == [packet.layer] == ["model.layers.0.self_attn#weights"]
    assert packet.values.tobytes() == bytes_of(wanted)


@pytest.mark.parametrize(
    "name", ["blocks.7.hook_resid_post", "blocks.0.hook_q", "hook_pos_embed", "blocks.x.hook_mlp"]
)
def test_a_name_of_transformer_lens_that_means_nothing_here_is_refused(
    name: str, log: Path
) -> None:
    with pytest.raises(ConfigError, match="match none"):
        select(build("llama"), FULL, HookConfig(target_layers=[name]))
    with torch.no_grad(), capturing(build("llama"), log):
        build("llama")(token_ids())
    with open_stream(log) as reader, pytest.raises(ConfigError, match="has no layer"):
        reader.layer(name)


# -- stopping -----------------------------------------------------------------------------------


class _Counting(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def _counted() -> tuple[nn.Sequential, _Counting]:
    counting = _Counting()
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), counting, nn.Linear(4, 2)), counting


def test_nothing_behind_the_last_target_runs_and_the_model_returns_none(log: Path) -> None:
    model, counting = _counted()
    hooks = HookConfig(target_layers=["0", "1"], stop_after_last_layer=True)
    with Oracle(model, ["0", "1"]) as oracle, capturing(model, log, hooks=hooks):
        assert [model(torch.rand(2, 4)) for _ in range(3)] == [None] * 3
    assert counting.calls == 0
    assert [as_fired(one) for one in read(log)] == oracle.fired
    with open_stream(log) as reader:
        assert [one.aborted for one in reader.passes] == [False] * 3
    assert model(torch.rand(2, 4)).shape == (2, 2)
    assert counting.calls == 1


def test_a_forward_is_given_back_as_it_was(log: Path) -> None:
    model, _ = _counted()
    hooks = HookConfig(target_layers=["0"], stop_after_last_layer=True)
    with capturing(model, log, hooks=hooks):
        model(torch.rand(2, 4))
    assert "forward" not in vars(model)
    own = model.forward = lambda x: nn.Sequential.forward(model, x) + 1
    with capturing(model, log.with_name("second.stream"), hooks=hooks):
        assert model.forward is not own
        assert model(torch.rand(2, 4)) is None
    assert vars(model)["forward"] is own


def test_a_forward_is_given_back_where_the_model_raises(log: Path) -> None:
    def broken(_: Tensor) -> Tensor:
        msg = "the model's own"
        raise ZeroDivisionError(msg)

    model = Each(first=lambda x: x, broken=broken, last=lambda x: x)
    hooks = HookConfig(target_layers=["first", "last"], stop_after_last_layer=True)
    with (
        pytest.raises(ZeroDivisionError, match="the model's own"),
        capturing(model, log, hooks=hooks),
    ):
        model(torch.ones(2))
    assert "forward" not in vars(model)
    assert [one.layer for one in read(log)] == ["first"]
    with open_stream(log) as reader:
        assert [one.aborted for one in reader.passes] == [True]


@pytest.mark.parametrize("entry", ["", "model"])
def test_a_model_inside_of_another_stops_whichever_is_called(entry: str, log: Path) -> None:
    model = build("llama")
    name = "model.layers.0.mlp"
    hooks = HookConfig(target_layers=[name], stop_after_last_layer=True)
    called = model.get_submodule(entry)
    with torch.no_grad(), Oracle(model) as oracle, capturing(model, log, hooks=hooks):
        assert called(input_ids=token_ids()) is None
        assert called(input_ids=token_ids(1, 3)) is None
    assert [one.layer for one in oracle.fired].count(name) == 2
    assert not any(one.layer.startswith("model.layers.1") for one in oracle.fired)
    assert [as_fired(one) for one in read(log)] == [
        one for one in oracle.fired if one.layer == name
    ]
    with torch.no_grad():
        assert called(input_ids=token_ids()) is not None


def test_without_stopping_a_generation_is_what_it_is_without_capture(log: Path) -> None:
    model = build("llama")
    how = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    wanted = model.generate(token_ids(), **how)
    hooks = HookConfig(target_layers=["model.layers.0.mlp"])
    with capturing(model, log, hooks=hooks):
        assert torch.equal(model.generate(token_ids(), **how), wanted)


@pytest.mark.parametrize("targets", [None, [""], ["0", ""]])
def test_a_model_that_is_itself_the_last_layer_runs_to_its_end(
    targets: list[str] | None, log: Path
) -> None:
    model, counting = _counted()
    hooks, given = HookConfig(target_layers=targets, stop_after_last_layer=True), torch.rand(2, 4)
    wanted = model(given)
    counting.calls = 0
    with Oracle(model) as oracle, capturing(model, log, hooks=hooks):
        assert torch.equal(model(given), wanted)
    assert counting.calls == 1
    found = [as_fired(one) for one in read(log)]
    assert found == [one for one in oracle.fired if targets is None or one.layer in targets]


def test_a_part_that_is_called_by_itself_raises_nothing_of_ours(log: Path) -> None:
    model, _ = _counted()
    hooks = HookConfig(target_layers=["0"], stop_after_last_layer=True)
    with Oracle(model, ["0"]) as oracle, capturing(model, log, hooks=hooks):
        model[0](torch.rand(2, 4))
    assert [as_fired(one) for one in read(log)] == oracle.fired


def test_all_outputs_of_the_last_layer_are_kept_before_the_stop(log: Path) -> None:
    model = Each(many=lambda x: (x, x + 1, x + 2), after=lambda x: x)
    hooks = HookConfig(target_layers=["many"], outputs="all", stop_after_last_layer=True)
    with capturing(model, log, hooks=hooks):
        assert model(torch.ones(2)) is None
    assert [one.layer for one in read(log)] == ["many", "many#1", "many#2"]


def test_a_layer_that_was_skipped_has_fired_too(log: Path) -> None:
    counting = _Counting()
    model = Each(odd=lambda x: x.to_sparse(), counting=counting)
    hooks = HookConfig(target_layers=["odd"], stop_after_last_layer=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", actstore.errors.ActstoreWarning)
        with capturing(model, log, hooks=hooks):
            assert model(torch.ones(2, 2)) is None
    assert counting.calls == 0


# -- attention weights --------------------------------------------------------------------------


def _eager(name: str) -> nn.Module:
    """Give a model that computes its attention weights."""
    return build(name, attn_implementation="eager")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "bert", "bloom", "gpt_neox", "phi"])
def test_attention_weights_are_those_that_the_model_gives(architecture: str, log: Path) -> None:
    model, attention = _eager(architecture), ARCHITECTURES[architecture]["attn"]
    hooks = HookConfig(attention_weights=True)
    with torch.no_grad():
        with capturing(model, log, ATTENTION, hooks=hooks):
            model(input_ids=token_ids())
        wanted = model(input_ids=token_ids(), output_attentions=True).attentions
    assert len(wanted) == 2
    found = [one for one in read(log) if "#" in one.layer]
    assert [one.layer for one in found] == [f"{attention.format(i)}#weights" for i in range(2)]
    for packet, weights in zip(found, wanted, strict=True):
        assert packet.shape == tuple(weights.shape) == (2, 4, 5, 5)
        assert packet.values.tobytes() == bytes_of(weights)


def test_attention_weights_of_an_encoder_decoder_are_no_position_biases(log: Path) -> None:
    model, fed = _eager("t5"), {"input_ids": token_ids(), "decoder_input_ids": token_ids(2, 4)}
    hooks = HookConfig(attention_weights=True)
    with torch.no_grad():
        with capturing(model, log, ATTENTION, hooks=hooks):
            model(**fed, use_cache=False)
        said = model(**fed, use_cache=False, output_attentions=True)
    found = {one.layer: one.values for one in read(log)}
    for block in range(2):
        for name, wanted in (
            (f"encoder.block.{block}.layer.0.SelfAttention#weights", said.encoder_attentions),
            (f"decoder.block.{block}.layer.0.SelfAttention#weights", said.decoder_attentions),
            (f"decoder.block.{block}.layer.1.EncDecAttention#weights", said.cross_attentions),
        ):
            np.testing.assert_array_equal(found[name], wanted[block].numpy(), err_msg=name)


def test_attention_weights_of_a_generation_grow_with_what_is_cached(log: Path) -> None:
    model = _eager("llama")
    how = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    hooks = HookConfig(attention_weights=True)
    with torch.no_grad():
        with capturing(model, log, ATTENTION, hooks=hooks):
            model.generate(token_ids(), **how)
        said = model.generate(
            token_ids(), **how, output_attentions=True, return_dict_in_generate=True
        )
    found = [one.values for one in read(log) if "#" in one.layer]
    wanted = [weights for step in said.attentions for weights in step]
    assert [one.shape[2:] for one in found] == [(5, 5)] * 2 + [(1, 6)] * 2 + [(1, 7)] * 2
    for values, weights in zip(found, wanted, strict=True):
        assert values.tobytes() == bytes_of(weights)


def test_attention_that_never_computes_its_weights_is_refused_and_told_how(log: Path) -> None:
    model = build("llama")
    with pytest.raises(ConfigError, match=r"'sdpa'.*attn_implementation='eager'"):
        framework(ATTENTION).instrument_model(model, HookConfig(attention_weights=True))
    with pytest.raises(ConfigError, match="attn_implementation='eager'"):
        framework().instrument_model(
            model, HookConfig(target_layers=["blocks.*.attn.hook_pattern"])
        )


def test_attention_weights_without_attention_among_the_targets_are_refused() -> None:
    for model, targets in ((sequential(), None), (_eager("llama"), ["model.norm"])):
        with pytest.raises(ConfigError, match="attention_weights: none of the hooked modules"):
            hooks = HookConfig(attention_weights=True, target_layers=targets)
            framework().instrument_model(model, hooks)


class _Multihead(nn.Module):
    """Torch's own attention, of which it wants the weights."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.self_attn, self.how = nn.MultiheadAttention(8, 2, batch_first=True), how

    def forward(self, x: Tensor) -> Tensor:
        return self.self_attn(x, x, x, **self.how)[0]


def test_attention_weights_of_multihead_attention_are_those_of_each_head(log: Path) -> None:
    model, x = _Multihead(average_attn_weights=False), torch.rand(3, 5, 8)
    hooks = HookConfig(attention_weights=True)
    with torch.no_grad():
        with Oracle(model) as oracle, capturing(model, log, ATTENTION, hooks=hooks):
            model(x)
        wanted = model.self_attn(x, x, x, average_attn_weights=False)[1]
    out, weights = read(log)
    assert as_fired(out) == oracle.fired[0]
    assert (weights.layer, weights.shape) == ("self_attn#weights", (3, 2, 5, 5))
    assert weights.values.tobytes() == bytes_of(wanted)


@pytest.mark.parametrize("how", [{}, {"need_weights": False}])
def test_weights_that_are_not_of_each_head_are_told_never_to_have_fired(
    how: dict[str, Any], log: Path
) -> None:
    model = _Multihead(**how)
    one = framework(ATTENTION)
    one.instrument_model(model, HookConfig(attention_weights=True))
    with (
        pytest.warns(actstore.errors.ActstoreWarning, match="never fired: 'self_attn#weights'"),
        one.capture_activations(log),
    ):
        model(torch.rand(3, 5, 8))
    assert one.summary["never_fired"] == ["self_attn#weights"]


def test_weights_averaged_over_the_heads_are_among_all_outputs(log: Path) -> None:
    model, x = _Multihead(), torch.rand(3, 5, 8)
    hooks = HookConfig(attention_weights=True, outputs="all")
    with Taps(model, every=True) as taps, capturing(model, log, ATTENTION, hooks=hooks):
        model(x)
    _assert_same(log, [one for one in taps.seen if one.layer.startswith("self_attn")])


def test_attention_weights_are_not_taken_for_rows_where_heads_are_as_many(log: Path) -> None:
    model, ids = _eager("llama"), token_ids(2, 4)
    hooks = HookConfig(attention_weights=True, rows="last")
    with torch.no_grad():
        with capturing(model, log, ATTENTION, hooks=hooks):
            model(ids)
        wanted = model(ids, output_attentions=True).attentions
    found = [one for one in read(log) if "#" in one.layer]
    assert [one.shape[1] for one in found] == [4, 4], "every head"
    for packet, weights in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(packet.values[:, :, -1], weights[:, :, -1].numpy())


# -- several models, and resuming ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("outputs", ("first", "all")),
        ("rows", (None, "last")),
        ("rows", (slice(2), slice(3))),
        ("stop_after_last_layer", (False, True)),
        ("sampling_rate", (0.5, 0.25)),
        ("sampling_seed", (0, 1)),
    ],
)
def test_models_whose_hooks_keep_different_things_are_refused(
    field: str, values: tuple[Any, Any], log: Path
) -> None:
    one, models = framework(), [sequential() for _ in values]
    for model, value in zip(models, values, strict=True):
        one.instrument_model(model, HookConfig(**{field: value}))
    with (
        pytest.raises(ConfigError, match=f"same HookConfig.{field}"),
        one.capture_activations(log),
    ):
        pass
    assert not log.exists()


def test_each_model_of_a_capture_may_have_its_inputs_kept_or_not(log: Path) -> None:
    first, second, x = sequential(), sequential(), torch.ones(2, 8)
    one = framework()
    one.instrument_model(first, HookConfig(inputs=True), name="a")
    one.instrument_model(second, name="b")
    with torch.no_grad(), quiet(), one.capture_activations(log):
        first(x)
        second(x)
    found = {each.layer for each in read(log)}
    assert {name for name in found if name.endswith("@in")} == {
        "a@in",
        *(f"a.{n}@in" for n in range(6)),
    }
    assert {"b", *(f"b.{n}" for n in range(6))} <= found


def _tracked(log: Path, hooks: HookConfig, *others: HookConfig, **how: Any) -> None:
    one = framework()
    models = [_OwnHead() for _ in (hooks, *others)]
    for model, mine in zip(models, (hooks, *others), strict=True):
        one.instrument_model(model, mine)
    capture = one.capture_activations(log, track_per_token=True, **how)
    with torch.no_grad(), quiet(), capture as tracker:
        for model in models:
            model(token_ids())
        tracker.record_token(3, "three")


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ({}, {"inputs": True}, "inputs"),
        ({"outputs": "all"}, {}, "outputs"),
        ({}, {"rows": "last"}, "rows"),
        ({"rows": "last"}, {"rows": "generated"}, "rows"),
        ({"rows": slice(2)}, {"rows": slice(3)}, "rows"),
        ({"rows": slice(2)}, {"rows": slice(0, 2)}, "rows"),
        ({"rows": "last"}, {"rows": _by_length}, "rows"),
        ({"target_layers": ["embed"]}, {"target_layers": ["embed@in"]}, "target_layers"),
    ],
)
def test_a_resume_that_keeps_other_things_is_refused_and_changes_nothing(
    before: dict[str, Any], after: dict[str, Any], named: str, log: Path
) -> None:
    _tracked(log, HookConfig(**before))
    data = log.read_bytes()
    with pytest.raises(ConfigError, match=rf"{named}: the log has"):
        _tracked(log, HookConfig(**after), resume_from_checkpoint=True)
    assert log.read_bytes() == data


@pytest.mark.parametrize(
    "hooks",
    [
        HookConfig(inputs=True, outputs="all"),
        HookConfig(rows=slice(-2, None)),
        HookConfig(rows=_by_length),
        HookConfig(target_layers=["embed", "embed@in"], stop_after_last_layer=True),
    ],
)
def test_a_resume_that_keeps_the_same_goes_on(hooks: HookConfig, log: Path) -> None:
    _tracked(log, hooks)
    once = [one.layer for one in read(log)]
    _tracked(log, hooks, resume_from_checkpoint=True)
    packets = read(log)
    assert [one.layer for one in packets] == once * 2
    assert [one.seq for one in packets] == list(range(len(packets)))
    assert sorted({one.pass_index for one in packets}) == [0, 1]


def test_a_resume_in_which_a_further_model_keeps_other_things_is_refused(log: Path) -> None:
    _tracked(log, HookConfig(), HookConfig())
    with pytest.raises(ConfigError, match="inputs"):
        _tracked(log, HookConfig(), HookConfig(inputs=True), resume_from_checkpoint=True)
