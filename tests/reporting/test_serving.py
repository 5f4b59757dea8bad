"""What is served is what is held, to who has the token, in bounded answers, whatever is asked."""

from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx
import numpy as np
import psutil
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import actstore
from actstore.cli.app import app
from actstore.errors import ConfigError, MissingFileError
from actstore.reporting import answers as answering
from actstore.reporting import serving
from actstore.reporting.answers import Answers, RefusedError
from actstore.reporting.sequences import Sequences
from actstore.reporting.values import Limits

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "archive"))
from logs import LogBuilder, axis
from runs import HOSTILE, compacted, odd_datasets, run_log
from servers import Server, environment, served
from test_report import data_in, parsed

ROWS, LAYERS, WIDTH = 40, 3, 16
ONE = {"sequence": 0, "first": 0, "count": 5}
PLACES = ("variable", "layer", "layers", "feature", "sequence", "first", "count", "axis")
LIMITS = Limits(400, None, 1.0)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    place = tmp_path_factory.mktemp("a place that nobody may know")
    return run_log(place / "run.stream", rows=ROWS - 4, layers=LAYERS, width=WIDTH)


@pytest.fixture(scope="module")
def server(log: tuple[Path, np.ndarray]) -> Iterator[Server]:
    with served(compacted(log[0])) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as found:
        yield found


def refused(answer: httpx.Response, *statuses: int) -> None:
    assert answer.status_code in (statuses or range(400, 500)), (answer.status_code, answer.text)
    assert answer.headers["cache-control"] == "no-store"
    said = answer.json()
    assert said["error"]
    unleaked(answer.text)


def unleaked(text: str) -> None:
    for word in ("Traceback", ".py", "site-packages", "/tmp", "nobody may know", str(Path.home())):
        assert word not in text


def raw(server: Server, data: bytes, *, end: bool = False) -> bytes:
    """Send bytes as they are, and give all that comes back until the server ends it."""
    parts = []
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
        link.sendall(data)
        if end:
            link.shutdown(socket.SHUT_WR)
        while part := link.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


# -- what is answered -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["run.stream", "run.zarr", "run.zarr.zip", "run.h5"])
def test_answers_are_what_the_file_holds(tmp_path: Path, kind: str) -> None:
    path, held = run_log(tmp_path / "run.stream", rows=ROWS - 4, layers=LAYERS, width=WIDTH)
    if kind != path.name:
        archive = compacted(path)
        path = archive if kind == archive.name else actstore.export(archive, tmp_path / kind).path
    with served(path) as mine, httpx.Client(base_url=mine.url, trust_env=False) as client:

        def ask(what: str, **given_: Any) -> Any:
            answer = client.get(what, params=given_)
            assert answer.status_code == 200, answer.text
            return answer.json()

        of = {"variable": "resid", "sequence": 0, "first": 2, "count": 30}
        norms = np.linalg.norm(held.astype(np.float64), axis=2)
        for layer in range(LAYERS):
            said = ask("layer", **of, layer=layer)
            np.testing.assert_allclose(said["norms"], norms[layer, 2:32], rtol=1e-3)
            order = np.argsort(-held[layer, 2:32].std(0), kind="stable")[:8]
            assert [one["feature"] for one in said["features"]] == order.tolist()
        said = ask("norms", **of, layer=1, layers=2)
        np.testing.assert_allclose(said["norms"], norms[1:, 2:32], rtol=1e-3)
        for feature in (0, 7, WIDTH - 1):
            said = ask("feature", **of, layer=1, feature=feature)
            np.testing.assert_allclose(said["values"], held[1, 2:32, feature], rtol=1e-3)
        said = ask("tokens", axis="token", sequence=0, first=34, count=400)
        assert said["position"] == list(range(34, 40))
        assert said["pass_index"] == [0, 0, 1, 2, 3, 4]
        assert said["about"]["tokens"] == ROWS
        listed = ask("sequences", axis="token", first=0, count=10)
        assert listed["of"] == 1
        said = ask("distribution", variable="resid")
        wanted = np.quantile(held.reshape(LAYERS, -1), [0.01, 0.5, 0.99], axis=1).T
        np.testing.assert_allclose(
            [[one[0], one[3], one[6]] for one in said["quantiles"]], wanted, rtol=1e-3, atol=1e-4
        )
        assert said["sample"] == {"rows": ROWS, "of": ROWS, "padding": 0}


