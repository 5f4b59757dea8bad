"""Owns which modules are hooked, and what site and block each belongs to.

Attention and MLP modules are found by class and structure first, by name second, so that any
Hugging Face decoder and any model built alike is understood without a list of architectures.
Attaching the hooks is ``hooks.py``'s business.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn

from actstore.config import HookConfig, HookGranularity
from actstore.errors import ConfigError

__all__ = ["Target", "canonical_name", "entry_modules", "select"]

_ATTENTION_CLASS: Final = re.compile(r"(attention|attn)", re.IGNORECASE)
_ATTENTION_NAME: Final = re.compile(r"(^|_)(attn|attention|self_attn|mha)$", re.IGNORECASE)
_CROSS_NAME: Final = re.compile(r"(cross|encoder_attn|encdec)", re.IGNORECASE)
_MLP_CLASS: Final = re.compile(
    r"(mlp|feed_?forward|ffn|moe|layerff|dense(gated)?(act|relu)dense)", re.IGNORECASE
)
_MLP_NAME: Final = re.compile(r"(^|_)(mlp|ffn?|feed_?forward|moe)$", re.IGNORECASE)
_NORM_CLASS: Final = re.compile(r"norm", re.IGNORECASE)
#: Parts of such a module, or things beside it, whose class names also say attention or MLP.
_NO_PART: Final = re.compile(r"(norm|dropout|rotary|embedding|mask|bias)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Target:
    """A module to hook.

    Attributes
    ----------
    name : str
        Its canonical name.
    module : torch.nn.Module
        The module.
    site : str
        The variable of a dataset that it belongs to.
    block : int
        The index of its block, or -1.
    """

    name: str
    module: nn.Module
    site: str
    block: int


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a stack: where it stands, and which of its modules are attention and MLP."""

    path: str
    stack: str
    index: int
    prefix: str
    parts: Mapping[nn.Module, str]


def canonical_name(name: str) -> str:
    """Give a module's name without the prefixes that wrappers add to it."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    return ".".join(parts)


def entry_modules(model: nn.Module) -> dict[nn.Module, str]:
    """Give the modules whose outermost call is a pass: the root, its base model, its stacks."""
    names = {module: canonical_name(name) for name, module in model.named_modules()}
    found: list[Any] = [model, getattr(model, "base_model", None)]
    for getter in ("get_encoder", "get_decoder"):
        ask = getattr(model, getter, None)
        if callable(ask):
            found.append(_ask(ask))
    modules = (one for one in found if isinstance(one, nn.Module))
    entries = {module: names[module] for module in modules if module in names}
    return {module: name for module, name in entries.items() if _runs(module)}


def select(model: nn.Module, granularity: HookGranularity, hooks: HookConfig) -> list[Target]:
    """Give the modules that a granularity and a `HookConfig` hook, in ``named_modules`` order.

    Raises
    ------
    ConfigError
        There are none; the text says what was looked for.
    """
    blocks = _blocks(model)
    sites = _outer_sites(model, blocks)
    parts = {module: block for block in blocks for module in block.parts}
    targets = []
    for raw_name, module in model.named_modules():
        name = canonical_name(raw_name)
        if not _runs(module) or not _wanted(module, parts, granularity):
            continue
        site, block = _site(name, module, blocks, sites)
        targets.append(Target(name, module, site, block))
    if not targets:
        raise ConfigError(_nothing(model, granularity))
    return _targeted(targets, hooks, granularity)


# -- blocks -------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> list[_Block]:
    """Find the blocks of every stack; a model without one is a block of its own, index -1."""
    stacks = dict(_stacks(model))
    blocks = []
    for path, stack in stacks.items():
        prefix = _stack_prefix(path) if len(stacks) > 1 else ""
        for index, (key, module) in enumerate(stack.named_children()):
            parts = _parts(module)
            if parts:
                place = f"{path}.{key}" if path else key
                blocks.append(_Block(place, path, index, prefix, parts))
    if not blocks:
        parts = _parts(model)
        return [_Block("", "", -1, "", parts)] if parts else []
    return blocks


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost lists of composite modules."""
    found: list[str] = []
    for raw_name, module in model.named_modules():
        name = canonical_name(raw_name)
        if any(name.startswith(f"{path}." if path else "") for path in found):
            continue
        children = list(module.children())
        if not children or any(not list(child.children()) for child in children):
            continue
        alike = len({type(child) for child in children}) == 1
        repeated = isinstance(module, nn.Sequential) and len(children) > 1 and alike
        if isinstance(module, nn.ModuleList) or repeated:
            found.append(name)
            yield name, module


