"""Owns which modules are hooked, and what site and block each belongs to.

Attention and MLP modules are found by class and structure first, by name second, so that any
Hugging Face decoder and any model built alike is understood without a list of architectures.
Attaching the hooks is ``hooks.py``'s business.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Final

from torch import nn
from torch.jit._script import RecursiveScriptModule

from actstore import hook_names
from actstore.config import HookConfig, HookGranularity
from actstore.errors import ConfigError

__all__ = [
    "Stack",
    "Target",
    "entry_modules",
    "find_stacks",
    "fused_experts",
    "select",
    "unwrap",
]

_ATTENTION_CLASS: Final = re.compile(r"(attention|attn)", re.IGNORECASE)
_ATTENTION_NAME: Final = re.compile(r"(^|_)(attn|attention|self_attn|mha)$", re.IGNORECASE)
_CROSS_NAME: Final = re.compile(r"(cross|encoder_attn|encdec)", re.IGNORECASE)
_MLP_CLASS: Final = re.compile(
    r"(mlp|feed_?forward|ffn|moe|layerff|dense(gated)?(act|relu)dense)", re.IGNORECASE
)
_MLP_NAME: Final = re.compile(r"(^|_)(mlp|ffn?|feed_?forward|moe)$", re.IGNORECASE)
_NORM_CLASS: Final = re.compile(r"norm", re.IGNORECASE)
_LINEAR_NDIM: Final = 2
_FUSED_NDIM: Final = 3  # experts × outputs × inputs
_SIDES: Final = re.compile(r"(encoder|decoder)", re.IGNORECASE)
_TOWER: Final = re.compile(r"(vision|visual|image|audio|speech)", re.IGNORECASE)
#: What wrappers call the module that they hold.
_WRAPPED: Final = ("_orig_mod", "module")
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
    tap : {"out", "in", "weights"}
        What of it is kept: its output, what it is given, or the attention weights that it returns
        beside its output.
    """

    name: str
    module: nn.Module
    site: str
    block: int
    tap: str = "out"


@dataclass(frozen=True, slots=True)
class Stack:
    """A stack of blocks.

    Attributes
    ----------
    path : str
        The name of the list that holds them.
    prefix : str
        What its sites begin with: nothing for a model's main stack, ``"encoder_"``,
        ``"decoder_"``, ``"vision_"``, or its path and a dot.
    blocks : tuple of torch.nn.Module
        In order.
    """

    path: str
    prefix: str
    blocks: tuple[nn.Module, ...]

    @property
    def axis(self) -> str:
        """The name of its token axis."""
        word = re.sub(r"\W+", "_", self.prefix.rstrip("._"))
        return f"{word}_token" if word else "token"


@dataclass(frozen=True, slots=True)
class _Block:
    """A block of a stack: where it stands, and which of its modules are attention and MLP."""

    path: str
    stack: str
    index: int
    prefix: str
    parts: Mapping[nn.Module, str]


def unwrap(model: nn.Module) -> nn.Module:
    """Give the model that a wrapper holds: data parallel, compiled, PEFT's.

    What the wrapper returns is what that model returned; names are that model's own.
    """
    while True:
        inner = _wrapped(model)
        if inner is None:
            return model
        model = inner


def _wrapped(model: nn.Module) -> nn.Module | None:
    if callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
        inner = model.get_base_model()  # type: ignore[operator]
        return inner if isinstance(inner, nn.Module) and inner is not model else None
    children = dict(model.named_children())
    name = next(iter(children), None)
    wraps = len(children) == 1 and name in _WRAPPED and not list(model.parameters(recurse=False))
    kind = type(model).__module__
    ours = kind.startswith(("torch.nn.parallel", "torch._dynamo", "torch.distributed"))
    return children[str(name)] if wraps and ours else None


def _named(model: nn.Module) -> dict[str, nn.Module]:
    """Give every module by its name, without what compiling a part of the model adds to it."""
    found: dict[str, nn.Module] = {}
    for raw_name, module in model.named_modules():
        name = ".".join(part for part in raw_name.split(".") if part != "_orig_mod")
        found[name] = module  # of a compiled module and its original, which is the child, the last
    return found


def entry_modules(model: nn.Module) -> dict[nn.Module, tuple[str, str]]:
    """Give the modules whose outermost call is a pass: the root, its base model, what has stacks.

    Returns
    -------
    dict
        Module -> its name, and the token axis of what it is fed; ``""`` for a model that has
        both an encoder and a decoder.
    """
    modules = _named(model)
    names = {module: name for name, module in modules.items()}
    stacks = find_stacks(model)
    both = {"encoder_token", "decoder_token"} <= {stack.axis for stack in stacks}
    own = "" if both else "token"
    found = [(model, own), (getattr(model, "base_model", None), own)]
    found += [(modules[_parent(stack.path)], stack.axis) for stack in stacks]
    for side in ("encoder", "decoder"):
        end = _ask(getattr(model, f"get_{side}", None))
        found.append((end, f"{side}_token" if both else own))
    entries: dict[nn.Module, tuple[str, str]] = {}
    for module, axis in found:
        if isinstance(module, nn.Module) and module in names and _runs(module):
            entries.setdefault(module, (names[module], axis))
    return entries


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
    for name, module in _named(model).items():
        if not _runs(module) or not _wanted(module, parts, granularity):
            continue
        site, block = _site(name, module, blocks, sites)
        targets.append(Target(name, module, site, block))
    if not targets:
        raise ConfigError(_nothing(model, granularity))
    return _tapped(model, targets, hooks, granularity)


