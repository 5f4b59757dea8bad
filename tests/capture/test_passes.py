"""What a pass is, what it was fed, and how it ended."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from oracle import Oracle, assert_equals, capturing, framework, hooks_of, quiet, read
from tiny_models import Apply, Each, build, sequential, token_ids
from torch import Tensor, nn
from transformers import AutoTokenizer

from actstore.errors import ActstoreError, ActstoreWarning, CaptureError, ConfigError
from actstore.packet import PassInfo
from actstore.stream.reader import open_stream


def _passes(log: Path) -> tuple[PassInfo, ...]:
    with open_stream(log) as reader:
        return reader.passes


def _run(model: nn.Module, log: Path, run: Callable[[nn.Module], Any]) -> tuple[PassInfo, ...]:
    with capturing(model, log), torch.no_grad():
        run(model)
    return _passes(log)


def _assert_axis(
    info: PassInfo, ids: Any, positions: Any, mask: Any = None, name: str = "token"
) -> None:
    (axis,) = info.axes
    ids = np.asarray(ids)
    assert (axis.name, axis.batch, axis.sequence) == (name, *ids.shape)
    assert axis.rows == ids.size
    np.testing.assert_array_equal(axis.token_ids, ids)
    np.testing.assert_array_equal(axis.positions, np.broadcast_to(positions, ids.shape))
    np.testing.assert_array_equal(
        axis.mask, np.ones(ids.shape, bool) if mask is None else np.asarray(mask, bool)
    )


# -- what a pass was fed ------------------------------------------------------------------------


def test_a_prefill_has_its_ids_from_position_0(log: Path) -> None:
    (info,) = _run(build("llama"), log, lambda model: model(token_ids()))
    _assert_axis(info, token_ids(), range(5))
    assert (info.index, info.entry, info.aborted, info.annotations) == (0, "", False, {})


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_generation_with_a_cache_feeds_the_prompt_then_a_token_a_pass(
    architecture: str, log: Path
) -> None:
    found: list[Tensor] = []

    def run(model: nn.Module) -> None:
        found.append(
            model.generate(token_ids(), max_new_tokens=4, do_sample=False, pad_token_id=0)
        )

    first, *others = _run(build(architecture), log, run)
    _assert_axis(first, token_ids(), range(5))
    assert len(others) == 3
    for number, info in enumerate(others):
        _assert_axis(info, found[0][:, 5 + number : 6 + number], 5 + number)


def test_generation_without_a_cache_feeds_everything_again(log: Path) -> None:
    found: list[Tensor] = []

    def run(model: nn.Module) -> None:
        found.append(
            model.generate(
                token_ids(), max_new_tokens=3, do_sample=False, use_cache=False, pad_token_id=0
            )
        )

    for number, info in enumerate(_run(build("llama"), log, run)):
        _assert_axis(info, found[0][:, : 5 + number], range(5 + number))


def test_the_documented_loop_has_a_pass_and_a_token_a_step(log: Path) -> None:
    model, ids = build("llama"), token_ids(1)
    with capturing(model, log, track_per_token=True) as tracker, torch.no_grad():
        for _ in range(3):
            following = model(ids).logits[:, -1, :].argmax(dim=-1, keepdim=True)
            tracker.record_token(following[0].item(), f"<{following[0].item()}>")
            ids = torch.cat([ids, following], dim=-1)
    for number, info in enumerate(_passes(log)):
        _assert_axis(info, ids[:, : 5 + number], range(5 + number))
    with open_stream(log) as reader:
        assert [one.pass_index for one in reader.tokens] == [0, 1, 2]
        assert [one.token_id for one in reader.tokens] == ids[0, 5:].tolist()


def test_a_cache_handed_on_by_hand_moves_the_positions(log: Path) -> None:
    def run(model: nn.Module) -> None:
        first = model(token_ids(), use_cache=True)
        cache = first.get("cache", first.get("past_key_values"))
        model(input_ids=token_ids(2, 2), cache=cache, use_cache=True)

    first, second = _run(build("llama"), log, run)
    _assert_axis(first, token_ids(), range(5))
    _assert_axis(second, token_ids(2, 2), [5, 6])


class Recurrent(nn.Module):
    """Takes ids or features, and a state of any kind that it hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, x: Tensor, position_ids: Tensor | None = None, state: Any = None) -> Tensor:
        return x if x.is_floating_point() else self.embed(x)