def _stack_prefix(path: str) -> str:
    for word in ("encoder", "decoder"):
        if word in path.lower().split("."):
            return f"{word}_"
    return f"{path}."


def _parts(block: nn.Module) -> dict[nn.Module, str]:
    """Find a block's attention modules and MLPs, each with its site."""
    attention = _outermost(block, _is_attention, skip=set())
    inside = {part for module in attention for part in module.modules()}
    mlps = _outermost(block, _is_mlp, skip=inside)
    if attention and not mlps:
        mlps = _last_linear(block, inside)
    parts = {
        module: "cross_attn" if _CROSS_NAME.search(name) else "attn"
        for module, name in attention.items()
    }
    parts.update(dict.fromkeys(mlps, "mlp"))
    return parts


def _outermost(
    block: nn.Module, matches: Callable[[str, nn.Module], bool], skip: set[nn.Module]
) -> dict[nn.Module, str]:
    """Find the outermost matching modules below a block, in order of registration."""
    found: dict[nn.Module, str] = {}

    def visit(parent: nn.Module, path: str) -> None:
        for key, child in parent.named_children():
            name = f"{path}.{key}" if path else key
            if child in skip:
                continue
            if matches(key, child) and _runs(child) and not _wraps(child, matches):
                found[child] = name
            else:
                visit(child, name)

    visit(block, "")
    return found


def _wraps(module: nn.Module, matches: Callable[[str, nn.Module], bool]) -> bool:
    """Whether a module is a residual wrapper: a norm beside the one that is meant (as in T5)."""
    children = list(module.named_children())
    inner = any(matches(key, child) for key, child in children)
    return inner and any(_NORM_CLASS.search(type(child).__name__) for _, child in children)


def _is_attention(key: str, module: nn.Module) -> bool:
    return _is_part(key, module, _ATTENTION_CLASS, _ATTENTION_NAME)


def _is_mlp(key: str, module: nn.Module) -> bool:
    return _is_part(key, module, _MLP_CLASS, _MLP_NAME)


def _is_part(key: str, module: nn.Module, kind: re.Pattern[str], name: re.Pattern[str]) -> bool:
    said = type(module).__name__
    if _NO_PART.search(said) or isinstance(module, nn.ModuleList | nn.ModuleDict):
        return False
    return bool(kind.search(said) or (name.search(key) and list(module.parameters())))


def _last_linear(block: nn.Module, inside: set[nn.Module]) -> dict[nn.Module, str]:
    """Give the linear that ends a block without an MLP module (OPT's fc2, BERT's output.dense)."""
    linears = {
        module: name
        for name, module in block.named_modules()
        if module not in inside
        and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        and not isinstance(module, nn.Embedding)
    }
    return dict([linears.popitem()]) if linears else {}


# -- sites --------------------------------------------------------------------------------------


def _outer_sites(model: nn.Module, blocks: list[_Block]) -> dict[nn.Module, str]:
    """Give the canonical sites of modules outside of blocks: embed, final_norm, logits, output."""
    sites: dict[nn.Module, str] = {}
    for block in blocks:
        if block.index >= 0 and block.stack:
            parent = model.get_submodule(_parent(block.stack))
            norm = _norm_after(parent, model.get_submodule(block.stack))
            if norm is not None:
                sites[norm] = f"{block.prefix}final_norm"
    for getter, site in (("get_input_embeddings", "embed"), ("get_output_embeddings", "logits")):
        ask = getattr(model, getter, None)
        module = _ask(ask) if callable(ask) else None
        if isinstance(module, nn.Module):
            sites[module] = site
    sites[model] = "output"
    return sites


