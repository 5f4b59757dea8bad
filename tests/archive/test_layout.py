"""The plan of a dataset: which packets are rows of what, how they are named and labelled."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logs import LogBuilder, axis, decoder_log, random_values

from actstore.archive import grid
from actstore.archive.layout import Plan, Ragged, Variable
from actstore.archive.names import Names, plain_json
from actstore.compaction.logs import plan_log
from actstore.stream.reader import open_stream

Build = Callable[[LogBuilder], Any]
Planned = Callable[[Build], Plan]


@pytest.fixture
def planned(tmp_path: Path) -> Planned:
    """Give the plan of a log that a function builds."""

    def plan(build: Build) -> Plan:
        log = LogBuilder(tmp_path / "run.stream")
        build(log)
        with open_stream(log.close()) as reader:
            return plan_log(reader)

    return plan


def variable(plan: Plan, name: str) -> Variable:
    return next(one for one in plan.variables if one.name == name)


def ragged(plan: Plan, name: str) -> Ragged:
    return next(one for one in plan.ragged if one.name == name)


def label(plan: Plan, name: str) -> list[Any]:
    return next(one.values for one in plan.coordinates if one.name == name).tolist()


def names(plan: Plan) -> list[str]:
    return [one.name for one in plan.variables] + [f"{one.name}~" for one in plan.ragged]


def all_names(plan: Plan) -> list[str]:
    return [
        *(one.name for one in plan.variables),
        *(f"{one.name}_present" for one in plan.variables if one.partial),
        *(one.values_name for one in plan.ragged),
        *(one.name for one in plan.coordinates),
    ]


V = random_values


# -- rows ---------------------------------------------------------------------------------------


def test_rows_are_in_the_order_pass_item_position(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.begin(axis(2, 3))
        log.begin(axis(2, 1, start=3))

    plan = planned(build)
    assert label(plan, "pass_index") == [0] * 6 + [1] * 2
    assert label(plan, "batch_item") == [0, 0, 0, 1, 1, 1, 0, 1]
    assert label(plan, "position") == [0, 1, 2, 0, 1, 2, 3, 3]
    assert label(plan, "token_id") == [100, 101, 102, 103, 104, 105, 100, 101]
    assert plan.rows == {"token": 8}


def test_is_padding_is_what_the_mask_leaves_out(planned: Planned) -> None:
    plan = planned(lambda log: log.begin(axis(2, 2, mask=[[False, True], [True, True]])))
    assert label(plan, "is_padding") == [True, False, False, False]


def test_token_text_is_the_logs_or_that_of_a_recorded_token_or_empty(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.texts({100: "log"})
        log.begin(axis(1, 3))
        log.token(100, "recorded")
        log.token(101, "also recorded")

    assert label(planned(build), "token_text") == ["log", "also recorded", ""]


def test_a_tokenizer_has_the_first_word_on_text(tmp_path: Path) -> None:
    class Words:
        def decode(self, ids: list[int]) -> str:
            return f"word {ids[0]}"

    log = LogBuilder(tmp_path / "run.stream")
    log.texts({100: "log"})
    log.begin(axis(1, 2))
    with open_stream(log.close()) as reader:
        assert label(plan_log(reader, Words()), "token_text") == ["word 100", "word 101"]


def test_a_step_stands_on_each_items_last_unpadded_row(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        mask = [[True, True, False], [False, True, True], [False, False, False]]
        log.begin(axis(3, 3, mask=mask))
        for number in range(4):  # the fourth belongs to no item
            log.token(number, "")
        log.token(9, "", pass_index=-1)

    plan = planned(build)
    assert label(plan, "step") == [-1, 0, -1, -1, -1, 1, -1, -1, 2]


def test_the_step_of_an_encoder_decoder_is_on_the_decoders_row(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.begin(axis(1, 4, name="encoder_token"), axis(1, 2, name="decoder_token"))
        log.token(1, "x")

    plan = planned(build)
    assert label(plan, "encoder_step") == [-1] * 4
    assert label(plan, "decoder_step") == [-1, 0]
    assert label(plan, "decoder_token_id") == [100, 101]
    assert plan.rows == {"encoder_token": 4, "decoder_token": 2}


@pytest.mark.parametrize(
    ("first", "second", "wanted"),
    [
        (["a", "b"], None, ["a", "a", "b", "b", ""]),
        ([1, 2], [3], [1, 1, 2, 2, 3]),
        ([1, 2], None, [1.0, 1.0, 2.0, 2.0, None]),
        ([1.5, 2], [3], [1.5, 1.5, 2.0, 2.0, 3.0]),
        ([True, False], [True], [True, True, False, False, True]),
        ([True, False], None, [1.0, 1.0, 0.0, 0.0, None]),
        (["a", 1], [None], ["a", "a", "1", "1", ""]),
        ([[1, 2], {"b": 1}], [0], ["[1, 2]"] * 2 + ['{"b": 1}'] * 2 + ["0"]),
        ([2**53 + 1, 1], None, ["9007199254740993"] * 2 + ["1"] * 2 + [""]),
        ([2**63, 1], [1], ["9223372036854775808"] * 2 + ["1"] * 3),
        ([10**400, 1], [1], [str(10**400)] * 2 + ["1"] * 3),
        (["\ud800", "😀"], ["\0"], ["\ufffd"] * 2 + ["😀"] * 2 + ["\0"]),
        (["too", "many", "items"], ["x"], ["", "", "", "", "x"]),
    ],
)
def test_annotations_label_their_items_rows_and_lose_nothing(
    planned: Planned, first: Any, second: Any, wanted: list[Any]
) -> None:
    def build(log: LogBuilder) -> None:
        log.begin(axis(2, 2), annotations={"a": first})
        log.begin(axis(1, 1), annotations={"a": second} if second else {})

    found = label(planned(build), "a")
    assert [None if one != one else one for one in found] == wanted
    assert {type(one) for one in found} <= {str, bool} or {type(one) for one in found} <= {
        int,
        float,
    }


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        *(("text", "annotation_text"), ("tokens", "annotation_tokens"), ("mlp", "annotation_mlp")),
        *(("token_id", "annotation_token_id"), ("site", "annotation_site"), ("a/b c", "a_b_c")),
        *(("", "unnamed"), ("zarr.json", "annotation_zarr.json"), ("..", "unnamed")),
        *(("layer", "annotation_layer"), ("TOKEN", "annotation_TOKEN"), ("Größe", "Größe")),
        *(("output", "annotation_output"), ("__x_", "x_")),
    ],
)
def test_an_annotation_gives_way_to_names_that_are_taken(
    planned: Planned, given: str, wanted: str
) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("site")
        log.layer("head", "logits")
        log.layer("", "output")
        log.begin(axis(1, 2), annotations={given: ["x"]})
        log.put("site", V((1, 2, 3)))
        head = V((1, 2, 5))
        log.put("", head, alias_of=log.put("head", head))

    assert label(planned(build), wanted) == ["x", "x"]


# -- what aligns --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of_pass", "shape", "rows"),
    [
        (axis(2, 3), (2, 3, 4), 6),
        (axis(2, 3), (6, 4), 6),
        (axis(2, 3), (2, 3), 6),
        (axis(2, 3), (6,), 6),
        (axis(2, 3), (2, 3, 4, 5), 6),
        (axis(4, 1), (4, 1, 7), 4),
        (axis(2, 3, flat=True), (6, 4), 6),
        (axis(4, 1, flat=True), (4, 7), 4),
        (axis(2, 3), (3, 2, 4), 0),
        (axis(2, 3), (2, 4, 3), 0),
        (axis(2, 3), (2,), 0),
        (axis(2, 3), (), 0),
        (axis(2, 3), (2, 3, 0), 0),
        (axis(4, 1), (4, 7), 0),
        (axis(2, 3, flat=True), (2, 3, 4), 0),
    ],
)
def test_a_packet_aligns_by_its_leading_dimensions_alone(
    planned: Planned, of_pass: Any, shape: tuple[int, ...], rows: int
) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin(of_pass)
        log.put("a", V(shape))

    plan = planned(build)
    assert names(plan) == (["a"] if rows else ["a~"])
    if rows:
        (segments,) = variable(plan, "a").segments
        assert segments is not None
        assert segments.rows == rows


@pytest.mark.parametrize("site", ["logits", "output"])
def test_a_head_with_logits_to_keep_holds_the_last_rows_of_each_item(
    planned: Planned, site: str
) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("head", site)
        log.layer("other")
        log.begin(axis(2, 5), keep=2)
        log.put("head", V((2, 2, 7)))
        log.put("other", V((2, 2, 7)))

    plan = planned(build)
    assert names(plan) == [site, "other~"]
    (found,) = variable(plan, site).segments
    assert found is not None
    assert found.start.tolist() == [3, 8]
    assert found.source.tolist() == [0, 2]
    assert found.count.tolist() == [2, 2]
    assert np.flatnonzero(variable(plan, site).present().values).tolist() == [3, 4, 8, 9]


def test_a_head_that_claims_to_keep_more_rows_than_there_are_is_ragged(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("head", "logits")
        log.begin(axis(2, 3), keep=4)
        log.put("head", V((2, 4, 7)))

    assert names(planned(build)) == ["logits~"]


def test_of_two_axes_of_one_size_only_the_sites_own_name_decides(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for name in ("encoder_mlp", "decoder_mlp", "shared"):
            log.layer(name)
        log.begin(axis(1, 4, name="encoder_token"), axis(1, 4, name="decoder_token"))
        for name in ("encoder_mlp", "decoder_mlp", "shared"):
            log.put(name, V((1, 4, 3)))

    plan = planned(build)
    assert names(plan) == ["encoder_mlp", "decoder_mlp", "shared~"]
    assert variable(plan, "encoder_mlp").dims == ("encoder_token", "feature")
    assert variable(plan, "decoder_mlp").dims == ("decoder_token", "feature")


def test_a_layer_that_sometimes_aligns_is_both_dense_and_ragged(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        for shape in ((1, 3, 2), (5, 2), (1, 3, 2)):
            log.begin(axis(1, 3))
            log.put("a", V(shape))

    plan = planned(build)
    assert names(plan) == ["a", "a~"]
    assert variable(plan, "a").present().values.tolist() == [True] * 3 + [False] * 3 + [True] * 3
    assert label(plan, "a_pass") == [1]


def test_a_pass_without_axes_and_one_that_the_log_does_not_know_are_ragged(
    planned: Planned,
) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin()
        log.put("a", V((1, 3)))
        log.put("a", V((1, 3)), pass_index=77, call=1)

    plan = planned(build)
    assert names(plan) == ["a~"]
    assert label(plan, "a_pass") == [0, 77]
    assert label(plan, "a_call") == [0, 1]


def test_a_second_packet_of_the_same_firing_is_not_lost(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin(axis(1, 3))
        log.put("a", V((1, 3, 2)))
        log.put("a", V((1, 3, 2)))

    plan = planned(build)
    assert names(plan) == ["a", "a~"]


def test_a_row_that_no_chunk_can_hold_is_ragged(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin(axis(1, 2))
        log.put("a", np.zeros((0, 2, 1 << 40), np.float32))

    assert names(planned(build)) == ["a~"]


def test_an_axis_without_rows_allocates_nothing(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin(axis(1 << 31, 0))
        log.put("a", V((0, 5)))

    plan = planned(build)
    assert names(plan) == ["a~"]
    assert plan.rows == {}


def test_a_huge_pass_index_allocates_nothing(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.layer("a")
        log.begin(axis(1, 2), index=1 << 62)
        log.put("a", V((1, 2, 3)))

    assert label(planned(build), "pass_index") == [1 << 62] * 2


# -- variables ----------------------------------------------------------------------------------


def test_sites_of_blocks_have_a_layer_and_the_residual_space_shares_feature(
    tmp_path: Path,
) -> None:
    log = decoder_log(tmp_path / "run.stream")
    with open_stream(log.path) as reader:
        plan = plan_log(reader)
    dims = {one.name: one.dims for one in plan.variables}
    assert dims == {
        "embed": ("token", "feature"),
        "mlp": ("layer", "token", "feature"),
        "resid": ("layer", "token", "feature"),
        "final_norm": ("token", "feature"),
        "logits": ("token", "vocab"),
    }
    assert label(plan, "layer") == [0, 1, 2]
    assert label(plan, "module") == [f"model.layers.{block}" for block in range(3)]
    assert variable(plan, "mlp").modules[1] == "model.layers.1.mlp"
    assert {one.source.name for one in plan.variables} == {"bfloat16"}
    assert {one.dtype.name for one in plan.variables} == {"float32"}


def test_sites_share_the_sorted_union_of_block_indices(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for site, block in (("attn", 4), ("mlp", 1), ("attn", 1)):
            log.layer(f"h.{block}.{site}", site, block)
        log.begin(axis(1, 2))
        for name in ("h.4.attn", "h.1.mlp", "h.1.attn"):
            log.put(name, V((1, 2, 3)))

    plan = planned(build)
    assert label(plan, "layer") == [1, 4]
    assert label(plan, "module") == ["h.1", "h.4"]
    assert variable(plan, "mlp").present().values.tolist() == [[True, True], [False, False]]


def test_two_stacks_have_a_column_of_modules_each(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for stack in ("encoder", "decoder"):
            log.layer(f"{stack}.block.0", f"{stack}_resid", 0)
        log.begin(axis(1, 2, name="encoder_token"), axis(1, 3, name="decoder_token"))
        log.put("encoder.block.0", V((1, 2, 4)))
        log.put("decoder.block.0", V((1, 3, 4)))

    plan = planned(build)
    assert label(plan, "encoder_module") == ["encoder.block.0"]
    assert label(plan, "decoder_module") == ["decoder.block.0"]
    assert variable(plan, "encoder_resid").dims[-1] == variable(plan, "decoder_resid").dims[-1]


def test_the_usual_form_keeps_the_name_and_others_say_how_they_differ(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for block in range(4):
            log.layer(f"h.{block}.attn", "attn", block)
        log.begin(axis(1, 3))
        log.put("h.0.attn", V((1, 3, 8)))
        log.put("h.1.attn", V((1, 3, 4)))
        log.put("h.2.attn", V((1, 3, 8), "float16"))
        log.put("h.3.attn", V((1, 3, 8)))
        log.put("h.3.attn", V((1, 3, 8)), call=1)

    plan = planned(build)
    assert {one.name: (one.source.name, one.dims[-1]) for one in plan.variables} == {
        "attn": ("float32", "feature"),
        "attn_d4": ("float32", "attn_d4_feature"),
        "attn_float16": ("float16", "feature"),
        "attn_call1": ("float32", "feature"),
    }
    assert variable(plan, "attn_call1").present().values.tolist() == [[False] * 3] * 3 + [
        [True] * 3
    ]


def test_trailing_dimensions_are_features_of_their_own(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for name in ("a", "b", "c"):
            log.layer(name)
        log.begin(axis(2, 2))
        log.put("a", V((2, 2, 3, 4)))
        log.put("b", V((2, 2)))
        log.put("c", V((4, 5)))

    assert {one.name: one.dims for one in planned(build).variables} == {
        "a": ("token", "a_feature", "a_feature1"),
        "b": ("token",),
        "c": ("token", "c_feature"),
    }


def test_the_residual_streams_width_is_that_of_feature(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for block in range(3):
            log.layer(f"h.{block}.mlp", "mlp", block)
        log.layer("h.0", "resid", 0)
        log.begin(axis(1, 2))
        for block in range(3):
            log.put(f"h.{block}.mlp", V((1, 2, 6)))
        log.put("h.0", V((1, 2, 4)))

    plan = planned(build)
    assert variable(plan, "resid").dims[-1] == "feature"
    assert variable(plan, "mlp").dims[-1] == "mlp_feature"


def test_a_samples_features_are_the_coordinate_of_its_dimension(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        log.features(64, [1, 5, 40])
        log.features(9, [0, 8])
        log.layer("h.0", "resid", 0)
        log.layer("head", "logits")
        log.layer("loose")
        log.begin(axis(1, 2))
        log.put("h.0", V((1, 2, 3)), width=64)
        log.put("head", V((1, 2, 2)), width=9)
        log.put("loose", V((7, 3)), width=64)

    plan = planned(build)
    assert label(plan, "feature") == [1, 5, 40]
    assert label(plan, "vocab") == [0, 8]
    assert label(plan, "loose_width") == [64]
    assert ragged(plan, "loose").attributes["features"] == {"64": [1, 5, 40]}


def test_a_site_of_aliases_is_named_and_not_written(planned: Planned) -> None:
    def build(log: LogBuilder) -> None:
        for name, site in (("m", "m"), ("norm", "final_norm"), ("part", "part")):
            log.layer(name, site)
        for number in range(2):
            log.begin(axis(1, 3))
            first = V((1, 3, 4), seed=number)
            seq = log.put("m", first)
            log.put("norm", first, alias_of=seq)
            if number:
                log.put("part", first, alias_of=seq)
            else:
                log.put("part", V((1, 3, 4), seed=9))

    plan = planned(build)
    assert plan.aliases == {"m": "final_norm"}
    assert sorted(names(plan)) == ["final_norm", "part"]


@pytest.mark.parametrize(
    ("layers", "aliases"),
    [
        ([("a", "a", 0), ("b", "b", 1)], [(1, 0)]),
        ([("a0", "a", 0), ("a1", "a", 1), ("b", "b", 0)], [(2, 0)]),
        ([("a", "a", -1), ("b", "b", -1), ("c", "c", -1)], [(2, 0), (2, 1)]),
        ([("a", "a", -1), ("b", "b", -1)], [(1, 0), (1, 0)]),
    ],
    ids=["of another block", "of a part of a site", "of two sites", "twice of one packet"],
)
def test_what_is_not_one_packet_for_another_is_no_alias_of_a_site(
    planned: Planned, layers: list[tuple[str, str, int]], aliases: list[tuple[int, int]]
) -> None:
    values = V((1, 3, 4))

    def build(log: LogBuilder) -> None:
        for layer in layers:
            log.layer(*layer)
        log.begin(axis(1, 3))
        copies = [one for one, *_ in aliases]
        for number, (name, *_) in enumerate(layers):
            if number not in copies:
                log.put(name, values)
        for call, (copy, target) in enumerate(aliases):
            log.put(layers[copy][0], values, alias_of=target, call=call)

    plan = planned(build)
    assert plan.aliases == {}
    modules = {name for one in plan.variables for name in one.modules if name}
    assert modules == {name for name, *_ in layers}


def test_layers_that_claim_one_place_all_have_a_variable(planned: Planned) -> None:
    layers = (("x", "c", -1), ("y", "b", -1), ("c", "b", -1), ("z", "b", 0), ("w", "b", 0))

    def build(log: LogBuilder) -> None:
        for layer in layers:
            log.layer(*layer)
        log.begin(axis(1, 2))
        for name, *_ in layers:
            log.put(name, V((1, 2, 3)))

    plan = planned(build)
    modules = [name for one in plan.variables for name in one.modules if name]
    assert sorted(modules) == ["c", "w", "x", "y", "z"]


def test_hostile_names_make_an_archive_of_distinct_plain_names(planned: Planned) -> None:
    odd = ["zarr.json", "text", "passes", "../../up", "x" * 400, "p", "p_values", "p_shape", "A"]
    odd += ["a", "layer", "token", "token_id", "mlp_present", "\ud800", "__x", "a/b", "a_b", "é"]

    def build(log: LogBuilder) -> None:
        for name in odd:
            log.layer(name)
        log.begin(axis(1, 3), axis(1, 2, name="../x"), axis(1, 4, name=""))
        for name in odd:
            log.put(name, V((7,) if name == "p" else (1, 3, 4)))
        log.begin(axis(1, 1))

    found = all_names(planned(build))
    assert len({name.casefold() for name in found}) == len(found)
    for name in found:
        assert "/" not in name
        assert name[0] not in "._"
        assert name not in ("zarr.json", "text", "tokens", "passes")
        assert len(name.encode()) < 200


@given(st.lists(st.text(max_size=8), max_size=12))
def test_names_are_given_once_and_stay_as_they_are_where_they_can(wanted: list[str]) -> None:
    names = Names()
    given_names = [names.give(one, ("", "_present")) for one in wanted]
    assert len({one.casefold() for one in given_names}) == len(wanted)
    if len(wanted) == 1 and wanted[0].isascii() and wanted[0].isalnum():
        assert given_names == wanted or wanted[0] in ("text", "tokens", "passes")


def test_json_of_a_log_becomes_what_every_parser_reads() -> None:
    odd = {"a\ud800": [float("nan"), float("inf"), -float("inf"), 1.5], "b": {"c": "\udfff😀"}}
    assert plain_json(odd) == {
        "a\ufffd": ["NaN", "Infinity", "-Infinity", 1.5],
        "b": {"c": "\ufffd😀"},
    }


# -- chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "row_bytes", "chunk", "shard"),
    [
        (1 << 20, 4096 * 4, 64, 4096),
        (1 << 20, 576 * 4, 256, 29_127 // 256 * 256),
        (10, 4, 10, 10),
        (0, 4, 1, 1),
        (300, 4096 * 4, 64, 320),
        (5, 3 << 20, 1, 5),
        (1000, 3 << 20, 1, 21),
        (5, 100 << 20, 1, 1),
    ],
)
def test_chunks_are_about_1_mib_and_shards_whole_chunks_of_about_64(
    rows: int, row_bytes: int, chunk: int, shard: int
) -> None:
    assert grid.chunk_rows(rows, row_bytes) == chunk
    assert grid.shard_rows(rows, row_bytes) == shard


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1), st.data())
def test_segments_count_the_rows_between_bounds(
    gaps: list[tuple[int, int]], data: st.DataObject
) -> None:
    there, starts = [], []
    for gap, count in gaps:
        there += [False] * gap
        starts.append(len(there))
        there += [True] * count
    counts = np.array([count for _, count in gaps])
    zeros = np.zeros_like(counts)
    segments = grid.Segments(zeros, zeros, np.array(starts), counts)
    bounds = sorted(data.draw(st.lists(st.integers(0, len(there) + 3), min_size=2)))
    wanted = [sum(there[a:b]) for a, b in pairwise(bounds)]
    assert segments.filled(np.array(bounds)).tolist() == wanted


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_element_of_every_packet_has_exactly_one_place(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever fires: what is planned to be read is what the log holds, element by element."""
    log = LogBuilder(tmp_path_factory.mktemp("any") / "run.stream")
    layers = data.draw(st.integers(1, 3))
    for number in range(layers):
        log.layer(f"m.{number}", data.draw(st.sampled_from(["mlp", "resid", "x"])), number - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        batch, sequence = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3))
        log.begin(axis(batch, sequence, flat=data.draw(st.booleans())))
        for number in range(layers):
            for call in range(data.draw(st.integers(0, 2))):
                shape = data.draw(
                    st.sampled_from([(batch, sequence, 2), (batch * sequence, 2), (3,), (), (0,)])
                )
                log.put(f"m.{number}", V(shape), call=call)
    with open_stream(log.close()) as reader:
        plan = plan_log(reader)
        seqs = reader.table.seq
        seen: dict[int, list[int]] = {one.seq: [] for one in log.fired}
        for one in plan.variables:
            width = int(np.prod(one.row_shape, dtype=int))
            for segments in filter(None, one.segments):
                columns = (segments.packet, segments.source, segments.count)
                for packet, source, count in zip(*map(np.ndarray.tolist, columns), strict=True):
                    first = source * width
                    seen[int(seqs[packet])] += range(first, first + count * width)
        for one in plan.ragged:
            ends = [*one.offsets.tolist()[1:], one.size]
            for packet, offset, end in zip(one.packets, one.offsets.tolist(), ends, strict=True):
                seen[int(seqs[packet])] += range(end - offset)
    for one in log.fired:
        assert sorted(seen[one.seq]) == list(range(one.values.size))