def test_the_page_is_the_report_s_and_holds_no_values(client: httpx.Client) -> None:
    answer = client.get("")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    said = data_in(answer.text)
    assert said["served"]["axes"] == {"token": {"sequences": 1, "sequence": 0, "first": 0}}
    assert said["strips"] == {}
    assert all("norms" not in one for one in said["variables"])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', answer.text)
    assert "connect-src 'self'" in policy
    assert answer.headers["content-security-policy"] == f"{policy}; frame-ancestors 'none'"
    assert not parsed(answer.text).handlers
    unleaked(answer.text.replace("page.py", ""))
    assert client.head("").status_code == 200
    assert not client.head("").content


def test_every_sequence_is_found_page_by_page() -> None:
    """As `Sequences` has them: beside a loop over the rows of batches that are generated on."""
    labels: dict[str, list[int]] = {"pass_index": [], "batch_item": [], "position": []}
    for index, (items, first, count) in enumerate([(2, 0, 5), (2, 5, 1), (2, 6, 1), (3, 0, 4)]):
        for item in range(items):
            labels["pass_index"] += [index] * count
            labels["batch_item"] += [item] * count
            labels["position"] += range(first, first + count)
    total = len(labels["position"])
    labels["is_padding"] = [0] * total
    labels["is_padding"][0] = 1
    dataset = xr.Dataset(
        {"resid": (("token", "feature"), np.zeros((total, 2), np.float32))},
        {name: ("token", np.array(one)) for name, one in labels.items()},
    )
    known = Sequences.of(actstore.accessor.token_axes(dataset)["token"])
    texts = [known.rows(one, 0, 99).tolist() for one in range(len(known))]
    assert texts == [
        [1, 2, 3, 4, 10, 12],
        [5, 6, 7, 8, 9, 11, 13],
        [14, 15, 16, 17],
        [18, 19, 20, 21],
        [22, 23, 24, 25],
    ]
    assert known.longest() == 1
    assert known.find(3, 1) == (3, 0)
    assert known.find(1, 1) == (1, 5)
    assert known.find(9, 0) is None
    assert known.rows(1, 4, 2).tolist() == [9, 11]


@given(st.data())
@settings(max_examples=40)
def test_sequences_are_the_same_whatever_is_read_at_once(data: st.DataObject) -> None:
    count = data.draw(st.integers(0, 30))
    numbers = np.random.default_rng(data.draw(st.integers(0, 9999)))
    labels = {
        "pass_index": ("token", np.sort(numbers.integers(0, 4, count))),
        "batch_item": ("token", numbers.integers(0, 2, count)),
        "position": ("token", numbers.integers(0, 3, count)),
        "is_padding": ("token", numbers.random(count) > 0.8),
    }
    dataset = xr.Dataset({"x": (("token", "f"), np.zeros((count, 1)))}, labels)
    axis_ = actstore.accessor.token_axes(dataset)["token"]
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for piece in (1 << 20, 3, 1):
            patch.setattr("actstore.reporting.sequences._PIECE", piece)
            known = Sequences.of(axis_)
            found.append([known.rows(one, 0, 99).tolist() for one in range(len(known))])
    assert found[0] == found[1] == found[2]
    rows = [one for text in found[0] for one in text]
    assert sorted(rows) == np.flatnonzero(~labels["is_padding"][1]).tolist()
    for text in found[0]:
        assert len({int(labels["batch_item"][1][one]) for one in text}) == 1
        assert (np.diff(labels["position"][1][text]) == 1).all()


