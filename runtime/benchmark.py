# SPDX-License-Identifier: Apache-2.0
"""Measure an engine: prefill, decode, vision, and the memory bandwidth that bounds decode."""

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from starkv.errors import UsageError
from starkv.host import usable_processors
from starkv.manifest import read_manifest
from starkv.methods.names import FULL
from starkv.methods.rows import prompt_rows
from starkv.runtime.engines.base import Engine, Rope, packs
from starkv.runtime.engines.cuda_driver import CudaDevice
from starkv.runtime.generation import Sampler, SamplingParameters
from starkv.runtime.kv.policy import KvPolicy
from starkv.runtime.preprocess.image import preprocess
from starkv.runtime.preprocess.positions import text_positions

ON_GPU = ("ort-cuda", "trt")
"""Backends of engines whose weights and cache lie in a GPU's memory."""
_TEXT_ROWS = 40
"""Rows of text around the screenshot of a compressed prompt."""


@dataclass(frozen=True)
class Measurement:
    """One row of the table. Rates are tokens per second of each repetition."""

    test: str
    """``pp512``, ``tg128``, ``pp512 @ d4096`` as in llama-bench; ``vit224x224`` for the vision tower,
    ``kv4096→819`` for compressing a cache. Decode behind a compressed cache is ``tg128 @ d4096→819``."""
    rates: tuple[float, ...]
    kv_mib: float
    """KV memory of the valid rows at the end."""
    peak_mib: float
    """Highest resident memory of the process so far; with an engine on a GPU, what of the card's memory is in
    use."""
    bytes_per_token: float | None
    """Weights and KV rows that a decode step has to read; None for tests bound by compute."""

    @property
    def mean(self) -> float:
        return statistics.mean(self.rates)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    def roofline_share(self, bandwidth: float) -> float | None:
        """Share of the rate that ``bandwidth`` bytes per second would allow."""
        return self.mean * self.bytes_per_token / bandwidth if self.bytes_per_token else None


