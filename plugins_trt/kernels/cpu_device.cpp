// SPDX-License-Identifier: Apache-2.0
// Fibers, barriers and warp exchanges of cpu_device.h.

#include "cpu_device.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

// Switching stacks by hand takes nanoseconds, swapcontext a system call or two. Sanitizers know only the
// latter.
#if (defined(__x86_64__) || defined(__aarch64__)) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define STARKV_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace starkv::cpu_device {

thread_local Position position;

void die(const char* message) {
    std::fprintf(stderr, "starkv cpu device: %s (block %u,%u,%u)\n", message, position.block.x,
                 position.block.y, position.block.z);
    std::abort();
}

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr int kWarpSize = 32;

struct Fiber {
    std::unique_ptr<unsigned char[]> stack;
#if STARKV_OWN_SWITCH
    void* stack_pointer = nullptr;
#else
    ucontext_t context{};
#endif
    bool finished = false;
};

// A barrier that all living threads of a group must reach; `round` counts how often they did.
struct Barrier {
    int expected = 0;
    int arrived = 0;
    unsigned round = 0;

    void open_if_complete() {
        if (arrived == expected && expected > 0) {
            arrived = 0;
            ++round;
        }
    }
    void leave() {
        --expected;
        open_if_complete();
    }
};

struct Warp {
    Barrier barrier;
    // Two buffers in turn: a thread may give its next value while others still read the last one.
    alignas(16) unsigned char values[2][kWarpSize * kMostBytes];
};

struct Block {
    const std::function<void()>* kernel = nullptr;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<unsigned> exchanges;
    Barrier barrier;
    std::vector<unsigned char> shared;
    unsigned char* shared_start = nullptr;
    unsigned progress = 0;
    int running = 0;
};
thread_local Block block;

#if STARKV_OWN_SWITCH

thread_local void* scheduler_stack_pointer;

extern "C" void starkv_switch_stack(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.local starkv_switch_stack
.type starkv_switch_stack, @function
starkv_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
)");
constexpr int kSavedWords = 6;
#else
asm(R"(
.text
.local starkv_switch_stack
.type starkv_switch_stack, %function
starkv_switch_stack:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#endif

void to_scheduler() {
    starkv_switch_stack(&block.fibers[static_cast<size_t>(block.running)].stack_pointer,
                        scheduler_stack_pointer);
}
void to_fiber(Fiber& fiber) { starkv_switch_stack(&scheduler_stack_pointer, fiber.stack_pointer); }

#else

thread_local ucontext_t scheduler_context;

void to_scheduler() {
    swapcontext(&block.fibers[static_cast<size_t>(block.running)].context, &scheduler_context);
}
void to_fiber(Fiber& fiber) { swapcontext(&scheduler_context, &fiber.context); }

#endif

void run_thread() {
    (*block.kernel)();
    const auto index = static_cast<size_t>(block.running);
    block.fibers[index].finished = true;
    ++block.progress;
    block.barrier.leave();
    block.warps[index / kWarpSize].barrier.leave();
    to_scheduler();
}

void prepare(Fiber& fiber) {
    if (!fiber.stack) fiber.stack = std::make_unique<unsigned char[]>(kStackBytes);
    fiber.finished = false;
#if STARKV_OWN_SWITCH
    auto top = reinterpret_cast<uintptr_t>(fiber.stack.get() + kStackBytes) & ~uintptr_t{15};
    auto* words = reinterpret_cast<void**>(top);
#if defined(__x86_64__)
    // After `ret` the stack is as after a call: 8 bytes off a multiple of 16.
    *--words = nullptr;
    *--words = reinterpret_cast<void*>(&run_thread);
    words -= kSavedWords;
    std::fill(words, words + kSavedWords, nullptr);
#else
    words -= 20;
    std::fill(words, words + 20, nullptr);
    words[11] = reinterpret_cast<void*>(&run_thread);
#endif
    fiber.stack_pointer = words;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_thread, 0);
#endif
}

// Waits until `barrier` opens. Only the scheduler notices that it never will.
void wait(Barrier& barrier) {
    const unsigned round = barrier.round;
    ++barrier.arrived;
    ++block.progress;
    barrier.open_if_complete();
    while (barrier.round == round) to_scheduler();
}

std::vector<int> thread_order(int threads) {
    std::vector<int> order(static_cast<size_t>(threads));
    std::iota(order.begin(), order.end(), 0);
    const char* schedule = std::getenv("STARKV_CPU_SCHEDULE");
    if (schedule && !std::strcmp(schedule, "reverse")) std::reverse(order.begin(), order.end());
    if (schedule && !std::strcmp(schedule, "shuffle")) {
        std::mt19937 random(1);
        std::shuffle(order.begin(), order.end(), random);
    }
    return order;
}

void run_block(int threads, const std::vector<int>& order) {
    std::fill(block.shared.begin(), block.shared.end(), static_cast<unsigned char>(0xCD));
    block.barrier = {threads, 0, 0};
    for (size_t warp = 0; warp < block.warps.size(); ++warp) {
        const int members = std::min(kWarpSize, threads - static_cast<int>(warp) * kWarpSize);
        block.warps[warp].barrier = {members, 0, 0};
    }
    std::fill(block.exchanges.begin(), block.exchanges.end(), 0U);
    for (int thread = 0; thread < threads; ++thread) prepare(block.fibers[static_cast<size_t>(thread)]);
    for (int left = threads; left > 0;) {
        const unsigned before = block.progress;
        for (const int thread : order) {
            Fiber& fiber = block.fibers[static_cast<size_t>(thread)];
            if (fiber.finished) continue;
            block.running = thread;
            position.thread = dim3(static_cast<unsigned>(thread));
            to_fiber(fiber);
            if (fiber.finished) --left;
        }
        if (left > 0 && block.progress == before)
            die("a barrier or warp function that not all threads reach");
    }
}

}  // namespace

void run(dim3 grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
    constexpr size_t kMostSharedBytes = 227 * 1024;
    if (threads < 1 || threads > 1024) die("a block has 1 to 1024 threads");
    if (shared_bytes > kMostSharedBytes) die("more shared memory than any GPU has");
    block.kernel = &kernel;
    if (block.fibers.size() < static_cast<size_t>(threads)) block.fibers.resize(static_cast<size_t>(threads));
    block.warps.resize(static_cast<size_t>((threads + kWarpSize - 1) / kWarpSize));
    block.exchanges.resize(static_cast<size_t>(threads));
    block.shared.resize(shared_bytes + 16);
    const auto start = (reinterpret_cast<uintptr_t>(block.shared.data()) + 15) & ~uintptr_t{15};
    block.shared_start = reinterpret_cast<unsigned char*>(start);
    position.block_size = dim3(static_cast<unsigned>(threads));
    position.grid_size = grid;
    const std::vector<int> order = thread_order(threads);
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                position.block = dim3(x, y, z);
                run_block(threads, order);
            }
}

void* shared_memory() { return block.shared_start; }

void block_barrier() { wait(block.barrier); }

const unsigned char* exchange(const void* value, size_t bytes) {
    const auto thread = static_cast<size_t>(block.running);
    Warp& warp = block.warps[thread / kWarpSize];
    unsigned char* values = warp.values[block.exchanges[thread]++ % 2];
    std::memcpy(values + (thread % kWarpSize) * kMostBytes, value, bytes);
    wait(warp.barrier);
    return values;
}

}  // namespace starkv::cpu_device