def test_a_sequence_is_shown_first_that_is_asked_for(log: tuple[Path, np.ndarray]) -> None:
    token = "x" * 20
    with serving.application(log[0], token=token, sequence=(2, 0)) as app:
        assert app is not None
    with pytest.raises(ConfigError, match="no rows of pass 9"), \
            serving.application(log[0], token=token, sequence=(9, 0)):  # fmt: skip
        pass
    with pytest.raises(ConfigError, match="token must be"), \
            serving.application(log[0], token="../../x"):  # fmt: skip
        pass
    with pytest.raises(MissingFileError), serving.application("nowhere", token=token):
        pass


def test_what_has_to_be_installed_is_said(
    log: tuple[Path, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"pip install 'actstore\[serve\]'"):
        serving.serve(log[0])


def test_of_a_large_archive_a_sample_and_the_index_alone_are_held() -> None:
    rows = 300_000
    wide = np.broadcast_to(np.zeros((1, 64), np.float32), (2, rows, 64))
    labels = {
        "pass_index": ("token", np.arange(rows) // 100),
        "batch_item": ("token", np.zeros(rows, np.int64)),
        "position": ("token", np.arange(rows) % 100),
    }
    dataset = xr.Dataset({"resid": (("layer", "token", "feature"), wide)}, labels)
    found = Answers(dataset, LIMITS)
    assert found.sequences("token", 2_990, 100)["of"] == 3_000
    assert len(found.sequences("token", 2_990, 100)["sequences"]) == 10
    sample = found.distribution("resid")["sample"]
    assert sample["of"] == rows
    assert sample["rows"] <= 1 << 14
    assert found.tokens("token", 2_999, 99, 400)["row"] == [rows - 1]


# -- who may ask ----------------------------------------------------------------------------------


def test_without_the_token_nothing_is_told(server: Server) -> None:
    base, token = server.url.removesuffix(f"{server.token}/"), server.token
    near = token[:-1] + ("a" if token[-1] != "a" else "b")
    wrong = ["", near, token[:-1], token + "x", token.swapcase(), "%00", quote("é"), "x" * 150]
    with httpx.Client(base_url=base, trust_env=False) as client:
        for one in wrong:
            for rest in ("", "/", "/tokens", "/sequences?axis=token&first=0&count=1"):
                refused(client.get(f"/{one}{rest}"), 403)
        escaped = "".join(f"%{ord(one):02x}" for one in token)
        refused(client.get(f"/{escaped}/"), 403)
        refused(client.get("/favicon.ico"), 403)
        refused(client.get(f"/?token={token}"), 403)
        refused(client.get(f"/{token}"), 404)
        refused(client.get(f"//{token}/"), 403)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "X"])
def test_nothing_but_reading_is_allowed(client: httpx.Client, method: str) -> None:
    for path in ("", "tokens", "none"):
        answer = client.request(method, path, content=b"x" * 100_000)
        refused(answer, 405)
        assert answer.headers["allow"] == "GET, HEAD"


def test_other_names_of_the_host_are_refused(client: httpx.Client, server: Server) -> None:
    for host in (
        *("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example"),
        *("localhost.evil", "", "127.0.0.1:x", "[::1", "0.0.0.0", "127.0.0.1@evil"),
    ):
        refused(client.get("", headers={"host": host}), 403)
    for host in ("localhost", f"LOCALHOST:{server.port}", "127.0.0.1", "[::1]:80"):
        assert client.get("", headers={"host": host}).status_code == 200
    head = f"GET /{server.token}/ HTTP/1.1\r\n".encode()
    for hosts in (b"Host: localhost\r\nHost: evil.example\r\n", b""):
        assert b" 400 " in raw(server, head + hosts + b"\r\n").partition(b"\r\n")[0]
    assert b" 403 " in raw(server, head.replace(b"1.1", b"1.0") + b"\r\n").partition(b"\r\n")[0]