def test_rows_behind_a_state_that_says_nothing_are_counted_whatever_was_fed(log: Path) -> None:
    class State:
        pass

    def run(model: nn.Module) -> None:
        state = State()
        model(torch.ones(1, 5, 4), state=state)
        model(torch.tensor([[1, 2]]), state=state)
        model(torch.tensor([[3]]), state=state)
        model(torch.ones(1, 2, 4), state=state)

    found = [info.axes[0].positions.tolist() for info in _run(Recurrent(), log, run)]
    assert found == [[[0, 1, 2, 3, 4]], [[5, 6]], [[7]], [[8, 9]]]


@pytest.mark.parametrize(
    "state",
    [
        [(torch.ones(4), torch.ones(4))],
        [(torch.ones(1, 7, 4),) * 2],
        [(None, None)],
        [({},)],
        [[], []],
        [()],
        [],
        ((),),
    ],
    ids=str,
)
def test_a_state_of_any_containers_ends_no_forward(state: Any, log: Path) -> None:
    def run(model: nn.Module) -> None:
        model(torch.tensor([[1, 2]]), torch.tensor([[5, 6]]), state)
        model(torch.tensor([[1, 2]]), state=state)

    first, second = _run(Recurrent(), log, run)
    _assert_axis(first, [[1, 2]], [5, 6])
    _assert_axis(second, [[1, 2]], [-1, -1])


@pytest.mark.parametrize("left", [True, False])
def test_a_padded_batch_has_the_models_mask_and_positions(left: bool, log: Path) -> None:
    ids, mask = token_ids(), torch.ones(2, 5, dtype=torch.long)
    ids[0, slice(0, 2) if left else slice(3, 5)] = 0
    mask[0, slice(0, 2) if left else slice(3, 5)] = 0
    (info,) = _run(build("llama"), log, lambda model: model(ids, attention_mask=mask))
    _assert_axis(info, ids, range(5), mask)


def test_a_left_padded_generation_counts_positions_from_the_first_real_token(log: Path) -> None:
    ids, mask = token_ids(), torch.ones(2, 5, dtype=torch.long)
    ids[0, :2], mask[0, :2] = 0, 0
    found: list[Tensor] = []

    def run(model: nn.Module) -> None:
        found.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=3, do_sample=False, pad_token_id=0
            )
        )

    first, *others = _run(build("llama"), log, run)
    (axis,) = first.axes
    np.testing.assert_array_equal(axis.positions[:, 2:], [[0, 1, 2], [2, 3, 4]])
    np.testing.assert_array_equal(axis.mask, mask.bool())
    for number, info in enumerate(others):
        _assert_axis(info, found[0][:, 5 + number : 6 + number], [[3 + number], [5 + number]])


@pytest.mark.parametrize(
    "positions",
    [torch.tensor([[7, 8, 9, 3, 4], [0, 5, 0, 5, 0]]), torch.tensor([[2, 3, 4, 5, 6]])],
)
def test_given_positions_count(positions: Tensor, log: Path) -> None:
    def run(model: nn.Module) -> None:
        model(token_ids(), position_ids=positions)

    (info,) = _run(build("llama"), log, run)
    _assert_axis(info, token_ids(), positions)


def test_embeddings_have_no_ids(log: Path) -> None:
    def run(model: nn.Module) -> None:
        model(inputs_embeds=torch.zeros(2, 3, 32))

    (info,) = _run(build("llama"), log, run)
    _assert_axis(info, np.full((2, 3), -1), range(3))


