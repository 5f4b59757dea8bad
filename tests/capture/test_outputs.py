"""What a module may return: aliases, views, containers, nothing; and what becomes of it later."""

from __future__ import annotations

import itertools
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from oracle import Oracle, as_fired, assert_equals, capturing, framework, read
from tiny_models import Apply, Each, Output, Pair
from torch import Tensor, nn

from actstore.errors import ActstoreWarning
from actstore.stream.reader import open_stream

MODES = [torch.no_grad, torch.enable_grad, torch.inference_mode]


def _check(model: nn.Module, log: Path, mode: Any = torch.no_grad, **how: Any) -> Path:
    """Compare one pass, and three: in the later ones hooks know what to expect."""
    thrice = log.with_name("thrice.stream")
    for path, passes in ((log, 1), (thrice, 3)):
        with mode(), Oracle(model) as oracle, capturing(model, path, **how):
            for _ in range(passes):
                model(torch.linspace(-1, 1, 24).reshape(2, 3, 4))
        assert oracle.fired
        assert_equals(path, oracle.fired)
    assert _backs(thrice) == 3 * _backs(log)
    return log


def _backs(log: Path) -> list[int]:
    """Give of each packet how far before it the one is whose values it has; else 0."""
    with open_stream(log) as reader:
        rows = reader.table
        whole = np.flatnonzero(rows.whole())
        of = rows.alias_of[whole]
        return np.where(of >= 0, rows.seq[whole] - of, 0).tolist()


def _aliases(log: Path) -> dict[str, bool]:
    """Tell for each layer whether its (last) packet is stored as an alias."""
    with open_stream(log) as reader:
        names = {info.id: name for name, info in reader.layers.items()}
        rows = reader.table
        return {
            names[int(rows.layer[row])]: bool(rows.alias_of[row] >= 0)
            for row in np.flatnonzero(rows.whole())
        }


# -- aliases ------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Returns what its child returns, after doing something to it."""

    def __init__(self, between: Callable[[Tensor], Any] = lambda x: x) -> None:
        super().__init__()
        self.child = nn.Linear(4, 4)
        self.between = between

    def forward(self, x: Tensor) -> Any:
        """Call the child, then ``between``."""
        return self.between(self.child(x))


@pytest.mark.parametrize("mode", MODES)
def test_an_output_that_a_parent_returns_again_is_stored_once(mode: Any, log: Path) -> None:
    _check(Chain(), log, mode)
    assert _aliases(log) == {"child": False, "": True}


@pytest.mark.parametrize("mode", MODES)
def test_an_alias_counts_as_a_packet_of_no_bytes(mode: Any, log: Path) -> None:
    _check(Chain(), log, mode)
    found = framework().analyze_activations(log)
    assert found["packets"] == 2
    assert found["per_layer"][""]["bytes"] == found["per_layer"][""]["raw_bytes"] == 0
    assert found["per_layer"][""]["aliases"] == 1
    assert found["total_raw_bytes"] == 24 * 4


@pytest.mark.parametrize("mode", MODES)
def test_a_chain_of_aliases_reads_as_the_first(mode: Any, log: Path) -> None:
    _check(nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Identity()), nn.Dropout()).eval(), log)
    assert sum(_aliases(log).values()) == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2),
        lambda x: x.add_(0.0),
        lambda x: x.neg_(),
        lambda x: x.view(-1)[0].fill_(7) is None or x,
        lambda x: x.copy_(torch.ones_like(x)),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_changed_in_place_before_it_is_returned_again_is_stored_anew(
    change: Callable[[Tensor], Any], mode: Any, log: Path
) -> None:
    _check(Chain(change), log, mode)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.unsqueeze_(0),
        lambda x: x.squeeze_(),
        lambda x: x.transpose_(0, 1),
        lambda x: x.resize_(3, 2, 4),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_output_whose_shape_was_changed_in_place_keeps_both_shapes(
    change: Callable[[Tensor], Any], mode: Any, log: Path
) -> None:
    _check(Chain(change), log, mode)


@pytest.mark.parametrize(
    "data", [lambda x: x.new_zeros(5), lambda x: x.double(), lambda x: x + 1, lambda x: x[0]]
)
def test_an_output_whose_data_was_replaced_is_stored_anew(
    data: Callable[[Tensor], Tensor], log: Path
) -> None:
    def replace(x: Tensor) -> Tensor:
        x.data = data(x)
        return x

    _check(Chain(replace), log)


@pytest.mark.parametrize("mode", MODES)
def test_other_tensors_of_the_same_values_or_memory_are_no_aliases(mode: Any, log: Path) -> None:
    _check(Chain(lambda x: x.view_as(x)), log, mode)
    assert _aliases(log) == {"child": False, "": False}


def test_memory_that_the_allocator_gives_again_is_no_alias(log: Path) -> None:
    def fresh(value: float) -> Callable[[Any], Tensor]:
        return lambda _: torch.full((64, 64), value)

    model = Each(**{f"m{index}": fresh(float(index)) for index in range(20)})
    _check(model, log, torch.inference_mode)
    assert [one.values.ravel()[0] for one in read(log)] == [*range(20), 19.0]


