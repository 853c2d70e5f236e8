# SPDX-License-Identifier: Apache-2.0
"""KV compression with ONNX Runtime: three small graphs that work in place on the numpy buffers.

``compress.onnx`` is STaR-KV as a whole, ``score_window.onnx`` what SnapKV and its descendants score with, and
``compact.onnx`` moves the rows that any other method chose.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from starkv.errors import EngineError, UsageError
from starkv.manifest import TextShape
from starkv.methods.names import RANDOM, STAR_KV, STREAMING_LLM
from starkv.methods.rows import PromptRows
from starkv.methods.star_kv_plan import StarKVProgress, skipped_call
from starkv.methods.star_kv_request import StarKVRequest, request_star_kv
from starkv.methods.stream_rows import CacheRows
from starkv.runtime.engines.ort_binding import bind_array
from starkv.runtime.kv import baselines
from starkv.runtime.kv.buffers import Arena, Pool
from starkv.runtime.kv.policy import Compressed, KvPolicy, StarKVMemory, whole_prompt

Array = NDArray[Any]

_GRAPHS_OF = {STAR_KV: ("compress",), STREAMING_LLM: ("compact",), RANDOM: ("compact",)}
"""Graphs of the methods that don't need both of the others."""


class OrtCompressor:
    """Compresses the sequence of an arena into a slot of a pool."""

    def __init__(self, text: TextShape, observation_window: int, open_graph: Callable[[str], Any]) -> None:
        """Graphs are opened when a method first needs them.

        Args:
            text: sizes of the decoder.
            observation_window: most queries that the decoder puts out.
            open_graph: makes the session of ``{name}.onnx``.
        """
        self._text, self._observation_window, self._open_graph = text, observation_window, open_graph
        self._sessions: dict[str, Any] = {}

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = self._open_graph(graph)
        return self._sessions[graph]

    def most_rows(self, prompt_rows: int, policy: KvPolicy) -> int:
        """Most rows that any layer can keep of a prompt of so many rows.

        Opens the graphs that the policy needs, so that the first compression takes no longer than the others.
        """
        # What the prompt is made of does not change the bound.
        return self.most_rows_of(PromptRows(np.zeros((prompt_rows, 4), np.int32), (), ()), policy)

    def most_rows_of(self, rows: CacheRows, policy: KvPolicy) -> int:
        """The same for rows whose lengths are known, of a prompt or of a stream."""
        if policy.keeps_all_of(rows):
            return rows.length
        for graph in self._graphs_of(policy.method):
            self._session(graph)
        if policy.method != STAR_KV:
            prompt = whole_prompt(rows, policy)
            return max(baselines.kept_rows_per_layer(policy, self._text.layers, prompt.length))
        return self._request(rows, policy, StarKVProgress()).most_rows

    def _graphs_of(self, method: str) -> tuple[str, ...]:
        """Graphs that a method runs."""
        return _GRAPHS_OF.get(method, ("compact", "score_window"))

    def compress(
        self,
        arena: Arena,
        pool: Pool,
        slot: int,
        prompt: CacheRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        """See :meth:`Engine.compress`."""
        check_prefilled(arena, prompt)
        arena.kv.row_meta[:, 0, : prompt.length] = prompt.row_meta
        star_kv = policy.method == STAR_KV
        if star_kv and memory is None:
            memory = StarKVMemory.initial(self._text.layers, self._text.kv_heads)
        if policy.keeps_all_of(prompt):
            if memory is not None and star_kv:
                memory = replace(memory, progress=skipped_call(policy.star_kv, memory.progress))
            return self._copy(arena, pool, slot, memory)
        if star_kv and memory is not None:
            return self._star_kv(arena, pool, slot, prompt, policy, memory)
        return self._baseline(arena, pool, slot, whole_prompt(prompt, policy), policy, memory)

    def _request(self, prompt: CacheRows, policy: KvPolicy, progress: StarKVProgress) -> StarKVRequest:
        kept = policy.kept_of(prompt)
        return request_star_kv(policy.star_kv, prompt, kept, progress, self._observation_window)

    def _copy(self, arena: Arena, pool: Pool, slot: int, memory: StarKVMemory | None) -> Compressed:
        rows = int(arena.kv.lengths.max())
        check_room(rows, pool)
        self._copy_rows(arena, pool, slot, rows)
        pool.kv.row_meta[:, slot, :rows] = arena.kv.row_meta[:, 0, :rows]
        pool.kv.lengths[:, slot] = arena.kv.lengths[:, 0]
        every = np.broadcast_to(np.arange(rows), (self._text.layers, 1, rows))
        return Compressed(every, memory=memory)

    def _copy_rows(self, arena: Arena, pool: Pool, slot: int, rows: int) -> None:
        """Copy the arena's first ``rows`` keys and values into a slot."""
        source, target = arena.host_kv, pool.host_kv
        target.keys[:, slot, :, :rows] = source.keys[:, 0, :, :rows]
        target.values[:, slot, :, :rows] = source.values[:, 0, :, :rows]

    def _star_kv(
        self, arena: Arena, pool: Pool, slot: int, prompt: CacheRows, policy: KvPolicy, memory: StarKVMemory
    ) -> Compressed:
        request, pattern = self._prepare_star_kv(arena, pool, prompt, policy, memory)
        outputs = self._run(
            "compress",
            pool,
            {
                "k": arena.host_kv.keys,
                "v": arena.host_kv.values,
                "q_window": np.ascontiguousarray(arena.q_window[..., -request.window :, :]),
                **star_kv_inputs(arena, slot, request, pattern, memory),
            },
            ("new_len", "rows", "scores", "stages", "new_mi_ema", "new_pattern_ema", "new_temperature"),
        )
        result = star_kv_result(request, outputs, prompt.length)
        pool.kv.lengths[:, slot] = outputs["new_len"][:, 0]
        return result

    def _prepare_star_kv(
        self, arena: Arena, pool: Pool, prompt: CacheRows, policy: KvPolicy, memory: StarKVMemory
    ) -> tuple[StarKVRequest, NDArray[np.float32]]:
        """The request, and the pattern ``[L, 1, G, V]`` with room for the newest screenshot; marks the rows
        that are protected."""
        request = self._request(prompt, policy, memory.progress)
        check_room(request.most_rows, pool)
        arena.kv.row_meta[:, 0, : prompt.length] = request.prompt.marked(request.protected)
        pattern = memory.pattern_ema
        missing = max(1, request.frame.cells) - pattern.shape[-1]
        if missing > 0:
            pattern = np.pad(pattern, ((0, 0), (0, 0), (0, 0), (0, missing)))
        return request, np.ascontiguousarray(pattern)

    def _baseline(
        self,
        arena: Arena,
        pool: Pool,
        slot: int,
        prompt: PromptRows,
        policy: KvPolicy,
        memory: StarKVMemory | None,
    ) -> Compressed:
        def score_window(window: int) -> NDArray[np.float32]:
            feeds: dict[str, Array] = {
                "k": arena.host_kv.keys,
                "q_window": np.ascontiguousarray(arena.q_window[..., -window:, :]),
                "kv_len": arena.kv.lengths,
            }
            scores: NDArray[np.float32] = self._run("score_window", None, feeds, ("group_scores",))[
                "group_scores"
            ]
            return scores[:, 0, :, : prompt.length]

        choice = baselines.choose(policy, prompt, arena, score_window)
        check_room(max(choice.keep), pool)
        check_numbers(choice.scores)
        feeds: dict[str, Array] = {
            "k": arena.host_kv.keys,
            "v": arena.host_kv.values,
            "row_meta": arena.kv.row_meta,
            "priorities": baselines.priorities(choice, arena.kv.capacity),
            "keep": np.array(choice.keep, np.int64)[:, None],
            "slot": np.array([slot], np.int32),
        }
        outputs = self._run("compact", pool, feeds, ("new_len", "rows"))
        pool.kv.lengths[:, slot] = outputs["new_len"][:, 0]
        return Compressed(outputs["rows"][:, 0], choice.scores, memory=memory)

    def _run(
        self, graph: str, pool: Pool | None, feeds: dict[str, Array], wanted: tuple[str, ...]
    ) -> dict[str, Array]:
        """Run a graph on memory that stays where it is; the pool is destination and result at once."""
        session = self._session(graph)
        binding = session.io_binding()
        if pool is not None:
            buffers = {"k": pool.host_kv.keys, "v": pool.host_kv.values, "meta": pool.kv.row_meta}
            feeds |= {f"dst_{name}": buffer for name, buffer in buffers.items()}
        for name, array in feeds.items():
            bind_array(binding.bind_input, name, array)
        for name in wanted:
            binding.bind_output(name, "cpu")
        if pool is not None:
            for name, array in buffers.items():
                bind_array(binding.bind_output, f"new_{name}", array)
        session.run_with_iobinding(binding)
        return {name: value.numpy() for name, value in zip(wanted, binding.get_outputs(), strict=False)}


def star_kv_inputs(
    arena: Arena, slot: int, request: StarKVRequest, pattern: NDArray[np.float32], memory: StarKVMemory
) -> dict[str, Array]:
    """What the operator ``Compress`` takes beside caches and queries, by its names."""
    return {
        "hidden_norm": arena.hidden_norm,
        "kv_len": arena.kv.lengths,
        "row_meta": arena.kv.row_meta,
        "frame": request.frame.as_array(),
        "parameters": request.plan.as_array(),
        "limits": request.limits.as_array(),
        "mi_ema": memory.mi_ema,
        "pattern_ema": pattern,
        "temperature": memory.temperature,
        "slot": np.array([slot], np.int32),
    }


def star_kv_result(request: StarKVRequest, outputs: dict[str, Array], length: int) -> Compressed:
    """What the operator ``Compress`` put out for one sequence of so many rows.

    Raises:
        EngineError: scores are not numbers.
    """
    # [L,B,C] with B = 1: the one sequence stands for the one index set per layer.
    scores = outputs["scores"][..., :length]
    check_numbers(scores)
    after = StarKVMemory(
        request.progress, outputs["new_mi_ema"], outputs["new_pattern_ema"], outputs["new_temperature"]
    )
    return Compressed(outputs["rows"][:, 0], scores, outputs["stages"][:, 0, :, :length], after)


def check_prefilled(arena: Arena, rows: CacheRows) -> None:
    """Refuse rows that are not the arena's.

    Raises:
        UsageError: the arena holds more or fewer.
    """
    if (arena.kv.lengths[:, 0] != rows.lengths).any():
        held = int(arena.kv.lengths.max())
        raise UsageError(f"the arena holds {held} rows, the prompt {rows.length}; prefill it whole")


def check_room(rows: int, pool: Pool) -> None:
    if rows > pool.kv.capacity:
        raise UsageError(f"{rows} kept rows do not fit a slot of {pool.kv.capacity}")


def check_numbers(scores: NDArray[np.float32]) -> None:
    bad = np.isnan(scores).any(axis=tuple(range(1, scores.ndim)))
    if bad.any():
        layer = int(np.flatnonzero(bad)[0])
        raise EngineError(
            f"KV scores of layer {layer} are not numbers: the model's keys or queries overflowed; "
            "try another quantization"
        )