def test_every_answer_forbids_keeping_framing_and_guessing(client: httpx.Client) -> None:
    for path in ("", "tokens", "none", "sequences?axis=token&first=0&count=1"):
        headers = client.get(path).headers
        assert headers["cache-control"] == "no-store"
        assert headers["referrer-policy"] == "no-referrer"
        assert headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
        assert "access-control-allow-origin" not in headers


# -- hostile requests -----------------------------------------------------------------------------

TRAVERSALS = [
    "../", "../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
    "%252e%252e%252fetc%252fpasswd", "..\\..\\etc\\passwd", "%5c..%5c..%5cetc", "....//etc/passwd",
    "..%c0%af..%c0%afetc/passwd", "/etc/passwd", "//etc/passwd", "file:///etc/passwd",
    "tokens/../../../etc/passwd", "zarr.json", "run.zarr/zarr.json", "c/0/0/0", "%00", "tokens%00",
    "tokens/", "~root", ".env", "static/../zarr.json", "%u002e%u002e/",
]  # fmt: skip


@pytest.mark.parametrize("path", TRAVERSALS)
def test_no_address_leads_to_a_file(server: Server, path: str) -> None:
    for line in (f"/{server.token}/{path}", f"/{path}", f"http://localhost/{server.token}/{path}"):
        said = raw(server, f"GET {line} HTTP/1.1\r\nHost: localhost\r\n"
                           "Connection: close\r\n\r\n".encode("latin-1"))  # fmt: skip
        status = int(said.split(b" ")[1])
        assert 400 <= status < 500, said
        assert b"root:" not in said
        assert b"zarr_format" not in said
        unleaked(said.decode("latin-1"))
    for name in ("variable", "axis"):
        for what in ("distribution", "sequences", "tokens"):
            query = urlencode({name: path, **ONE}) if what == "tokens" else f"{name}={path}"
            said = raw(server, f"GET /{server.token}/{what}?{query} HTTP/1.1\r\nHost: localhost"
                               "\r\nConnection: close\r\n\r\n".encode("latin-1"))  # fmt: skip
            assert 400 <= int(said.split(b" ")[1]) < 500, said