def fused_experts(model: nn.Module) -> list[str]:
    """Name the modules that hold the weights of several experts in one tensor.

    Such a one computes its experts without calling a module for each: no hook sees them.
    """
    return [
        name
        for name, module in _named(model).items()
        if name.rpartition(".")[2].endswith("experts")
        and any(one.ndim == _FUSED_NDIM for one in module.parameters(recurse=False))
    ]


# -- blocks -------------------------------------------------------------------------------------


def _blocks(model: nn.Module) -> list[_Block]:
    """Find the blocks of every stack; a model without one is a block of its own, index -1."""
    blocks = []
    for stack in find_stacks(model):
        names = {module: key for key, module in _named(model.get_submodule(stack.path)).items()}
        for index, module in enumerate(stack.blocks):
            place = f"{stack.path}.{names[module]}".lstrip(".")
            blocks.append(_Block(place, stack.path, index, stack.prefix, _parts(module)))
    if not blocks:
        parts = _parts(model)
        return [_Block("", "", -1, "", parts)] if parts else []
    return blocks


def find_stacks(model: nn.Module) -> list[Stack]:
    """Find the stacks of blocks: the outermost lists of composite modules.

    Where any of them has attention or an MLP, only those count that do (of a hybrid model every
    block of such a stack); else all of them do, as in a state-space model.
    """
    lists = dict(_lists(model))
    with_parts = {path: one for path, one in lists.items() if any(map(_parts, one))}
    stacks = with_parts or lists
    return [Stack(path, prefix, stacks[path]) for path, prefix in _prefixes(model, stacks).items()]