def test_a_tensor_returned_in_two_passes_is_stored_in_each(log: Path) -> None:
    constant = torch.arange(4.0)
    model = Each(constant=lambda _: constant)
    with capturing(model, log):
        model(torch.zeros(1, 1))
        constant.add_(1)
        model(torch.zeros(1, 1))
    assert [one.values[0] for one in read(log)] == [0, 0, 1, 1]
    with open_stream(log) as reader:
        assert reader.table.alias_of.tolist() == [-1, 0, -1, 2]


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_output_returned_again_reads_as_empty(mode: Any, log: Path) -> None:
    model = nn.Sequential(Apply(lambda _: torch.empty(0, 4)), nn.Identity())
    _check(model, log, mode)


@pytest.mark.parametrize("mode", MODES)
def test_a_tensor_that_others_fired_between_is_stored_once(mode: Any, log: Path) -> None:
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept[:] = [x * 2]
        return kept[0]

    modules = Each(first=keep, other=lambda x: x + 1, again=lambda _: kept[0], last=lambda x: -x)
    _check(modules, log, mode)
    assert _aliases(log) == {
        "first": False,
        "other": False,
        "again": True,
        "last": False,
        "": True,
    }


@pytest.mark.parametrize("mode", MODES)
def test_what_is_an_alias_in_some_passes_is_stored_in_the_others(mode: Any, log: Path) -> None:
    inner = nn.Linear(4, 4)
    calls = itertools.count()
    model = nn.Sequential(inner, Apply(lambda x: x + 1 if next(calls) % 3 == 1 else x))
    with mode(), Oracle(model) as oracle, capturing(model, log):
        for _ in range(9):
            model(torch.ones(2, 3, 4))
    assert_equals(log, oracle.fired)
    apart = 3 * [[0, 1, 2], [0, 0, 1], [0, 1, 2]]
    assert _backs(log) == [back for one in apart for back in one]


