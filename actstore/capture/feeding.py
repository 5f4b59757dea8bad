"""Owns running a Hugging Face model over texts while it is captured: prefill, or generation.

What the texts are is ``samples``'s; capturing is the framework's, as with any other model.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from actstore import files
from actstore.capture.header import check_same_run, describe
from actstore.capture.session import Instrumented
from actstore.config import HookConfig, InstrumentationConfig
from actstore.errors import CaptureError, ConfigError
from actstore.samples import Sample
from actstore.stream.reader import open_stream

__all__ = ["Fed", "How", "Loaded", "feed", "load", "logs_of"]

_NO_LIMIT: Final = 1 << 20  # a tokenizer without a limit says a very large number
_DTYPES: Final = ("auto", "bfloat16", "float16", "float32")


class Framework(Protocol):
    """What is needed of `InstrumentationFramework`."""

    config: InstrumentationConfig

    def instrument_model(
        self, model: Any, hooks: HookConfig | None, tokenizer: Any, name: str | None
    ) -> None:
        """Register a model."""

    def capture_activations(
        self,
        output_path: Path,
        track_per_token: bool,
        checkpoint_interval_tokens: int | None,
        checkpoint_path: Path | None,
        resume_from_checkpoint: bool,
    ) -> AbstractContextManager[Any]:
        """Capture inside a ``with``."""

    def annotate(self, **labels: Any) -> None:
        """Label the next pass."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer, and the most tokens that both take."""

    model: Any
    tokenizer: Any
    most_tokens: int


@dataclass(frozen=True, slots=True)
class How:
    """How texts are fed.

    Attributes
    ----------
    generate : int
        Tokens to generate greedily after each text, at most; 0: each is only read (a prefill).
    batch_size : int
        Texts of a pass, of a prefill; texts are generated from one by one.
    max_length : int, optional
        Tokens of a text that are fed, at most.
    checkpoint_tokens : int
        Generated tokens between checkpoints.
    resume : bool
        Go on with what an earlier capture of these texts left.
    """

    generate: int = 0
    batch_size: int = 1
    max_length: int | None = None
    checkpoint_tokens: int = 64
    resume: bool = False

    def __post_init__(self) -> None:
        if self.generate and self.batch_size != 1:
            msg = f"texts are generated from one by one: batch_size is 1; got {self.batch_size!r}"
            raise ConfigError(msg)


@dataclass(slots=True)
class Fed:
    """What was fed.

    Attributes
    ----------
    log : Path
        Where it was captured.
    samples, skipped : int
        Texts that were fed, and those that an earlier log held.
    tokens, generated : int
        Tokens that were fed as text, and those that were generated.
    truncated : int
        Texts that were longer than what is fed.
    """

    log: Path
    samples: int = 0
    skipped: int = 0
    tokens: int = 0
    generated: int = 0
    truncated: int = 0


def load(
    name: str, *, dtype: str = "auto", device: str | None = None, generates: bool = False
) -> Loaded:
    """Load a model and its tokenizer, as transformers finds them.

    Parameters
    ----------
    name : str
        A folder, or a name on the hub; nothing is downloaded where ``HF_HUB_OFFLINE`` is set.
    dtype : {"auto", "bfloat16", "float16", "float32"}
        Of the weights; ``"auto"`` is what they were saved in.
    device : str, optional
        As torch names it; by default the first GPU, if there is one.
    generates : bool
        It must be able to generate.

    Raises
    ------
    ConfigError
        There is no such model, or it can't be loaded like that.
    """
    try:
        import transformers
    except ImportError as error:
        msg = "a model by its name wants transformers: pip install 'actstore[demo]'"
        raise ConfigError(msg) from error
    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if dtype not in _DTYPES:
        msg = f"dtype must be one of {', '.join(map(repr, _DTYPES))}; got {dtype!r}"
        raise ConfigError(msg)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = _auto_class(config, generates)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name, config=config, dtype=dtype).to(place).eval()
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        told = str(error).strip().splitlines() or [type(error).__name__]
        msg = f"{name!r} can't be loaded: {' '.join(told[:2])}"
        raise ConfigError(msg) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    limits = (tokenizer.model_max_length, getattr(config, "max_position_embeddings", None))
    most = min((one for one in limits if one and one <= _NO_LIMIT), default=_NO_LIMIT)
    return Loaded(model, tokenizer, most)


def _auto_class(config: Any, generates: bool) -> Any:
    import transformers

    if config.is_encoder_decoder:
        if not generates:
            msg = "an encoder-decoder reads nothing without generating: ask for tokens to generate"
            raise ConfigError(msg)
        return transformers.AutoModelForSeq2SeqLM
    heads = tuple(config.architectures or ())
    if generates or any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in heads):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def logs_of(log: Path) -> list[Path]:
    """Give the log and those that later prefills wrote beside it: ``run.1.stream``, …."""
    found = [log] if log.exists() else []
    free = files.free_name(log)
    number = 1
    while (name := log.with_name(f"{log.stem}.{number}{log.suffix}")) != free:
        found.append(name)
        number += 1
    return found