WRONG: list[tuple[str, Any]] = [
    *(("count", one) for one in (0, -1, 401, 10**9, 10**14, "1e3", "0x10", "", " 5")),
    *(("count", one) for one in ("\uff15", "\u0663")),
    *(("first", one) for one in (-1, ROWS, 2**31, 2**63, "9" * 500, "nan", "1.0", "+1", "1_0")),
    *(("sequence", one) for one in (-1, 1, 2**40, "null", "[]", "0;", "0 or 1=1", "%00", "true")),
    *(("layer", one) for one in (-1, LAYERS, 2**62, "-", "--1", "\u2163", "\U0001d7d9")),
    *(("layers", one) for one in (0, -5, LAYERS + 1, 2**33)),
    *(("feature", one) for one in (-1, WIDTH, 2**50, "all", ":", "0:99", "*")),
    *(("variable", one) for one in ("", "x" * 300, "__class__", "resid_present", "token_text",
                                    "\x00", "../resid", "RESID", "é", "resid ", "\ud83d")),
    *(("axis", one) for one in ("", "layer", "feature", "token/..", "0")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda one: ascii(one)[:20])
def test_what_isnt_there_is_refused_and_said(client: httpx.Client, name: str, value: Any) -> None:
    of = {"variable": "resid", **ONE}
    right = {
        "sequences": {"axis": "token", "first": 0, "count": 1},
        "tokens": {"axis": "token", **ONE},
        "layer": {**of, "layer": 0},
        "norms": {**of, "layer": 0, "layers": 1},
        "feature": {**of, "layer": 0, "feature": 0},
        "distribution": {"variable": "resid"},
    }
    text = str(value).encode("utf-8", "surrogatepass")
    asked = 0
    for what, given_ in right.items():
        whole = "&".join(f"{key}={quote(str(one))}" for key, one in given_.items())
        assert client.get(f"{what}?{whole}").status_code == 200
        if name in given_:
            asked += 1
            mine = [f"{key}={quote(text if key == name else str(one))}"
                    for key, one in given_.items()]  # fmt: skip
            refused(client.get(f"{what}?{'&'.join(mine)}"), 400, 404)
    assert asked


def test_odd_queries_are_refused(client: httpx.Client) -> None:
    right = "axis=token&first=0&count=1"
    for query in ("", "&", "=", right + "&count=1", right + "&path=/etc/passwd", "axis=token",
                  right.replace("axis", "axis[]"), right + ";x=1", "axis=%FF&first=0&count=1",
                  right + "&" * 500, "&".join(f"a{one}=1" for one in range(50))):  # fmt: skip
        refused(client.get(f"sequences?{query}"), 400)
    refused(client.get("?x=1"), 400)
    refused(client.get("sequences?" + "a" * 1001), 414)
    refused(client.get("x" * 500), 414)


def test_what_isnt_http_ends_the_connection_alone(server: Server, client: httpx.Client) -> None:
    path = f"/{server.token}/".encode()
    head = b"GET " + path + b" HTTP/1.1\r\nHost: localhost\r\n"
    for data in (
        b"\x00" * 100, b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00", b"GET " + b"/" * 100_000,
        b"GET " + path + b" HTTP/9.9\r\n\r\n",
        head + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        head + b"Content-Length: -1\r\n\r\n",
        head + b"Content-Length: 99999999999\r\n\r\nx",
        head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET " + path + b"\x80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ):  # fmt: skip
        try:
            said = raw(server, data, end=True)
        except (ConnectionResetError, BrokenPipeError):
            said = b""
        assert not said or said.startswith((b"HTTP/1.1 4", b"HTTP/1.1 200")), (data[:80], said)
        unleaked(said.decode("latin-1").replace("page.py", ""))
    websocket = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-version": "13",
                 "sec-websocket-key": "AAAAAAAAAAAAAAAAAAAAAA=="}  # fmt: skip
    assert client.get("", headers=websocket).status_code == 200
    assert client.get("").status_code == 200


_TEXTS = st.one_of(
    st.integers().map(str), st.integers(-2, 50).map(str), st.text(max_size=30),
    st.sampled_from(["resid", "mlp", "token", "0", "1", "5", "-0", "00", "NaN"]),
)  # fmt: skip


@given(
    st.sampled_from([*serving.QUESTIONS, ""]),
    st.lists(
        st.tuples(st.one_of(st.sampled_from(PLACES), st.text(max_size=8)), _TEXTS), max_size=9
    ),
    st.booleans(),
)
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_query_is_a_fault_of_the_server(
    client: httpx.Client, what: str, pairs: list[tuple[str, str]], whole: bool
) -> None:
    query = [(name.encode("utf-8", "surrogatepass"), one.encode("utf-8", "surrogatepass"))
             for name, one in pairs]  # fmt: skip
    if whole:
        names = {name for name, _ in pairs}
        query += [(key.encode(), b"0") for key in PLACES if key not in names]
    answer = client.get(f"{what}?{urlencode(query)}")
    assert answer.status_code < 500
    if answer.status_code != 200:
        refused(answer)


@given(odd_datasets())
@settings(max_examples=60, deadline=None)
def test_of_odd_datasets_everything_is_answered_or_refused(dataset: xr.Dataset) -> None:
    found = Answers(dataset, LIMITS)
    json.dumps(found.outline(), allow_nan=False)
    for dim in found.outline()["served"]["axes"]:
        for ask in (lambda dim=dim: found.sequences(dim, 0, 100),
                    lambda dim=dim: found.tokens(dim, 0, 0, 400)):  # fmt: skip
            _answered(ask)
    for one in found.outline()["variables"]:
        name = one["name"]
        _answered(lambda name=name: found.distribution(name))
        for layer in range(3):
            for ask in (
                lambda name=name, layer=layer: found.layer(name, layer, 0, 0, 400),
                lambda name=name, layer=layer: found.norms(name, layer, 1, 0, 0, 400),
                lambda name=name, layer=layer: found.feature(name, layer, 0, 0, 0, 400),
            ):
                _answered(ask)