@pytest.mark.parametrize(
    ("mode", "nbytes", "held"),
    [
        (torch.no_grad, 4096, True),
        (torch.no_grad, 1 << 20, False),
        (torch.enable_grad, 4096, False),
    ],
)
def test_no_output_is_held_but_a_small_one_until_the_next(
    mode: Any, nbytes: int, held: bool, log: Path
) -> None:
    fired: list[weakref.ref[Tensor]] = []

    def fresh(_: Any) -> Tensor:
        made = torch.ones(nbytes // 4)
        fired.append(weakref.ref(made))
        return made

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([Apply(fresh) for _ in range(5)])

        def forward(self, x: Tensor) -> None:
            for place, part in enumerate(self.parts):
                part(x)
                *before, last = [one() is not None for one in fired[-1 - place :]]
                assert not any(before)
                assert last == (held and len(fired) > 5)  # all of the first pass come otherwise

    model = Model()
    with mode(), capturing(model, log):
        for _ in range(3):
            model(torch.ones(1))
            assert not any(one() is not None for one in fired)
        for part in model.parts:  # a pass whose end nobody tells
            part(torch.ones(1))
            assert not any(one() is not None for one in fired)


def test_a_tensor_that_lost_its_version_is_kept(log: Path) -> None:
    def odd(x: Tensor) -> Tensor:
        with torch.inference_mode():
            made = x + 1
        made.data = torch.full((2, 3, 4), 5.0)
        return made

    _check(Each(odd=odd, after=lambda x: x * 2), log)


@pytest.mark.parametrize("mode", MODES)
def test_an_alias_of_a_packet_in_an_earlier_group_reads_back(
    mode: Any, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actstore.capture.stage.GROUP_BYTES", 1 << 12)
    many = [Apply(lambda _, value=value: torch.full((300,), float(value))) for value in range(20)]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.many = nn.ModuleList(many)

        def forward(self, x: Tensor) -> Tensor:
            first = self.first(x)
            for one in self.many:
                one(x)
            return first

    _check(Model(), log, mode)


# -- later changes ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_the_model_does_to_an_output_later_is_not_seen(mode: Any, log: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            self.second(y)
            y.zero_()
            return y + 1

    _check(Model(), log, mode)
    assert np.any(read(log)[0].values < 0)


def test_an_input_that_is_returned_and_then_overwritten_keeps_its_values(log: Path) -> None:
    model = nn.Sequential(nn.Identity())
    x = torch.ones(2, 3)
    with capturing(model, log):
        model(x)
        x.zero_()
    assert all(np.all(one.values == 1) for one in read(log))


# -- views --------------------------------------------------------------------------------------

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.transpose(0, 2),
    "strided": lambda x: x[:, ::2, 1::2],
    "offset": lambda x: x[1:, 1:],
    "expanded": lambda x: x[:1, :1].expand(5, 7, 4),
    "zero_stride_scalar": lambda x: x[0, 0, 0].expand(3, 3),
    "flipped": lambda x: x.flip(0),
    "as_strided": lambda x: x.as_strided((3, 3), (1, 1)),
    "scalar": lambda x: x.sum(),
    "empty": lambda x: x[:0],
    "empty_in_the_middle": lambda x: x[:, :0],
    "channels_last": lambda x: x[None].contiguous(memory_format=torch.channels_last),
    "conjugated": lambda x: torch.complex(x, x + 1).conj(),
    "negated": lambda x: torch.complex(x, x + 1).conj().imag,
    "real_part": lambda x: torch.complex(x, x + 1).real,
    "many_dimensions": lambda x: x.reshape((1,) * 30 + (24,)),
    "parameter": lambda x: nn.Parameter(x),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("mode", MODES)
def test_any_view_is_kept_by_its_values(name: str, mode: Any, log: Path) -> None:
    _check(Each(view=VIEWS[name], after=lambda x: x + 1), log, mode, codec="zstd")


# -- containers ---------------------------------------------------------------------------------

CONTAINERS: dict[str, Callable[[Tensor], Any]] = {
    "tuple": lambda x: (x, x + 1),
    "list": lambda x: [x, x + 1],
    "none_first": lambda x: (None, x),
    "numbers_first": lambda x: (3, "text", x),
    "nested": lambda x: (None, ([], {"a": None, "b": [(), x * 2]}), x),
    "dict": lambda x: {"a": None, "b": x * 3, "c": x},
    "ordered_dict": lambda x: OrderedDict(z=x * 4, a=x),
    "mapping": lambda x: MappingProxyType({"only": x * 5}),
    "named_tuple": lambda x: Pair(None, x * 6),
    "model_output": lambda x: Output(loss=None, logits=x * 7, hidden=(x,)),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_of_a_container_the_first_tensor_depth_first_is_kept(name: str, log: Path) -> None:
    _check(Each(container=CONTAINERS[name], after=lambda x: x + 1), log)


@pytest.mark.parametrize("nothing", [None, (), [], {}, (None, [{}]), 3, "text", {1, 2}], ids=str)
def test_a_module_that_returns_no_tensor_gives_no_packet_and_no_error(
    nothing: Any, log: Path
) -> None:
    model = Each(nothing=lambda _: nothing, something=lambda x: x)
    _check(model, log)
    assert [one.layer for one in read(log)] == ["something", ""]


def test_a_layer_that_never_fired_is_named_in_a_warning_and_the_summary(log: Path) -> None:
    model = Each(silent=lambda _: None, something=lambda x: x)
    one = framework()
    one.instrument_model(model)
    with (
        pytest.warns(ActstoreWarning, match="never fired: 'silent'"),
        one.capture_activations(log),
    ):
        model(torch.ones(1))
    assert one.summary["never_fired"] == ["silent"]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.reshape(6, 4).to_sparse(),
        lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
        lambda x: torch.empty_like(x, device="meta"),
    ],
    ids=["sparse", "quantized", "meta"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation")
def test_an_output_that_can_not_be_kept_is_counted_and_warned_of(
    make: Callable[[Tensor], Tensor], log: Path
) -> None:
    model = Each(odd=make, even=lambda x: x)
    one = framework()
    one.instrument_model(model)
    with pytest.warns(ActstoreWarning) as warned, one.capture_activations(log):
        model(torch.ones(2, 3, 4))
    assert any("can't be kept" in str(each.message) for each in warned)
    assert list(one.summary["skipped"].values()) == [1]
    assert next(iter(one.summary["skipped"])).startswith("odd: ")
    assert [each.layer for each in read(log)] == ["even", ""]


# -- calls --------------------------------------------------------------------------------------


def test_a_module_called_twice_in_a_pass_gives_calls_0_and_1(log: Path) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)
            self.again = self.shared

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.shared(x))

    model = Shared()
    with Oracle(model) as oracle, capturing(model, log):
        model(torch.ones(2, 4))
        model(torch.zeros(2, 4))
    packets = assert_equals(log, oracle.fired)
    found = [(one.pass_index, one.layer, one.call) for one in packets]
    calls = [("shared", 0), ("shared", 1), ("", 0)]
    assert found == [(index, *call) for index in (0, 1) for call in calls]


def test_many_calls_of_one_module_keep_their_order_and_shapes(log: Path) -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            for length in (1, 2, 3, 3, 3, 2, 1, 0):
                x = torch.cat([x, self.step(x[:length])])
            return x

    _check(Each(loop=Loop()), log)


def test_packets_read_by_layer_are_those_of_the_whole_log(log: Path) -> None:
    _check(Each(a=lambda x: x, b=lambda x: x + 1, c=lambda x: (x * 2,)), log)
    with open_stream(log) as reader:
        for name in reader.layers:
            wanted = [as_fired(one) for one in reader.packets() if one.layer == name]
            assert [as_fired(one) for one in reader.packets(name)] == wanted
            assert wanted


def test_values_belong_to_the_reader_and_outlive_the_log(log: Path) -> None:
    _check(Chain(), log)
    with open_stream(log) as reader:
        first, second = [one.values for one in reader.packets()]
    first[...] = 0
    assert not np.array_equal(first, second)
    assert sys.getrefcount(first) < 5
