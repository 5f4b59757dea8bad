"""Owns the documented facade: `InstrumentationFramework`, and nothing that it hands over.

torch is imported when a model is instrumented, not before: analysing needs none.
"""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from actstore import files
from actstore.arguments import check_positive, check_tokenizer
from actstore.buckets import is_remote, place_of, remote
from actstore.capture.memory import Memory
from actstore.config import HookConfig, HookGranularity, InstrumentationConfig
from actstore.errors import CaptureError, ConfigError
from actstore.overview import analysis_of, archive_root
from actstore.parallel import Parallel
from actstore.stream import summary
from actstore.stream.legacy import LegacyReader
from actstore.stream.reader import open_stream
from actstore.stream.uploading import spooled

if TYPE_CHECKING:
    import torch

    from actstore.capture.session import Capture, Instrumented, Upload
    from actstore.capture.tokens import _TokenBoundaryTracker

__all__ = ["InstrumentationFramework", "analyze_activations_with_tokens"]


@dataclass(frozen=True, slots=True)
class _Said:
    """What was said of a model that is instrumented; nothing that keeps the model alive."""

    hooks: HookConfig
    tokenizer: Any
    name: str
    given: weakref.ref[torch.nn.Module]
    parallel: Parallel | None

    @classmethod
    def of(cls, one: Instrumented) -> _Said:
        return cls(one.hooks, one.tokenizer, one.name, weakref.ref(one.given), one.parallel)