def memory_bandwidth(mib: int = 1024, repetitions: int = 3) -> float:
    """Bytes per second that all usable processors together read from memory; the best of a few tries.

    The array is far larger than any cache.
    """
    threads = usable_processors()
    blocks = np.array_split(np.ones(mib * 2**20 // 4, np.float32), threads)

    def sweep(block: np.ndarray) -> None:
        # numpy's dot releases the interpreter's lock and does next to nothing but read.
        np.dot(block, block)

    best = float("inf")
    with ThreadPoolExecutor(threads) as workers:
        for _ in range(repetitions):
            started = time.perf_counter()
            list(workers.map(sweep, blocks))
            best = min(best, time.perf_counter() - started)
    return sum(block.nbytes for block in blocks) / best


def peak_mib() -> float:
    """Highest resident memory of this process in MiB."""
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def bandwidth_of(engine: Engine) -> float:
    """Bytes per second that bound decode where the engine runs."""
    return CudaDevice().copy_bandwidth() if engine.info.backend in ON_GPU else memory_bandwidth()


def peak_of(engine: Engine) -> float:
    """``Measurement.peak_mib``."""
    return CudaDevice().memory_in_use() / 2**20 if engine.info.backend in ON_GPU else peak_mib()


def decoder_bytes(engine_directory: Path) -> int:
    """Bytes of weights that one decode step reads."""
    build = read_manifest(engine_directory).tensorrt
    if build is not None:
        return build.weight_bytes["decoder"]
    return (engine_directory / "decoder.data").stat().st_size


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Benchmark:
    """Runs the tests on one engine with random embeddings: speed does not depend on their values."""

    def __init__(
        self, engine: Engine, weight_bytes: int, repetitions: int, policy: KvPolicy | None = None
    ) -> None:
        self._engine, self._weight_bytes, self._repetitions = engine, weight_bytes, repetitions
        self._policy = policy or KvPolicy()
        self._packed = packs(engine.info, self._policy)
        self._random = np.random.default_rng(0)

    def _inputs(self, rows: int, start: int) -> tuple[np.ndarray, Rope]:
        text = self._engine.manifest.text
        embeds = self._random.standard_normal((rows, text.hidden), np.float32) * 0.02
        return embeds, Rope.at(text_positions(rows, start).values, text)

    def prefill(self, tokens: int, depth: int) -> Measurement:
        """Prefill ``tokens`` rows behind ``depth`` rows."""
        arena = self._engine.new_arena(depth + tokens)
        embeds, rope = self._inputs(tokens, depth)

        def once() -> None:
            arena.kv.lengths[:] = depth
            self._engine.prefill(arena, embeds, rope)

        once()
        rates = tuple(tokens / _timed(once) for _ in range(self._repetitions))
        return self._row(f"pp{tokens}", depth, rates, arena.kv.bytes_held, None)

    def compress(self, rows: int) -> Measurement:
        """Compress a prompt of ``rows`` rows, most of them one screenshot; counts the rows before."""
        engine, policy = self._engine, self._policy
        side = int(max(0, rows - _TEXT_ROWS) ** 0.5)
        spans, grids = ([(_TEXT_ROWS // 2, _TEXT_ROWS // 2 + side**2)], [(side, side)]) if side else ([], [])
        prompt = prompt_rows(rows, spans, grids, range(_TEXT_ROWS // 2) if side else ())
        arena = engine.new_arena(rows)
        engine.prefill(arena, *self._inputs(rows, 0))
        pool = engine.new_pool(1, engine.most_kept_rows(rows, policy), policy.method, self._packed)
        handle = pool.acquire()

        def once() -> None:
            engine.compress(arena, pool, handle, prompt, policy)

        once()
        rates = tuple(rows / _timed(once) for _ in range(self._repetitions))
        name = f"kv{rows}→{policy.kept_rows(rows)}"
        return self._row(name, 0, rates, pool.kv.bytes_held, None)

    def decode(self, tokens: int, depth: int) -> Measurement:
        """Decode ``tokens`` rows, one at a time, behind what the policy keeps of ``depth`` rows.

        Tokens are picked where a reply picks them, the likeliest.
        """
        kept = self._policy.kept_rows(depth) if depth else 0
        pool = self._engine.new_pool(1, kept + tokens, packed=self._packed)
        pool.acquire()
        embeds, rope = self._inputs(1, depth)
        samplers = [Sampler(SamplingParameters())]

        def once() -> None:
            pool.kv.count_rows(kept)
            for _ in range(tokens):
                self._engine.decode_tokens(pool, embeds, rope, samplers)

        once()
        rates = tuple(tokens / _timed(once) for _ in range(self._repetitions))
        held = pool.kv.bytes_held
        pool.kv.count_rows(kept)
        kv_bytes = (pool.kv.bytes_held + held) / 2
        name = f"tg{tokens} @ d{depth}→{kept}" if kept < depth else f"tg{tokens}"
        depth = 0 if kept < depth else depth
        return self._row(name, depth, rates, held, self._weight_bytes + kv_bytes)

    def vision(self, width: int, height: int) -> Measurement:
        """Encode one screenshot; counts image tokens."""
        manifest = self._engine.manifest
        noise = self._random.integers(0, 256, (height, width, 3), np.uint8)
        image = preprocess(Image.fromarray(noise), manifest.vision, manifest.image)
        tokens = len(self._engine.encode_image(image))

        def once() -> None:
            self._engine.encode_image(image)

        rates = tuple(tokens / _timed(once) for _ in range(self._repetitions))
        return self._row(f"vit{image.resized_width}x{image.resized_height}", 0, rates, 0, None)

    def _row(
        self, test: str, depth: int, rates: tuple[float, ...], kv_bytes: int, bytes_per_token: float | None
    ) -> Measurement:
        name = f"{test} @ d{depth}" if depth else test
        return Measurement(name, rates, kv_bytes / 2**20, peak_of(self._engine), bytes_per_token)

    def run(
        self, prompts: list[int], generated: list[int], depths: list[int], screen: tuple[int, int] | None
    ) -> Iterator[Measurement]:
        """All tests, each as soon as it is measured; none of zero tokens.

        Raises:
            UsageError: a test needs more rows than the engine was built for.
        """
        limit, most = self._engine.manifest.max_context, max(depths) + max([*prompts, *generated])
        if most > limit:
            raise UsageError(
                f"{most} KV rows are needed, but {self._engine.manifest.name} was built for {limit} at most"
            )
        if screen:
            yield self.vision(*screen)
        for depth in depths:
            for tokens in filter(None, prompts):
                yield self.prefill(tokens, depth)
                if self._policy.method != FULL:
                    yield self.compress(depth + tokens)
            for tokens in filter(None, generated):
                yield self.decode(tokens, depth)
