// SPDX-License-Identifier: Apache-2.0
// Which block of the window scores' launch does what, and in which order.
//
// Every key is needed twice: for the softmax's statistics, then for the mass that each row gets. A row of
// tasks interleaves the two, so that the second use follows while the keys are still in the L2 cache: after
// the statistics of unit u + lag comes the mass of unit u. (A unit is a block of queries with all rows of its
// KV head.) Blocks draw numbers, so a task only ever waits for tasks that blocks have begun before it.
#pragma once

#include "compress_view.h"

namespace starkv {

// Statistics tasks between the two uses of a unit: about as many as a large GPU runs at once, so that waiting
// is rare, and few enough that their keys (64 KiB each at D = 128) fit its L2 cache.
constexpr int kTasksBetween = 264;

struct ScoreTask {
    bool statistics;  // otherwise mass
    int unit, chunk;
};

__host__ __device__ inline int score_lag(int units, int chunks) {
    const int lag = ceil_div(kTasksBetween, chunks);
    return lag < units ? lag : units;
}

__host__ __device__ inline ScoreTask score_task(int number, int units, int chunks) {
    const int lag = score_lag(units, chunks), first = lag * chunks, middle = 2 * (units - lag) * chunks;
    if (number < first) return {true, number / chunks, number % chunks};
    number -= first;
    if (number >= middle) {
        number -= middle;
        return {false, units - lag + number / chunks, number % chunks};
    }
    const int pair = number / (2 * chunks), within = number % (2 * chunks);
    if (within < chunks) return {true, lag + pair, within};
    return {false, pair, within - chunks};
}

}  // namespace starkv