def feed(
    framework: Framework,
    loaded: Loaded,
    samples: Sequence[Sample],
    log: Path,
    how: How,
    *,
    hooks: HookConfig | None = None,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[Fed], None] = lambda _: None,
) -> Fed:
    """Run a model over texts, and capture it.

    Parameters
    ----------
    framework : InstrumentationFramework
        It gets the model.
    loaded : Loaded
        The model.
    samples : sequence of Sample
        The texts; the rows of each have its id as the annotation ``sample_id``.
    log : Path
        The ``.stream`` log. A resumed generation goes on in it; a resumed prefill feeds what no
        log of `logs_of` holds, into the next of these names.
    how : How
        Prefill or generation.
    hooks : HookConfig, optional
        What to hook.
    stop : callable
        Asked between passes: whether to end there, the log whole, by a `KeyboardInterrupt`.
    progress : callable
        Given what was fed so far, after each pass.

    Returns
    -------
    Fed
        What was fed.

    Raises
    ------
    ConfigError
        Nothing can be captured like that, or there is nothing to feed.
    CaptureError
        The capture failed.
    """
    if not samples:
        msg = "there are no texts to feed: all lines are blank"
        raise ConfigError(msg)
    hooks = hooks or HookConfig()
    framework.instrument_model(loaded.model, hooks, loaded.tokenizer, None)
    with torch.no_grad():
        if how.generate:
            return _Generation(framework, loaded, how, Fed(log), stop, progress).run(samples)
        if hasattr(loaded.model.config, "use_cache"):
            loaded.model.config.use_cache = False
        done: Mapping[Any, tuple[int, ...] | None] = {}
        target = log
        if how.resume and log.exists():
            done = _captured(loaded, hooks, framework.config, log)
            target = files.free_name(log)
        fed = Fed(target)
        return _prefill(framework, loaded, samples, how, fed, done, stop, progress)


def _ids(loaded: Loaded, sample: Sample, how: How, fed: Fed) -> list[int]:
    """Give the token ids of a text, as many as are fed."""
    ids: list[int] = loaded.tokenizer(sample.text, truncation=False).input_ids
    room = loaded.most_tokens - how.generate
    most = room if how.max_length is None else min(how.max_length, room)
    if most < 1:
        msg = f"no room for a text: the model takes {loaded.most_tokens} tokens"
        raise ConfigError(msg)
    if len(ids) > most:
        fed.truncated += 1
    return ids[:most]


# -- prefill ------------------------------------------------------------------------------------


def _prefill(
    framework: Framework,
    loaded: Loaded,
    samples: Sequence[Sample],
    how: How,
    fed: Fed,
    done: Mapping[Any, tuple[int, ...] | None],
    stop: Callable[[], bool],
    progress: Callable[[Fed], None],
) -> Fed:
    left = [one for one in samples if one.id not in done]
    for one in samples:
        before = done.get(one.id)
        if before is not None and before != tuple(_ids(loaded, one, how, Fed(fed.log))):
            msg = f"sample {one.id!r} was captured with other tokens before: is it another text?"
            raise ConfigError(msg)
    fed.skipped = len(samples) - len(left)
    if not left:
        return fed
    device = loaded.model.device
    with framework.capture_activations(fed.log, False, None, None, False):
        for at in range(0, len(left), how.batch_size):
            if stop():
                raise KeyboardInterrupt
            batch = left[at : at + how.batch_size]
            texts = [_ids(loaded, one, how, fed) for one in batch]
            inputs = loaded.tokenizer.pad(
                {"input_ids": texts}, padding_side="right", return_tensors="pt"
            ).to(device)
            framework.annotate(sample_id=[one.id for one in batch])
            loaded.model(**inputs)
            fed.samples += len(batch)
            fed.tokens += sum(map(len, texts))
            progress(fed)
    return fed


def _captured(
    loaded: Loaded, hooks: HookConfig, config: InstrumentationConfig, log: Path
) -> dict[Any, tuple[int, ...] | None]:
    """Give the texts that logs hold whole, by id, and their tokens where all rows were kept."""
    one = Instrumented(loaded.model, hooks, loaded.tokenizer, "model0", loaded.model)
    header = describe([one], config, track_per_token=False)
    found: dict[Any, tuple[int, ...] | None] = {}
    for path in logs_of(log):
        with open_stream(path) as reader:
            try:
                check_same_run(reader.header, header, path)
            except ConfigError:
                if path == log:
                    raise
                continue  # another run's, which was moved aside
            for info in reader.passes:
                names = info.annotations.get("sample_id")
                if info.aborted or not isinstance(names, list) or not info.axes:
                    continue
                axis = info.axes[0]
                for item, name in enumerate(names):
                    ids = axis.token_ids[item][axis.mask[item]].tolist()
                    found[name] = tuple(ids) if hooks.rows is None else None
    return found