@pytest.mark.parametrize(
    ("given", "batch", "sequence", "flat"),
    [
        (torch.zeros(2, 3, 8), 2, 3, False),
        (torch.zeros(6, 8), 6, 1, True),
        (torch.zeros(2, 3, 4, 8), 2, 3, False),
    ],
)
def test_a_model_of_floats_has_the_leading_dimensions_of_its_input(
    given: Tensor, batch: int, sequence: int, flat: bool, log: Path
) -> None:
    (info,) = _run(sequential(), log, lambda model: model(given))
    _assert_axis(info, np.full((batch, sequence), -1), range(sequence))
    assert info.axes[0].flat is flat


@pytest.mark.parametrize(
    "given", [torch.zeros(8), torch.tensor(3.0), torch.tensor(3), None, "text"], ids=str
)
def test_an_input_without_leading_dimensions_has_no_axis(given: Any, log: Path) -> None:
    model = Each(constant=lambda _: torch.ones(3))
    (info,) = _run(model, log, lambda model: model(given))
    assert info.axes == ()


def test_ids_of_one_dimension_are_one_sequence(log: Path) -> None:
    model = Each(embed=nn.Embedding(9, 4))
    (info,) = _run(model, log, lambda model: model(torch.tensor([3, 1, 8])))
    _assert_axis(info, [[3, 1, 8]], range(3))
    assert info.axes[0].flat


def test_ids_are_kept_as_given_even_if_the_model_overwrites_them(log: Path) -> None:
    ids = token_ids()
    model = Each(overwrite=lambda x: x.zero_())
    (info,) = _run(model, log, lambda model: model(ids))
    _assert_axis(info, token_ids(), range(5))


def test_logits_to_keep_is_noted(log: Path) -> None:
    def run(model: nn.Module) -> None:
        model(token_ids(), logits_to_keep=2)
        model(token_ids())

    first, second = _run(build("llama"), log, run)
    assert (first.logits_to_keep, second.logits_to_keep) == (2, 0)


# -- entries ------------------------------------------------------------------------------------


def test_the_base_model_called_by_itself_is_a_pass(log: Path) -> None:
    def run(model: nn.Module) -> None:
        model.model(token_ids())
        model(token_ids())
        model.model(token_ids(1, 2))

    passes = _run(build("llama"), log, run)
    assert [one.entry for one in passes] == ["model", "", "model"]
    _assert_axis(passes[2], token_ids(1, 2), range(2))
    assert {one.pass_index for one in read(log) if one.layer == ""} == {1}


def test_nested_entries_open_no_pass(log: Path) -> None:
    (info,) = _run(build("opt"), log, lambda model: model(token_ids()))
    assert info.entry == ""


def test_a_module_called_outside_of_any_pass_opens_one_that_the_next_entry_closes(
    log: Path,
) -> None:
    def run(model: nn.Module) -> None:
        model.model.embed_tokens(token_ids())
        model.model.norm(torch.zeros(1, 32))
        model(token_ids())
        model.lm_head(torch.zeros(1, 32))

    passes = _run(build("llama"), log, run)
    assert [one.entry for one in passes] == ["model.embed_tokens", "", "lm_head"]
    assert not any(one.aborted for one in passes)
    _assert_axis(passes[0], token_ids(), range(5))
    packets = read(log)
    assert [one.layer for one in packets if one.pass_index == 0] == [
        "model.embed_tokens",
        "model.norm",
    ]


def test_an_encoder_decoder_that_generates_runs_its_encoder_in_a_pass_of_its_own(
    log: Path,
) -> None:
    def run(model: nn.Module) -> None:
        model.generate(token_ids(), max_new_tokens=3, do_sample=False)

    first, *others = _run(build("t5"), log, run)
    assert (first.entry, len(others)) == ("encoder", 3)
    _assert_axis(first, token_ids(), range(5), name="encoder_token")
    for number, info in enumerate(others):
        assert [axis.name for axis in info.axes] == ["decoder_token"]
        assert info.axes[0].positions.tolist() == [[number]] * 2