def _lists(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Yield the outermost lists of composite modules."""
    found: list[str] = []
    for name, module in _named(model).items():
        if any(name.startswith(f"{path}." if path else "") for path in found):
            continue
        children = tuple(_uncompiled(child) for child in module.children())
        real = [child for child in children if not isinstance(child, nn.Identity)]
        if not real or any(not list(child.children()) for child in real):
            continue  # an Identity stands for a block that another process of a pipeline has
        alike = len({type(child) for child in children}) == 1
        repeated = isinstance(module, nn.Sequential) and len(children) > 1 and alike
        if isinstance(module, nn.ModuleList) or repeated:
            found.append(name)
            yield name, children


def _uncompiled(module: nn.Module) -> nn.Module:
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _prefixes(model: nn.Module, stacks: Mapping[str, Any]) -> dict[str, str]:
    """Give each stack what its sites begin with; the main one of a model, nothing."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    sides = {path: _SIDES.findall(path.lower()) for path in stacks}
    if {side for words in sides.values() for side in words[:1]} == {"encoder", "decoder"}:
        wanted = {path: f"{words[0]}_" if words else "" for path, words in sides.items()}
    else:
        embed = _ask(getattr(model, "get_input_embeddings", None))
        main = max(stacks, key=lambda path: _nearness(model, path, embed, stacks[path]))
        towers = {path: _TOWER.search(path) for path in stacks}
        wanted = {path: f"{one[0].lower()}_" if one else "" for path, one in towers.items()}
        wanted[main] = ""
        wanted |= {path: f"{path}." for path in stacks if path != main and not wanted[path]}
    twice = [prefix for prefix in wanted.values() if list(wanted.values()).count(prefix) > 1]
    return {path: f"{path}." if prefix in twice else prefix for path, prefix in wanted.items()}


def _nearness(
    model: nn.Module, path: str, embed: Any, blocks: tuple[nn.Module, ...]
) -> tuple[bool, int]:
    """Tell how likely a stack is the main one: beside the embedding of its inputs, or largest."""
    beside = model.get_submodule(_parent(path))
    holds = any(module is embed for module in beside.modules())
    return holds and beside is not model, sum(
        parameter.numel() for block in blocks for parameter in block.parameters()
    )


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
    if kind.search(said):
        return True
    return bool(name.search(key) and list(module.parameters()) and not _is_half(module))


def _is_half(module: nn.Module) -> bool:
    """Whether a module is a bare linear that changes the width: half an MLP (as in ALBERT)."""
    shape = tuple(getattr(getattr(module, "weight", None), "shape", ()))
    return not list(module.children()) and len(shape) == _LINEAR_NDIM and len(set(shape)) > 1


def _last_linear(block: nn.Module, inside: set[nn.Module]) -> dict[nn.Module, str]:
    """Give the linear that ends a block without an MLP module (OPT's fc2, BERT's output.dense)."""
    linears = {
        module: name
        for module, name in _outermost(block, _is_linear, skip=inside).items()
        if not isinstance(module, nn.Embedding)
    }
    return dict([linears.popitem()]) if linears else {}


def _is_linear(_key: str, module: nn.Module) -> bool:
    """Whether a module is linear, by its class's name (quantized, LoRA's) or by its weight."""
    plain = getattr(getattr(module, "weight", None), "ndim", 0) == _LINEAR_NDIM
    return plain or "linear" in type(module).__name__.lower()


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
        module = _ask(getattr(model, getter, None))
        if isinstance(module, nn.Module):
            sites[module] = site
    sites[model] = "output"
    return sites


def _norm_after(parent: nn.Module, stack: nn.Module) -> nn.Module | None:
    """Give the last norm that is registered beside a stack, behind it or as a final one."""
    found, seen = None, False
    for key, child in parent.named_children():
        seen = seen or child is stack
        if (seen or key.startswith("final")) and _NORM_CLASS.search(type(child).__name__):
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


def _tapped(
    model: nn.Module, outputs: list[Target], hooks: HookConfig, granularity: HookGranularity
) -> list[Target]:
    """Give the outputs, inputs and attention weights that are asked for."""
    inputs = [
        replace(one, name=f"{one.name}@in", site=f"{one.site}@in", tap="in") for one in outputs
    ]
    weights = [
        replace(one, name=f"{one.name}#weights", site=f"{one.site}_weights", tap="weights")
        for one in outputs
        if one.site.endswith("attn")
    ]
    targets = _targeted(outputs, inputs, weights, hooks, granularity)
    chosen = {one.name for one in targets}
    if hooks.inputs:
        targets += [one for one in inputs if one.name[:-3] in chosen and one.name not in chosen]
    if hooks.attention_weights:
        wanted = [
            one
            for one in weights
            if one.name.removesuffix("#weights") in chosen and one.name not in chosen
        ]
        if not wanted:
            msg = (
                f"attention_weights: none of the hooked modules of {type(model).__name__} is an "
                "attention module; name some in target_layers, or use ATTENTION_ONLY"
            )
            raise ConfigError(msg)
        targets += wanted
    for one in targets:
        if one.tap == "weights":
            _check_weights(model, one)
    scripted = [one.name for one in targets if type(one.module) is RecursiveScriptModule]
    if scripted:
        msg = (
            f"scripted modules take no hooks: {', '.join(map(repr, scripted[:8]))}; capture the "
            "model that they were scripted from, or leave them out of target_layers"
        )
        raise ConfigError(msg)
    return targets


def _check_weights(model: nn.Module, target: Target) -> None:
    """Refuse attention that never has its weights."""
    config = getattr(target.module, "config", None) or getattr(model, "config", None)
    kind = getattr(config, "_attn_implementation", None)
    if kind not in (None, "eager"):
        msg = (
            f"{target.name.removesuffix('#weights')!r} runs {kind!r} attention, which never "
            "computes the weights; load the model with attn_implementation='eager', or call "
            "model.set_attn_implementation('eager')"
        )
        raise ConfigError(msg)


def _targeted(
    outputs: list[Target],
    inputs: list[Target],
    weights: list[Target],
    hooks: HookConfig,
    granularity: HookGranularity,
) -> list[Target]:
    """Give what ``target_layers`` means: outputs, and inputs and weights that it names."""
    wanted = hooks.target_layers
    if wanted is None:
        return outputs
    if callable(wanted):
        ask = _predicate(wanted)
        chosen = [target for target in outputs if ask(target.name, target.module)]
        missing = [] if chosen else [repr(wanted)]
    else:
        everything = [*outputs, *inputs, *weights]
        found = {glob: _meant(glob, outputs, everything) for glob in wanted}
        names = {target.name for mine in found.values() for target in mine}
        chosen = [target for target in everything if target.name in names]
        missing = [glob for glob, mine in found.items() if not mine]
    if missing:
        known = [target.name for target in outputs]
        msg = (
            f"target_layers {missing!r} match none of the {len(known)} layers of "
            f"{granularity.name}; they are {', '.join(map(repr, known[:12]))}"
            f"{', …' if len(known) > 12 else ''}, what they are given ('name@in'), and "
            f"{', '.join(map(repr, hook_names.KNOWN))}"
        )
        raise ConfigError(msg)
    return chosen


def _meant(wanted: str, outputs: list[Target], everything: list[Target]) -> list[Target]:
    """Give the targets of an exact name, of a glob, or of one of TransformerLens' names."""
    exact = [target for target in everything if target.name == wanted]
    if exact:
        return exact
    named = hook_names.parse(wanted)
    if named is not None:
        site, block = named
        mine = [target for target in everything if target.site == site]
        return [target for target in mine if block is None or target.block == block]
    among = everything if "@in" in wanted or "#" in wanted else outputs
    return [target for target in among if fnmatchcase(target.name, wanted)]


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
    return inspect.getattr_static(type(module), "forward") is not nn.Module.forward


def _ask(getter: Callable[[], Any] | None) -> Any:
    """Call a Hugging Face getter; models that have it but no answer raise one of these."""
    if not callable(getter):
        return None
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
