# SPDX-License-Identifier: Apache-2.0
"""Every rule of the fake CUDA, broken on purpose."""

import numpy as np
import pytest
from fake_cuda import ALIGNMENT, CudaMisuseError, FakeCuda

from starkv.errors import EngineError
from starkv.runtime.engines.cuda import Cuda


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(total=1 << 20)


def test_it_is_what_engines_need(cuda: FakeCuda) -> None:
    card: Cuda = cuda
    assert card.allocate(10) % ALIGNMENT == 0
    assert card.memory() == ((1 << 20) - 10, 1 << 20)


# --- memory ---


def test_memory_ends(cuda: FakeCuda) -> None:
    cuda.allocate(1 << 19)
    assert cuda.reserve(1 << 18)
    assert not cuda.reserve(1 << 19)
    with pytest.raises(EngineError, match="out of memory: 524288 bytes asked for, 262144 free"):
        cuda.allocate(1 << 19)


def test_memory_is_freed_once_and_never_used_again(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(64)
    cuda.free(block)
    assert cuda.in_use == 0
    assert cuda.peak == 64
    with pytest.raises(CudaMisuseError, match="freed twice"):
        cuda.free(block)
    with pytest.raises(CudaMisuseError, match="was freed"):
        cuda.clear(block, 64, stream)


def test_memory_that_is_freed_before_work_begins_is_not_used(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(1024)
    cuda.clear(block, 1024, stream)
    with pytest.raises(CudaMisuseError, match="while work is queued"):
        cuda.free(block)


def test_leaks_say_where_they_are_from(cuda: FakeCuda) -> None:
    cuda.allocate(100)
    (leak,) = cuda.leaks()
    assert leak.startswith("100 bytes from ")
    assert "test_fake_cuda.py:" in leak


@pytest.mark.parametrize("size", [25, 1025])
def test_copies_stay_within_one_allocation(cuda: FakeCuda, size: int) -> None:
    stream, block, other = cuda.new_stream(), cuda.allocate(1024), cuda.allocate(4096)
    start = block + 1024 - 24 if size == 25 else block
    array = np.zeros(size, np.uint8)
    for act in (
        lambda: cuda.upload(start, array, stream),
        lambda: cuda.download(array, start, stream),
        lambda: cuda.clear(start, size, stream),
        lambda: cuda.copy(start, size, other, size, size, 1, stream),
    ):
        with pytest.raises(CudaMisuseError, match="not in one allocation"):
            act()


def test_arrays_are_contiguous(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(64)
    array = np.zeros((4, 4), np.float32).T
    for act in (cuda.upload, lambda target, source, stream: cuda.download(source, target, stream)):
        with pytest.raises(CudaMisuseError, match="not contiguous"):
            act(block, array[:, :2], stream)


def test_runs_are_copied(cuda: FakeCuda) -> None:
    stream, source, target = cuda.new_stream(), cuda.allocate(16), cuda.allocate(16)
    cuda.upload(source, np.arange(16, dtype=np.uint8), stream)
    cuda.clear(target, 16, stream)
    cuda.copy(target, 4, source, 8, 2, 2, stream)
    result = np.empty(16, np.uint8)
    cuda.download(result, target, stream)
    cuda.synchronize(stream)
    assert result.tolist() == [0, 1, 0, 0, 8, 9, *[0] * 10]


def test_a_copy_is_of_something_and_not_onto_itself(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(64)
    with pytest.raises(CudaMisuseError, match="copy of nothing"):
        cuda.copy(block, 4, block, 4, 4, 0, stream)
    with pytest.raises(CudaMisuseError, match="wider than their distance"):
        cuda.copy(block, 4, block + 32, 4, 8, 2, stream)
    for shift, height in ((0, 1), (4, 1), (8, 2), (10, 2), (14, 2)):
        with pytest.raises(CudaMisuseError, match="onto itself"):
            cuda.copy(block + shift, 8, block, 8, 8, height, stream)
    cuda.copy(block + 4, 8, block, 8, 4, 4, stream)
    cuda.copy(block + 16, 8, block, 8, 8, 2, stream)
    cuda.synchronize(stream)


# --- streams ---


def test_work_waits(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(4)
    cuda.clear(block, 4, stream)
    result = np.zeros(4, np.uint8)
    cuda.download(result, block, stream)
    assert (result == 0x7F).all()
    cuda.synchronize(stream)
    assert (result == 0).all()


def test_streams_exist_and_have_numbers(cuda: FakeCuda) -> None:
    block = cuda.allocate(4)
    with pytest.raises(CudaMisuseError, match="default stream"):
        cuda.clear(block, 4, 0)
    with pytest.raises(CudaMisuseError, match="does not exist"):
        cuda.clear(block, 4, 1)


def test_two_streams_need_a_wait_between(cuda: FakeCuda) -> None:
    one, two, block = cuda.new_stream(), cuda.new_stream(), cuda.allocate(8)
    result = np.zeros(4, np.uint8)
    cuda.clear(block, 4, one)
    cuda.clear(block + 4, 4, two)
    for act in (lambda: cuda.download(result, block, two), lambda: cuda.clear(block + 2, 4, two)):
        with pytest.raises(CudaMisuseError, match="on two streams, and nobody waits"):
            act()
    cuda.synchronize(one)
    cuda.download(result, block, two)
    cuda.download(result.copy(), block, one)
    with pytest.raises(CudaMisuseError, match="clear and download touch the same memory"):
        cuda.clear(block, 4, one)


def test_what_fails_on_a_stream_ends_it(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(4)

    def fail() -> None:
        raise CudaMisuseError("wrong")

    cuda.submit(stream, fail, "fail")
    cuda.clear(block, 4, stream)
    with pytest.raises(CudaMisuseError, match="wrong"):
        cuda.synchronize(stream)
    cuda.free(block)


def test_pinned_memory_is_read_late_and_ordinary_memory_at_once(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(16)
    late, early = cuda.allocate_pinned((4,), np.int32), np.zeros(4, np.int32)
    for array, expected in ((late, 7), (early, 0)):
        cuda.upload(block, array, stream)
        array[:] = 7
        result = np.zeros(4, np.int32)
        cuda.download(result, block, stream)
        cuda.synchronize(stream)
        assert (result == expected).all()


# --- graphs ---


def test_a_capture_takes_no_ordinary_memory_and_no_waits(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(16)
    ordinary = np.zeros(4, np.int32)
    cuda.begin_capture(stream)
    for act in (lambda: cuda.upload(block, ordinary, stream), lambda: cuda.download(ordinary, block, stream)):
        with pytest.raises(CudaMisuseError, match="ordinary memory"):
            act()
    for act in (lambda: cuda.allocate(1), lambda: cuda.synchronize(stream)):
        with pytest.raises(CudaMisuseError, match="while a graph is captured"):
            act()
    with pytest.raises(CudaMisuseError, match="captured twice"):
        cuda.begin_capture(stream)
    cuda.end_capture(stream)
    with pytest.raises(CudaMisuseError, match="did not begin"):
        cuda.end_capture(stream)


def test_a_graph_is_launched_with_the_memory_of_then(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(4)
    source, result = cuda.allocate_pinned((4,), np.uint8), np.zeros(4, np.uint8)
    cuda.begin_capture(stream)
    cuda.upload(block, source, stream)
    graph = cuda.end_capture(stream)
    for number in (3, 5):
        source[:] = number
        cuda.launch(graph, stream)
        cuda.download(result, block, stream)
        cuda.synchronize(stream)
        assert (result == number).all()
    # Destroyed when it has run.
    cuda.launch(graph, stream)
    source[:] = 9
    cuda.destroy_graph(graph)
    cuda.download(result, block, stream)
    cuda.synchronize(stream)
    assert (result == 9).all()


def test_a_launch_touches_what_was_recorded(cuda: FakeCuda) -> None:
    one, two, block = cuda.new_stream(), cuda.new_stream(), cuda.allocate(4)
    cuda.begin_capture(one)
    cuda.clear(block, 4, one)
    graph = cuda.end_capture(one)
    cuda.launch(graph, one)
    with pytest.raises(CudaMisuseError, match="download and launch touch the same memory"):
        cuda.download(np.zeros(4, np.uint8), block, two)


def test_everything_is_counted(cuda: FakeCuda) -> None:
    stream, block = cuda.new_stream(), cuda.allocate(8)
    with cuda.counted():
        cuda.upload(block, np.zeros(8, np.uint8), stream)
        cuda.download(np.zeros(4, np.uint8), block, stream)
    assert (cuda.uploads, cuda.downloads, cuda.launches) == ([8], [4], 0)