# -- generation ---------------------------------------------------------------------------------


@dataclass(slots=True)
class _Generation:
    """Generates from each text in turn, and records each token."""

    framework: Framework
    loaded: Loaded
    how: How
    fed: Fed
    stop: Callable[[], bool]
    progress: Callable[[Fed], None]

    def run(self, samples: Sequence[Sample]) -> Fed:
        how, fed = self.how, self.fed
        with self.framework.capture_activations(
            fed.log, True, how.checkpoint_tokens, None, how.resume
        ) as tracker:
            made = _generated(fed.log) if tracker.tokens else {}
            for sample in samples:
                before = made.get(sample.id, [])
                if self._is_over(before):
                    fed.skipped += 1
                    continue
                if self.stop():
                    raise KeyboardInterrupt
                self._generate(sample, before, tracker)
                fed.samples += 1
                self.progress(fed)
        return fed

    def _is_over(self, made: Sequence[int]) -> bool:
        return len(made) >= self.how.generate or bool(made and made[-1] in self._ends())

    def _ends(self) -> set[int]:
        ends = self.loaded.model.generation_config.eos_token_id
        return set(ends) if isinstance(ends, list) else {ends}

    def _generate(self, sample: Sample, before: Sequence[int], tracker: Any) -> None:
        """Generate what is left after a text, and what was generated before."""
        model, device = self.loaded.model, self.loaded.model.device
        text = _ids(self.loaded, sample, self.how, self.fed)
        self.fed.tokens += len(text)
        given = {"input_ids": torch.tensor([text])}
        behind = torch.tensor([list(before)], dtype=torch.int64)
        if model.config.is_encoder_decoder:
            start = torch.tensor([[model.generation_config.decoder_start_token_id]])
            given["decoder_input_ids"] = torch.cat([start, behind], 1)
        else:
            given["input_ids"] = torch.cat([given["input_ids"], behind], 1)
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        self.framework.annotate(sample_id=[sample.id])
        model.generate(
            **{name: tensor.to(device) for name, tensor in given.items()},
            max_new_tokens=self.how.generate - len(before),
            do_sample=False,
            num_beams=1,
            pad_token_id=self.loaded.tokenizer.pad_token_id,
            streamer=_Recorder(self, sample, tracker, list(before)),
        )

    def record(self, sample: Sample, tracker: Any, made: Sequence[int]) -> None:
        """Record the token that was made last; label the pass that follows, if one does."""
        tracker.record_token(made[-1], self.loaded.tokenizer.decode([made[-1]]))
        self.fed.generated += 1
        self.progress(self.fed)
        if self.stop():
            raise KeyboardInterrupt
        if not self._is_over(made):  # a model without a cache is fed everything again
            self.framework.annotate(sample_id=[sample.id])


class _Recorder:
    """What `generate` tells of each token: first of the prompt, then of what it made.

    Parameters
    ----------
    generation : _Generation
        It records them.
    sample : Sample
        What is generated from.
    tracker : object
        The capture's.
    made : list of int
        The tokens that were made before.
    """

    def __init__(
        self, generation: _Generation, sample: Sample, tracker: Any, made: list[int]
    ) -> None:
        self._generation = generation
        self._sample = sample
        self._tracker = tracker
        self._made = made
        self._begun = False

    def put(self, tokens: torch.Tensor) -> None:
        """Take what was made."""
        if not self._begun:
            self._begun = True
            return
        for token in tokens.flatten().tolist():
            self._made.append(token)
            self._generation.record(self._sample, self._tracker, self._made)

    def end(self) -> None:
        """Hear that nothing follows."""


def _generated(log: Path) -> dict[Any, list[int]]:
    """Give the tokens that a log holds of each text."""
    found: dict[Any, list[int]] = defaultdict(list)
    with open_stream(log) as reader:
        names = dict(_named(reader.passes))
        for token in reader.tokens:
            if token.pass_index not in names:
                msg = f"{log} has token {token.step} of no text; give another path"
                raise CaptureError(msg)
            found[names[token.pass_index]].append(token.token_id)
    return found


def _named(passes: Sequence[Any]) -> Iterator[tuple[int, Any]]:
    """Give each pass its text; a decoder's first has no label, and that of its encoder's."""
    last: list[Any] = []
    for info in passes:
        names = info.annotations.get("sample_id")
        last = names if isinstance(names, list) and len(names) == 1 else last
        if last:
            yield info.index, last[0]