# -- passes that end early ----------------------------------------------------------------------


class Fragile(nn.Module):
    """Raises what it is told to, between its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


@pytest.mark.parametrize(
    "error", [RuntimeError("no"), KeyboardInterrupt(), SystemExit(3)], ids=repr
)
def test_a_pass_that_raises_is_aborted_and_the_next_is_fine(
    error: BaseException, log: Path
) -> None:
    model = Fragile()
    with capturing(model, log), Oracle(model) as oracle:
        model(torch.ones(1, 4))
        model.error = error
        with pytest.raises(type(error)):
            model(torch.ones(2, 4))
        model.error = None
        model(torch.ones(3, 4))
    assert not hooks_of(model)
    packets = assert_equals(log, oracle.fired)
    assert [one.pass_index for one in packets] == [0, 0, 0, 1, 2, 2, 2]
    passes = _passes(log)
    assert [one.aborted for one in passes] == [False, True, False]
    assert [one.axes[0].batch for one in passes] == [1, 2, 3]


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_an_error_that_leaves_the_with_is_the_models_own_and_the_log_is_whole(
    error: BaseException, log: Path
) -> None:
    model = Fragile()
    model.error = error
    with pytest.raises(type(error)) as caught, capturing(model, log):
        model(torch.ones(1, 4))
    assert caught.value is error
    assert not hooks_of(model)
    assert [one.layer for one in read(log)] == ["first"]
    assert [one.aborted for one in _passes(log)] == [True]
    with capturing(model, log.with_name("next.stream")):
        model.error = None
        model(torch.ones(1, 4))


def test_a_pass_run_while_another_error_is_handled_is_not_aborted(log: Path) -> None:
    model = Fragile()
    with capturing(model, log):
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            model(torch.ones(1, 4))
            model.error = ValueError()
            with contextlib.suppress(ValueError):
                model(torch.ones(1, 4))
            model.error = None
            model(torch.ones(1, 4))
    assert [one.aborted for one in _passes(log)] == [False, True, False]


def test_a_pass_that_recovers_from_a_layers_error_is_not_aborted(log: Path) -> None:
    inner = Fragile()
    inner.error = ValueError()

    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = inner

        def forward(self, x: Tensor) -> Tensor:
            with contextlib.suppress(ValueError):
                return self.base_model(x)
            return x

    (info,) = _run(Careful(), log, lambda model: model(torch.ones(1, 4)))
    assert not info.aborted


def test_a_base_model_interrupted_before_is_no_reason_to_miss_the_next_pass(log: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_model = nn.Linear(4, 4)
            self.error: BaseException | None = KeyboardInterrupt()

        def forward(self, x: Tensor) -> Tensor:
            x = self.base_model(x)
            if self.error:
                raise self.error
            return x

    def run(model: Any) -> None:
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1, 4))
        model.base_model(torch.ones(2, 4))
        model.error = None
        model(torch.ones(3, 4))

    passes = _run(Wrapper(), log, run)
    assert [(one.aborted, one.axes[0].batch) for one in passes] == [
        (True, 1),
        (False, 2),
        (False, 3),
    ]


# -- threads ------------------------------------------------------------------------------------


def _in_thread(work: Callable[[], Any]) -> BaseException | None:
    found: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else None


def test_a_second_thread_in_a_pass_is_refused_and_does_the_pass_no_harm(log: Path) -> None:
    raised: list[BaseException | None] = []

    def meanwhile(x: Tensor) -> Tensor:
        if not raised:
            raised.append(None)
            raised[0] = _in_thread(lambda: model(torch.ones(5, 4)))
            raised.append(_in_thread(lambda: model.get_submodule("first")(torch.ones(5, 4))))
        return x

    model = nn.Sequential()
    model.add_module("first", nn.Linear(4, 4))
    model.add_module("meanwhile", Apply(meanwhile))
    model.add_module("last", nn.Linear(4, 4))
    with capturing(model, log):
        model(torch.ones(2, 4))
        model(torch.ones(3, 4))
    assert [type(one) for one in raised] == [CaptureError, CaptureError]
    passes = _passes(log)
    assert [(one.aborted, one.axes[0].batch) for one in passes] == [(False, 2), (False, 3)]
    names = ["first", "meanwhile", "last", ""]
    found = [(one.pass_index, one.layer) for one in read(log)]
    assert found == [(index, name) for index in (0, 1) for name in names]


def test_passes_may_run_in_one_thread_after_another(log: Path) -> None:
    model = sequential()
    with capturing(model, log):
        assert _in_thread(lambda: model(torch.ones(1, 8))) is None
        model(torch.ones(2, 8))
        model[0](torch.ones(3, 8))
        assert _in_thread(lambda: model(torch.ones(4, 8))) is None
    assert [one.axes[0].batch for one in _passes(log)] == [1, 2, 3, 4]


# -- annotations --------------------------------------------------------------------------------


def test_annotations_label_the_next_pass_alone(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log):
        model(torch.ones(2, 8))
        one.annotate(sample_id=["a", "b"], split=("x", "y"))
        one.annotate(weight=np.array([0.5, 2.0]), good=torch.tensor([True, False]))
        model(torch.ones(2, 8))
        model(torch.ones(2, 8))
    first, second, third = _passes(log)
    assert first.annotations == third.annotations == {}
    assert dict(second.annotations) == {
        "sample_id": ["a", "b"],
        "split": ["x", "y"],
        "weight": [0.5, 2.0],
        "good": [True, False],
    }


def _labels(log: Path) -> list[Any]:
    return [one.annotations.get("sample_id") for one in _passes(log)]


def test_the_steps_of_a_generation_have_the_labels_of_its_prompt(log: Path) -> None:
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    ids, model, one = token_ids(), build("llama"), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log), torch.no_grad():
        one.annotate(sample_id=["a", "b"])
        model.generate(ids, **how)
        model.generate(ids, **how)  # nobody says of what
        for names in (["c", "d", "c", "d"], ["e", "f"] * 2):
            one.annotate(sample_id=names)
            model.generate(ids, num_beams=2, **how)
        assert ids.shape[0] == 2
    beams = [["c", "d", "c", "d"]] * 3 + [["e", "f"] * 2] * 3
    assert _labels(log) == [["a", "b"]] * 3 + [None] * 3 + beams


@pytest.mark.parametrize("name", ["T5", "Mamba"])
def test_models_of_other_kinds_go_on_with_their_labels_too(name: str, log: Path) -> None:
    model, one = families.build(name), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log), torch.no_grad():
        for sample in ("a", "b"):
            one.annotate(sample_id=[sample] * 2)
            model.generate(token_ids(), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    labels = _labels(log)
    half = len(labels) // 2
    assert labels == [["a"] * 2] * half + [["b"] * 2] * half
    assert half == 3 + (name == "T5")  # its encoder has a pass of its own


def test_labels_go_on_behind_a_cache_until_it_is_emptied_or_others_are_given(log: Path) -> None:
    model, one, cache = build("llama"), framework(), None
    one.instrument_model(model)
    with quiet(), one.capture_activations(log), torch.no_grad():
        one.annotate(sample_id=["a"])
        for _ in range(2):
            cache = model(torch.tensor([[1, 2]]), cache=cache, use_cache=True).cache
        one.annotate(turn=[2])
        for _ in range(2):
            model(torch.tensor([[3]]), cache=cache)
        cache.batch_repeat_interleave(2)
        model(torch.tensor([[3], [4]]), cache=cache)  # other items: no one knows which
        cache.reset()
        for _ in range(2):
            model(torch.tensor([[5]]), cache=cache)
    first, then = {"sample_id": ["a"]}, {"sample_id": ["a"], "turn": [2]}
    found = [dict(info.annotations) for info in _passes(log)]
    assert found == [first, first, then, then, {}, {}, {}]


def test_labels_that_no_pass_takes_are_warned_of(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with (
        quiet(),
        pytest.warns(ActstoreWarning, match="no pass followed .* labels 'sample_id', 'split'"),
        one.capture_activations(log),
    ):
        model(torch.ones(1, 8))
        one.annotate(sample_id=["a"], split=["x"])


def test_the_later_of_two_annotations_of_a_label_counts(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log):
        one.annotate(label=[1])
        one.annotate(label=["\ud800 \0 é"])
        model(torch.ones(1, 8))
    assert dict(_passes(log)[0].annotations) == {"label": ["\ud800 \0 é"]}


def test_annotations_of_another_length_are_refused_and_the_capture_goes_on(log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log):
        one.annotate(label=[1, 2, 3])
        with pytest.raises(ConfigError, match=r"annotate\(label=.*3 values.*2 batch items"):
            model(torch.ones(2, 8))
        model(torch.ones(2, 8))
    (info,) = _passes(log)
    assert (info.index, info.aborted, dict(info.annotations)) == (0, False, {})


@pytest.mark.parametrize("value", ["text", 3, None, [None], [[1]], [object()], {"a": 1}, b"ab"])
def test_annotations_that_are_no_lists_of_labels_are_refused(value: Any, log: Path) -> None:
    model, one = sequential(), framework()
    one.instrument_model(model)
    with quiet(), one.capture_activations(log):
        with pytest.raises(ConfigError, match="annotate\\(label="):
            one.annotate(label=value)
        model(torch.ones(2, 8))


def test_annotating_outside_of_a_capture_is_refused(log: Path) -> None:
    one = framework()
    with pytest.raises(CaptureError, match="inside the with"):
        one.annotate(label=[1])
    one.instrument_model(sequential())
    with pytest.raises(ActstoreError):
        one.annotate(label=[1])


# -- tokenizers ---------------------------------------------------------------------------------


class Tokenizer:
    """Decodes an id as its number in brackets, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def decode(self, ids: list[int]) -> str:
        """Decode one id."""
        (one,) = ids
        self.asked.append(one)
        return f"<{one}>\ud83d" if one == 5 else f"<{one}>"


