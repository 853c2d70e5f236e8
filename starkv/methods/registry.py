# SPDX-License-Identifier: Apache-2.0
"""All methods by name, and which of their forms runs where."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from inspect import signature
from typing import Any, ClassVar

from starkv.errors import UsageError
from starkv.methods import star_kv
from starkv.methods.full import Full
from starkv.methods.gui_kv import GuiKV
from starkv.methods.h2o import H2O
from starkv.methods.method import IndexSets, KvMethod
from starkv.methods.oracle import Oracle
from starkv.methods.prefill import Prefill
from starkv.methods.pyramidkv import PyramidKV
from starkv.methods.random import RandomRows
from starkv.methods.rows import PromptRows
from starkv.methods.select import Kept
from starkv.methods.snapkv import SnapKV
from starkv.methods.star_kv_config import StarKVConfig
from starkv.methods.star_kv_state import StarKVState
from starkv.methods.streaming_llm import StreamingLLM
from starkv.methods.vl_cache import VLCache


@dataclass(frozen=True)
class StarKV:
    """STaR-KV behind nearly the same face as the others: it remembers a trajectory, so ``compress`` takes and
    returns a state where the others have ``compress_with``."""

    name: ClassVar[str] = "star_kv"
    config: StarKVConfig

    @property
    def index_sets(self) -> IndexSets:
        return "layer"

    def window_for(self, prompt: PromptRows, kept_rows: int) -> int:
        """See :meth:`KvMethod.window_for`."""
        return self.config.window_for(kept_rows)

    def queries_for(self, prompt: PromptRows, kept_rows: int) -> int:
        """See :meth:`KvMethod.queries_for`."""
        return self.window_for(prompt, kept_rows)

    def initial_state(self, prefill: Prefill) -> StarKVState:
        """State before the first prompt of a trajectory. In official mode all sequences share one."""
        layers, batch, groups = prefill.keys.shape[:3]
        shared = 1 if self.config.is_official else batch
        return StarKVState.initial(layers, shared, groups, prefill.keys.device)

    def compress(
        self, prefill: Prefill, state: StarKVState, rows: int, length: int, protected: int = 0
    ) -> tuple[Kept | None, StarKVState]:
        """Score and compact a prompt's cache, see :func:`starkv.methods.star_kv.compress`.

        Returns:
            the compacted cache, None where the prompt stays as it is, and the state for the next prompt.
        """
        kept, _, after = star_kv.compress(prefill, state, self.config, rows, length, protected)
        return kept, after


def _star_kv(mode: str = "native", **changes: Any) -> StarKV:
    return StarKV(replace(StarKVConfig.of_mode(mode), **changes))


METHODS: dict[str, Callable[..., KvMethod | StarKV]] = {
    "full": Full,
    "star_kv": _star_kv,
    "snapkv": SnapKV,
    "pyramidkv": PyramidKV,
    "vl_cache": VLCache,
    "gui_kv": GuiKV,
    "streaming_llm": StreamingLLM,
    "h2o": H2O,
    "random": RandomRows,
    "oracle": Oracle,
}


def make_method(name: str, **parameters: Any) -> KvMethod | StarKV:
    """A method by name.

    Args:
        name: one of ``METHODS``.
        parameters: fields of its dataclass; of STaR-KV ``mode`` (native or official) and fields of
            ``StarKVConfig``.

    Raises:
        UsageError: no such method or parameter, or a value that makes no sense.
    """
    if name not in METHODS:
        raise UsageError(f"unknown KV method {name!r}; known: {', '.join(METHODS)}")
    known = _parameters(name)
    for parameter in parameters:
        if parameter not in known:
            raise UsageError(f"{name} has no parameter {parameter!r}; it has: {', '.join(known)}")
    return METHODS[name](**parameters)


def _parameters(name: str) -> tuple[str, ...]:
    if name == StarKV.name:
        return ("mode", *(field.name for field in fields(StarKVConfig)))
    return tuple(signature(METHODS[name]).parameters)


@dataclass(frozen=True)
class MethodForm:
    """One form of a method: who chooses rows, and which engines run it."""

    name: str
    index_sets: IndexSets
    on_engines: bool
    """Every engine runs it. False: the PyTorch reference alone, which every table has to say."""

    def bytes_factor(self, heads: int, kv_heads: int) -> int:
        """Bytes of a kept row, relative to a cache that stores KV heads once."""
        return heads // kv_heads if self.index_sets == "attention_head" else 1


FORMS = (
    MethodForm("full", "layer", on_engines=True),
    MethodForm("star_kv", "layer", on_engines=True),
    MethodForm("streaming_llm", "layer", on_engines=True),
    MethodForm("random", "layer", on_engines=True),
    MethodForm("snapkv", "kv_head", on_engines=True),
    MethodForm("pyramidkv", "kv_head", on_engines=True),
    MethodForm("gui_kv", "kv_head", on_engines=True),
    # Engines have no room for heads that store a KV head's rows several times over.
    MethodForm("snapkv", "attention_head", on_engines=False),
    MethodForm("pyramidkv", "attention_head", on_engines=False),
    MethodForm("gui_kv", "attention_head", on_engines=False),
    # These ask for attention that a decoder doesn't put out.
    MethodForm("vl_cache", "attention_head", on_engines=False),
    MethodForm("vl_cache", "kv_head", on_engines=False),
    MethodForm("h2o", "attention_head", on_engines=False),
    MethodForm("h2o", "kv_head", on_engines=False),
    # Knows the answer.
    MethodForm("oracle", "layer", on_engines=False),
)


def form_of(method: KvMethod | StarKV) -> MethodForm:
    """The form that a method is in."""
    return next(form for form in FORMS if form.name == method.name and form.index_sets == method.index_sets)