class InstrumentationFramework:
    """Capture the activations of PyTorch models, and analyse what was captured.

    Parameters
    ----------
    config : InstrumentationConfig
        What to capture, how it is encoded, and within which limits.

    Attributes
    ----------
    config : InstrumentationConfig
        As given.
    summary : mapping
        What the last capture did: packets, bytes, rates, waits, layers that never fired.
    progress : callable, optional
        Is given a line every five seconds of a capture, by a thread of it; such as `print`. When
        it raises, the logger ``actstore`` is told, and it is given no more.
    spool : path, optional
        Of captures into a bucket the folder for what waits for its upload; by default the working
        directory.
    spool_gb : float
        GB that may wait there before the capture does.
    storage_options : mapping, optional
        Of the bucket, as for `actstore.open_dataset`.

    Raises
    ------
    ConfigError
        ``config`` is no `InstrumentationConfig`.
    """

    def __init__(self, config: InstrumentationConfig) -> None:
        if not isinstance(config, InstrumentationConfig):
            msg = (
                "InstrumentationFramework wants an InstrumentationConfig, such as "
                f"InstrumentationConfig(HookGranularity.FULL_TENSOR); got {config!r}"
            )
            raise ConfigError(msg)
        self.config = config
        self.summary: Mapping[str, Any] = {}
        self._models: weakref.WeakKeyDictionary[torch.nn.Module, _Said]
        self._models = weakref.WeakKeyDictionary()
        self._latest: Instrumented | None = None  # of the models the one that is kept alive
        self._running: Capture | None = None
        self.progress: Callable[[str], None] | None = None
        self.spool: str | os.PathLike[str] | None = None
        self.spool_gb = 1.0
        self.storage_options: Mapping[str, Any] | None = None
        self._memory = Memory()

    def instrument_model(
        self,
        model: torch.nn.Module,
        hooks: HookConfig | None = None,
        tokenizer: Any = None,
        name: str | None = None,
        *,
        parallel: Parallel | None = None,
    ) -> None:
        """Register a model for the captures that follow; it is not touched before one begins.

        Of several models all are captured that still exist: but for the one that was registered
        last, models that are held by nobody else any more are forgotten.

        Parameters
        ----------
        model : torch.nn.Module
            The model, or a wrapper of it (data parallel, compiled, PEFT's), whose layers then
            have the names that they have in the model. Registering it again replaces what was
            said of it.
        hooks : HookConfig, optional
            The fine control of what is hooked.
        tokenizer : object, optional
            With ``decode([id])``: the log then holds the text of every token that is fed. An id
            that it raises at has none, which a warning says at the end; nor has a negative one.
        name : str, optional
            What its layers are called by where several models are captured into one log.
        parallel : Parallel, optional
            Where this process stands among those that run the model, and which of its layers'
            outputs are divided among them. By default what the device mesh of its weights says,
            where these are distributed; a model that says nothing is a replica: its log's rows
            come behind those of the other ranks.

        Raises
        ------
        ConfigError
            An argument is of the wrong kind, the granularities differ, or nothing in the model
            is of the granularity.
        CaptureError
            A capture is running.
        """
        from torch import nn

        from actstore.capture.select import select, unwrap
        from actstore.capture.session import Instrumented

        if not isinstance(model, nn.Module):
            msg = f"instrument_model wants a torch.nn.Module; got {type(model).__name__}"
            raise ConfigError(msg)
        if self._running is not None:
            msg = "a capture is running; instrument the model before it begins"
            raise CaptureError(msg)
        hooks = hooks if hooks is not None else HookConfig()
        if not isinstance(hooks, HookConfig):
            msg = f"instrument_model wants hooks as a HookConfig; got {hooks!r}"
            raise ConfigError(msg)
        if hooks.granularity not in (None, self.config.granularity):
            msg = (
                f"HookConfig asks for {_name(hooks.granularity)}, the framework's config for "
                f"{_name(self.config.granularity)}; leave HookConfig.granularity at None"
            )
            raise ConfigError(msg)
        check_tokenizer(tokenizer)
        if parallel is not None and not isinstance(parallel, Parallel):
            msg = f"instrument_model wants parallel as an actstore.Parallel; got {parallel!r}"
            raise ConfigError(msg)
        inner = unwrap(model)
        select(inner, self.config.granularity, hooks)  # raises where there is nothing to hook
        self._latest = None
        if any(other is not inner for other in self._models):
            gc.collect()  # models that nobody holds any more may hold each other's parts
        one = Instrumented(inner, hooks, tokenizer, self._named(inner, name), model, parallel)
        self._models[inner] = _Said.of(one)
        self._latest = one

    def _named(self, model: torch.nn.Module, name: str | None) -> str:
        """Give a model's name among the instrumented ones: as given, else a free one."""
        taken = {one.name for other, one in self._models.items() if other is not model}
        if name is None:
            return next(free for n in count() if (free := f"model{n}") not in taken)
        if not isinstance(name, str) or not name:
            msg = f"instrument_model wants name as a str that is not empty; got {name!r}"
            raise ConfigError(msg)
        if name in taken:
            msg = f"another model is instrumented by the name {name!r}; give each its own"
            raise ConfigError(msg)
        return name

    def _instrumented(self) -> list[Instrumented]:
        """Give the models that there are, and what was said of them."""
        from actstore.capture.session import Instrumented

        found = []
        for model, one in self._models.items():
            given = one.given()
            if given is None:  # without asking its truth: what is compiled has none
                given = model
            found.append(
                Instrumented(model, one.hooks, one.tokenizer, one.name, given, one.parallel)
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        models = self._instrumented() if self._models else []
        return {**vars(self), "_models": models, "_running": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._models = weakref.WeakKeyDictionary()
        for one in state["_models"]:
            self._models[one.model] = _Said.of(one)

    @contextmanager
    def capture_activations(
        self,
        output_path: str | os.PathLike[str],
        track_per_token: bool = False,
        checkpoint_interval_tokens: int | None = None,
        checkpoint_path: str | os.PathLike[str] | None = None,
        resume_from_checkpoint: bool = False,
    ) -> Iterator[_TokenBoundaryTracker | None]:
        """Capture what the instrumented models compute inside the ``with``.

        Parameters
        ----------
        output_path : str or path
            The ``.stream`` log. A log that is there already is moved aside, never overwritten.
            Or a URL, such as ``s3://bucket/run.stream``: it is uploaded in segments while it
            grows, through ``spool``; one that is there already is refused.
        track_per_token : bool
            Yield a tracker, and write ``{output_path}_tokens.json`` at the end.
        checkpoint_interval_tokens : int, optional
            Make everything durable, and write a checkpoint, every so many recorded tokens.
        checkpoint_path : str or path, optional
            The checkpoint; by default ``{output_path}.ckpt.json``.
        resume_from_checkpoint : bool
            Go on with the log at ``output_path`` after its last whole step.

        Yields
        ------
        _TokenBoundaryTracker or None
            With ``record_token(token_id, token_text, position=None)`` and ``tokens``.

        Raises
        ------
        ConfigError
            Options without tracking, an impossible path, or a resume of another run; of a
            capture into a bucket a ``spool_gb`` that is no size, or tracking into a store of
            obstore, beside which no token table can be.
        CaptureError
            No model was instrumented, a capture of it is running, or this one fails.
        """
        if not self._models:
            msg = "no model to capture: call instrument_model(model) first"
            raise CaptureError(msg)
        if self._running is not None:
            msg = "a capture of this framework is running; end it before the next begins"
            raise CaptureError(msg)
        from actstore.capture.session import Capture, Options

        far = self._upload(output_path, resume=resume_from_checkpoint, tracks=track_per_token)
        path = files.path_of(output_path) if far is None else spooled(far.where, self.spool)
        options = Options(
            track_per_token,
            checkpoint_interval_tokens,
            checkpoint_path,
            resume_from_checkpoint,
        )
        capture = Capture(
            self._instrumented(),
            self.config,
            path,
            options,
            memory=self._memory,
            progress=self.progress,
            upload=far,
        )
        try:
            with capture as tracker:
                self._running = capture
                yield tracker
        finally:
            self._running = None
            self.summary = capture.summary

    def _upload(self, output_path: Any, *, resume: bool, tracks: bool) -> Upload | None:
        """Give where a capture is uploaded to, where that is a URL."""
        from actstore.capture.session import Upload

        if not is_remote(output_path):
            return None
        where = remote(output_path, self.storage_options)
        if where is None or resume:
            msg = (
                f"a capture into {output_path} can't be resumed: give the path of a log here, and "
                "actstore.upload(path, url, follow=True) beside it"
            )
            raise ConfigError(msg)
        check_positive("framework.spool_gb", self.spool_gb, "GB, such as 1.0")
        if tracks:
            where.beside("_tokens.json")  # raises where no token table can be
        return Upload(where, int(self.spool_gb * 1e9))

    @property
    def captured_bytes(self) -> int:
        """Bytes of values that the running capture has written so far; 0 outside of one."""
        return self._running.written_bytes if self._running is not None else 0

    def annotate(self, **labels: Any) -> None:
        """Label the batch items of the next pass: kept in the log, coordinates of its rows.

        Passes that go on from it have the labels too, such as the steps of ``generate``: those
        that are fed behind the same cache, as long as that holds something, or what the same
        call of an encoder gave. What is annotated later is added to them, or takes their place.
        A pass that raises has taken its labels: annotate again before it is tried again.

        Parameters
        ----------
        **labels : sequence
            For each label a value for every batch item: str, int, float or bool.

        Raises
        ------
        CaptureError
            No capture is running.
        ConfigError
            A label is no list of values.
        """
        if self._running is None:
            msg = "annotate labels the next pass of a running capture; call it inside the with"
            raise CaptureError(msg)
        self._running.hooks.annotate(
            {name: _labels(name, given) for name, given in labels.items()}
        )

    def analyze_activations(self, data_path: str | os.PathLike[str]) -> dict[str, Any]:
        """Count what a log or an archive holds, in all and by layer; no values are read.

        Parameters
        ----------
        data_path : str or path
            A ``.stream`` log, also of ``llm-instrumentation``; or an archive: a folder, a
            ``.zarr.zip`` or an ``.h5``. Or the URL of a log or an archive in a bucket.

        Returns
        -------
        dict
            ``stream_path``, ``compression``, ``packets``, ``total_compressed_bytes``,
            ``per_layer`` {name: {``count``, ``bytes``, …}}, ``total_raw_bytes``,
            ``compression_ratio``, ``dtypes``, ``passes``, ``tokens``, ``duration_seconds``,
            ``sustained_gbps``, ``waited_seconds`` and more. Of an archive: the counts of its
            log, and the bytes of its own shards.

        Raises
        ------
        MissingFileError
            There is nothing at that path.
        FormatError
            It is neither a log nor an archive.
        StreamCorruptError
            It is a damaged log.
        BucketError
            The bucket doesn't answer.
        """
        options = self.storage_options if is_remote(data_path) else None
        return analysis_of(data_path, "analyze_activations", options)


def analyze_activations_with_tokens(
    stream_path: str | os.PathLike[str], framework: InstrumentationFramework
) -> dict[str, Any]:
    """Analyse a log together with the tokens that were recorded while it was captured.

    Parameters
    ----------
    stream_path : str or path
        The log; as for ``analyze_activations``.
    framework : InstrumentationFramework
        A framework; its ``storage_options`` are used for a URL.

    Returns
    -------
    dict
        What ``analyze_activations`` gives and, where tokens were recorded, ``token_metadata``
        (the token table beside the log, rebuilt from the log where there is none),
        ``packets_per_token`` and ``bytes_per_token`` (averages), and ``per_token``: for each
        step its token, passes, packets, bytes and raw bytes. The last is not there where a log
        of ``llm-instrumentation`` doesn't tell which passes made which token.

    Raises
    ------
    MissingFileError, FormatError, StreamCorruptError
        As ``analyze_activations``.
    """
    from actstore.stream import sidecars

    options = framework.storage_options if is_remote(stream_path) else None
    place = place_of(stream_path, "analyze_activations_with_tokens", options)
    found = framework.analyze_activations(place)
    if archive_root(place) is not None:
        return found
    with open_stream(place) as reader:
        metadata = sidecars.token_metadata(reader)
        if metadata is None:
            return found
        found["token_metadata"] = metadata
        tokens = metadata["total_tokens"]
        if tokens and found["packets"]:
            found["packets_per_token"] = found["packets"] / tokens
            found["bytes_per_token"] = found["total_compressed_bytes"] / tokens
        if not isinstance(reader, LegacyReader) or reader.knows_steps:
            found["per_token"] = summary.summarise_tokens(reader)
    return found


def _labels(name: str, given: Any) -> list[Any]:
    values = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(values, list | tuple):
        msg = f"annotate({name}=...) wants a list with a value for each batch item; got {given!r}"
        raise ConfigError(msg)
    values = [one.item() if hasattr(one, "item") else one for one in values]  # NumPy's scalars
    wrong = [one for one in values if not isinstance(one, str | int | float | bool)]
    if wrong:
        msg = f"annotate({name}=...) wants values of str, int, float or bool; got {wrong[0]!r}"
        raise ConfigError(msg)
    return values


def _name(granularity: HookGranularity | None) -> str:
    return granularity.name if granularity else "None"