def test_a_tokenizer_is_asked_once_for_the_text_of_every_id_that_is_fed(log: Path) -> None:
    model, one, tokenizer = build("llama"), framework(), Tokenizer()
    one.instrument_model(model, tokenizer=tokenizer)
    with quiet(), one.capture_activations(log), torch.no_grad():
        model(torch.tensor([[5, 6, 5]]))
        model(torch.tensor([[6, 7]]))
        model(inputs_embeds=torch.zeros(1, 2, 32))
    assert sorted(tokenizer.asked) == [5, 6, 7]
    with open_stream(log) as reader:
        assert dict(reader.token_texts) == {5: "<5>\ud83d", 6: "<6>", 7: "<7>"}


def test_a_tokenizer_that_raises_leaves_out_a_text_and_warns_once(log: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained("examples/tiny-llama")
    model, one = Each(embed=lambda ids: ids * 2), framework()
    one.instrument_model(model, tokenizer=tokenizer)
    with (
        quiet(),
        pytest.warns(ActstoreWarning) as told,
        torch.no_grad(),
        one.capture_activations(log),
    ):
        model(torch.tensor([[1, -200, 3]]))  # an image's place, as LLaVA has it
        model(torch.tensor([[1 << 40, 1 << 41, 4]]))
        model(torch.tensor([[1 << 40]]))
    (text,) = [str(each.message) for each in told]
    assert f"no text of 2 ids that were fed, such as {1 << 40}: OverflowError(" in text
    with open_stream(log) as reader:
        assert dict(reader.token_texts) == {id_: tokenizer.decode([id_]) for id_ in (1, 3, 4)}
        assert [each.aborted for each in reader.passes] == [False] * 3


def test_a_tokenizer_without_decode_is_refused() -> None:
    with pytest.raises(ConfigError, match="decode"):
        framework().instrument_model(sequential(), tokenizer=object())