def _answered(ask: Any) -> None:
    status = 404
    try:
        json.dumps(ask(), allow_nan=False)
    except RefusedError as error:
        status = error.status
    assert status in (400, 404)


# -- load, damage, and the end --------------------------------------------------------------------


def test_two_hundred_at_once_are_answered_or_told_to_come_again(server: Server) -> None:
    process = psutil.Process(server.process.pid)
    gate = threading.Barrier(200)
    paths = [
        "layer?variable=resid&layer=1&sequence=0&first=0&count=400",
        "norms?variable=mlp&layer=0&layers=3&sequence=0&first=0&count=400",
        "distribution?variable=mlp",
        "tokens?axis=token&sequence=0&first=0&count=400",
        "",
        "tokens?axis=token&sequence=0&first=0&count=99999999",
    ]

    def ask(number: int) -> int:
        with httpx.Client(
            base_url=server.url, timeout=120, trust_env=False, verify=False
        ) as client:
            gate.wait()
            return client.get(paths[number % len(paths)]).status_code

    before = process.memory_info().rss
    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, range(200)))
    assert set(found) <= {200, 400, 429}
    assert found.count(200) >= serving._AT_ONCE // 2
    assert process.memory_info().rss - before < 200e6


def test_an_answer_of_a_deep_wide_run_is_bounded(tmp_path: Path) -> None:
    dataset = xr.Dataset(
        {"resid": (("layer", "token", "feature"),
                   np.broadcast_to(np.float32(1), (96, 400, 8192)))},
        {"pass_index": ("token", np.zeros(400, np.int64)),
         "batch_item": ("token", np.zeros(400, np.int64)),
         "position": ("token", np.arange(400))},
    )  # fmt: skip
    found = Answers(dataset, LIMITS)
    (one,) = found.outline()["variables"]
    assert one["together"] * 400 * 8192 * 4 <= answering._TOGETHER_BYTES
    with pytest.raises(RefusedError, match="layers from 1 to"):
        found.norms("resid", 0, 96, 0, 0, 400)
    assert len(found.norms("resid", 0, one["together"], 0, 0, 400)["norms"]) == one["together"]


def test_what_cant_be_read_is_said_without_where_it_is(tmp_path: Path) -> None:
    path, _ = run_log(tmp_path / "run.stream", rows=64, width=64, generated=0)
    archive = compacted(path)
    with served(archive) as mine, httpx.Client(base_url=mine.url, trust_env=False) as client:
        for one in archive.rglob("c/**/*"):
            if one.is_file():
                one.write_bytes(one.read_bytes()[:-20])
        ask = "layer?variable=resid&layer=0&sequence=0&first=0&count=5"
        refused(client.get(ask), 422)
        assert "actstore verify" in client.get(ask).json()["error"]
        assert client.get("").status_code == 200
        code, said = mine.end()
        assert code == 130
        assert "resid can't be read" in said
        assert "Traceback" not in said