def _norm_after(parent: nn.Module, stack: nn.Module) -> nn.Module | None:
    """Give the last norm that is registered beside a stack, behind it."""
    found, seen = None, False
    for child in parent.children():
        seen = seen or child is stack
        if seen and _NORM_CLASS.search(type(child).__name__):
            found = child
    return found


def _site(
    name: str, module: nn.Module, blocks: list[_Block], sites: Mapping[nn.Module, str]
) -> tuple[str, int]:
    if module in sites:
        return sites[module], -1
    for block in blocks:
        if module in block.parts:
            return f"{block.prefix}{block.parts[module]}", block.index
        if block.index < 0:
            continue
        if name == block.path:
            return f"{block.prefix}resid", block.index
        if name.startswith(f"{block.path}."):
            rest = name[len(block.path) + 1 :]
            return f"{block.stack}.{rest}" if block.stack else rest, block.index
    return name, -1


def _parent(name: str) -> str:
    return name.rpartition(".")[0]


# -- filters ------------------------------------------------------------------------------------


def _wanted(
    module: nn.Module, parts: Mapping[nn.Module, _Block], granularity: HookGranularity
) -> bool:
    if granularity is HookGranularity.ATTENTION_ONLY:
        return module in parts and parts[module].parts[module].endswith("attn")
    if granularity is HookGranularity.MLP_ONLY:
        return module in parts and parts[module].parts[module] == "mlp"
    return True


def _targeted(
    targets: list[Target], hooks: HookConfig, granularity: HookGranularity
) -> list[Target]:
    wanted = hooks.target_layers
    if wanted is None:
        return targets
    names = [target.name for target in targets]
    if callable(wanted):
        ask = _predicate(wanted)
        chosen = [target for target in targets if ask(target.name, target.module)]
        missing = [] if chosen else [repr(wanted)]
    else:
        globs = list(wanted)
        chosen = [
            target for target in targets if any(_matches(target.name, glob) for glob in globs)
        ]
        missing = [glob for glob in globs if not any(_matches(name, glob) for name in names)]
    if missing:
        msg = (
            f"target_layers {missing!r} match none of the {len(names)} layers of "
            f"{granularity.name}; they are {', '.join(map(repr, names[:12]))}"
            f"{', …' if len(names) > 12 else ''}"
        )
        raise ConfigError(msg)
    return chosen


def _matches(name: str, wanted: str) -> bool:
    """Whether a name is meant by an exact name or a glob; a name may hold brackets itself."""
    return name == wanted or fnmatchcase(name, wanted)


def _predicate(wanted: Callable[..., bool]) -> Callable[[str, nn.Module], bool]:
    """Accept a predicate of the name, or of the name and the module if it needs two."""
    try:
        inspect.signature(wanted).bind("name")
    except ValueError:  # a builtin that doesn't say: taken as one of the name
        pass
    except TypeError:
        return lambda name, module: bool(wanted(name, module))
    return lambda name, _: bool(wanted(name))


def _runs(module: nn.Module) -> bool:
    """Whether a module can be called at all: a list of modules can't."""
    return type(module).forward is not nn.Module.forward


def _ask(getter: Callable[[], Any]) -> Any:
    """Call a Hugging Face getter; models that have it but no answer raise one of these."""
    try:
        return getter()
    except (NotImplementedError, AttributeError, TypeError):
        return None


def _nothing(model: nn.Module, granularity: HookGranularity) -> str:
    looked = {
        HookGranularity.ATTENTION_ONLY: "a module of a class named like *Attention or *Attn, or "
        "itself named attn, attention, self_attn or mha",
        HookGranularity.MLP_ONLY: "a module of a class named like *MLP, *FeedForward, *FFN or "
        "*MoE, itself named mlp, ffn, ff, feed_forward or moe, or the linear that ends a block "
        "with attention",
    }.get(granularity, "a module with a forward")
    return (
        f"{granularity.name} found nothing to hook in {type(model).__name__}: wanted {looked}; "
        "use FULL_TENSOR with HookConfig(target_layers=[...]) to name the modules yourself"
    )
