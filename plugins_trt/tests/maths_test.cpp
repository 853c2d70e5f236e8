// SPDX-License-Identifier: Apache-2.0
// The kernels' arithmetic that needs no threads, against plain definitions of it.

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

#include "check.h"
#include "elements.h"
#include "group_memory.cuh"
#include "layer_budgets.cuh"
#include "radix.h"
#include "score_tasks.h"

namespace {

using namespace starkv;

// Numbers of 16 bits by their definition: sign, exponent, fraction.
double value_of(uint16_t bits, int exponent_bits, int fraction_bits) {
    const int exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1);
    const int fraction = bits & ((1 << fraction_bits) - 1), bias = (1 << (exponent_bits - 1)) - 1;
    const double sign = bits >> 15 ? -1.0 : 1.0;
    if (exponent == (1 << exponent_bits) - 1)
        return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * INFINITY;
    const double significand = std::ldexp(fraction, -fraction_bits) + (exponent ? 1.0 : 0.0);
    return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias);
}

template <class T>
void check_conversions(int exponent_bits, int fraction_bits) {
    const auto exact = [&](int bits) {
        return value_of(static_cast<uint16_t>(bits), exponent_bits, fraction_bits);
    };
    const int infinity = ((1 << exponent_bits) - 1) << fraction_bits;
    for (int bits = 0; bits < 1 << 16; ++bits) {
        const float value = to_float(T{static_cast<uint16_t>(bits)});
        const bool is_number = (bits & 0x7fff) <= infinity;
        CHECK(is_number ? value == exact(bits) : value != value);
        if (is_number) CHECK(from_float<T>(value).bits == bits);
    }
    CHECK((from_float<T>(std::nanf("")).bits & 0x7fff) > infinity);
    // Between two neighbours: to the nearest, from the middle to the even one.
    for (int bits = 0; bits + 1 < infinity; ++bits) {
        const double low = exact(bits), high = exact(bits + 1), middle = (low + high) / 2;
        const auto rounded = [](double value) { return from_float<T>(static_cast<float>(value)).bits; };
        CHECK(rounded(middle) == bits + bits % 2);
        CHECK(rounded(std::nextafterf(static_cast<float>(middle), 0.0F)) == bits);
        CHECK(rounded(std::nextafterf(static_cast<float>(middle), INFINITY)) == bits + 1);
        CHECK(rounded(-middle) == ((bits + bits % 2) | 0x8000));
    }
    const auto largest = static_cast<float>(exact(infinity - 1));
    CHECK(from_float<T>(largest).bits == infinity - 1);
    CHECK(from_float<T>(std::numeric_limits<float>::max()).bits == infinity);
    CHECK(from_float<T>(-INFINITY).bits == (infinity | 0x8000));
    CHECK(pack<T>(1.0F, -2.0F) == (from_float<T>(1.0F).bits | uint32_t{from_float<T>(-2.0F).bits} << 16));
}

void check_order() {
    const std::vector<float> ascending = {-INFINITY, -3e38F, -1.5F, -1e-40F, 0.0F,
                                          1e-40F,    2.0F,   3e38F, INFINITY};
    for (size_t i = 1; i < ascending.size(); ++i) {
        CHECK(ordered_key(ascending[i - 1]) < ordered_key(ascending[i]));
        CHECK(sort_key(ordered_key(ascending[i - 1]), 9) < sort_key(ordered_key(ascending[i]), 3));
    }
    CHECK(ordered_key(-0.0F) == ordered_key(0.0F));
    CHECK(sort_key(7, 3) < sort_key(7, 4));
    CHECK(sort_key(0xffffffffU, (1 << kRowBits) - 1) < kAboveAll);
}

void check_bins() {
    for (const int count : {2, 7, 15, 16, 17, 144, 145, 2691, 10549})
        for (int bin = 1; bin < kValueBins; ++bin) {
            const int rank = first_rank(bin, count);
            CHECK(static_cast<int64_t>(rank) * kValueBins / count >= bin);
            CHECK(static_cast<int64_t>(rank - 1) * kValueBins / count < bin);
        }
    for (const int positions : {1, 5, 12, 39, 77, 400})
        for (int position = 0; position < positions; ++position)
            CHECK(place_bin(position, positions) == static_cast<int>(12.0 * (position + 0.5) / positions));
    CHECK(place_of(3 * 7 + 6, 5, 7) == place_bin(3, 5) * 12 + place_bin(6, 7));
    CHECK(information_term(0, 3, 4, 12) == 0.0);
    CHECK(std::fabs(information_term(1, 3, 4, 12)) < 1e-9);
    CHECK(std::fabs(information_term(2, 2, 2, 4) - 0.5 * std::log(2.0)) < 1e-9);
}

// Every task is given out once, and a unit's mass only after all of its statistics.
void check_tasks(int units, int chunks) {
    std::vector<int> statistics(static_cast<size_t>(units)), mass(static_cast<size_t>(units));
    for (int number = 0; number < 2 * units * chunks; ++number) {
        const ScoreTask task = score_task(number, units, chunks);
        CHECK(task.unit >= 0 && task.unit < units);
        const auto unit = static_cast<size_t>(task.unit);
        if (task.statistics) {
            CHECK(task.chunk == statistics[unit]++);
        } else {
            CHECK(statistics[unit] == chunks);
            CHECK(task.chunk == mass[unit]++);
        }
    }
    for (int unit = 0; unit < units; ++unit) CHECK(mass[static_cast<size_t>(unit)] == chunks);
}

void check_shares() {
    CHECK(share_at(2.0, 3.0, 1.0, 10.0) == 6.0);
    CHECK(share_at(0.1, 3.0, 1.0, 10.0) == 1.0);
    CHECK(share_at(9.0, 3.0, 1.0, 10.0) == 10.0);
}

}  // namespace

int main() {
    check_conversions<starkv::Half>(5, 10);
    check_conversions<starkv::BFloat16>(8, 7);
    check_order();
    check_bins();
    for (const int units : {1, 2, 5, 112}) {
        check_tasks(units, 1);
        check_tasks(units, 54);
        check_tasks(units, 300);
    }
    check_shares();
    const int failures = starkv::tests::failure_count();
    std::printf("maths: %d failures\n", failures);
    return failures ? 1 : 0;
}