def test_a_request_whose_sender_is_gone_isnt_worked_on(log: tuple[Path, np.ndarray]) -> None:
    with served(log[0]) as mine:
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", mine.port)) as link:
                link.sendall(f"GET /{mine.token}/layer?variable=resid&layer=1&sequence=0&first=0&"
                             "count=40 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())  # fmt: skip
        with httpx.Client(base_url=mine.url, trust_env=False, timeout=60) as client:
            asked = iter(lambda: client.get("").status_code, 200)  # until they are let go
            assert set(asked) <= {429}
        code, said = mine.end()
        assert code == 130
        assert "Traceback" not in said
        assert "Exception" not in said


# -- the command ----------------------------------------------------------------------------------


def test_the_command_prints_an_address_and_ends_by_ctrl_c(log: tuple[Path, np.ndarray]) -> None:
    with served(log[0]) as mine:
        assert mine.said[0].startswith("serving ")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[A-Za-z0-9_-]{32}/", mine.url)
        assert httpx.get(mine.url, trust_env=False).status_code == 200
        listening = {one.laddr.ip for one in psutil.Process(mine.process.pid).net_connections()
                     if one.status == psutil.CONN_LISTEN}  # fmt: skip
        assert listening == {"127.0.0.1"}
        code, said = mine.end()
    assert code == 130
    assert said == "interrupted\n"
    with served(log[0]) as other:
        assert other.token != mine.token
        code, said = other.end(signal.SIGTERM)
    assert code in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert "Traceback" not in said


def test_others_are_warned_of_and_reach_it_by_the_machine_s_names(
    log: tuple[Path, np.ndarray],
) -> None:
    with served(log[0], "--host", "0.0.0.0") as mine:
        assert any("warning" in line for line in mine.said)
        here = f"http://127.0.0.1:{mine.port}/{mine.token}/"
        assert httpx.get(here, trust_env=False).status_code == 200
        wrong = {"host": "evil.example"}
        refused(httpx.get(here, headers=wrong, trust_env=False), 403)
        assert socket.gethostname() in mine.url


def test_what_cant_be_served_is_an_error(log: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    def run(*given_: Any) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "actstore", "serve", *map(str, given_)],
            capture_output=True, text=True, timeout=120, check=False, env=environment(),
        )  # fmt: skip
        return done.returncode, done.stderr

    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, said = run(log[0], "--port", taken.getsockname()[1])
    assert code == 3
    assert "give another host or port" in said
    for given_ in ([tmp_path / "none"], [log[0], "--host", "no.such.host.invalid"],
                   [log[0], "--sequence", "99", "0"]):  # fmt: skip
        code, said = run(*given_)
        assert code == 3, said
        assert said.startswith("error: ")
    assert run(log[0], "--port", "70000")[0] == 2


def test_hostile_texts_come_as_json(client: httpx.Client) -> None:
    answer = client.get("tokens?axis=token&sequence=0&first=0&count=18")
    assert answer.headers["content-type"] == "application/json"
    texts = answer.json()["token_text"]
    assert texts[:17] == HOSTILE[:17]
    assert len(texts[17]) == 120


def test_two_token_axes_have_sequences_of_their_own(tmp_path: Path) -> None:
    log = LogBuilder(tmp_path / "both.stream")
    for name in ("encoder_resid", "decoder_resid"):
        log.layer(name, name)
    log.begin(axis(1, 4, name="encoder_token"), axis(1, 3, name="decoder_token"))
    log.put("encoder_resid", np.ones((1, 4, 2), np.float32))
    log.put("decoder_resid", np.ones((1, 3, 2), np.float32))
    log.close()
    with actstore.open_dataset(log.path, chunks=None) as dataset:
        found = Answers(dataset, LIMITS)
        assert {dim: one["sequences"] for dim, one in found.outline()["served"]["axes"].items()} \
            == {"encoder_token": 1, "decoder_token": 1}  # fmt: skip
        assert found.layer("decoder_resid", 0, 0, 0, 9)["norms"] == pytest.approx(
            [2**0.5] * 3, rel=1e-3
        )
        assert len(found.tokens("encoder_token", 0, 0, 9)["row"]) == 4


def test_the_examples_of_the_help_serve(
    log: tuple[Path, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compacted(run_log(tmp_path / "run.stream")[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BROWSER", "true")
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "80"}).stdout
    lines = [one.strip()[2:] for one in shown.splitlines() if "$ actstore" in one]
    assert len(lines) == 2
    for line in lines:
        with served(Path("run.zarr"), *shlex.split(line)[3:]) as mine:
            assert httpx.get(mine.url, trust_env=False).status_code == 200
