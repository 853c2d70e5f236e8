// SPDX-License-Identifier: Apache-2.0
// Checks that go on after a failure, so that one run shows all of them.
#pragma once

#include <cstdio>
#include <sstream>
#include <string>

namespace starkv::tests {

inline int& failure_count() {
    static int count = 0;
    return count;
}

inline void fail(const char* file, int line, const std::string& what) {
    ++failure_count();
    std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

template <class Given, class Wanted>
void check_equal(const Given& given, const Wanted& wanted, const char* expression, const char* file,
                 int line) {
    if (given == wanted) return;
    std::ostringstream text;
    text << expression << " is " << given << ", not " << wanted;
    fail(file, line, text.str());
}

}  // namespace starkv::tests

#define CHECK(condition)                                                                      \
    do {                                                                                      \
        if (!(condition)) ::starkv::tests::fail(__FILE__, __LINE__, "not true: " #condition); \
    } while (false)

#define CHECK_EQUAL(given, wanted) ::starkv::tests::check_equal(given, wanted, #given, __FILE__, __LINE__)

// For what later checks cannot do without.
#define REQUIRE(condition)                                                      \
    do {                                                                        \
        if (!(condition)) {                                                     \
            ::starkv::tests::fail(__FILE__, __LINE__, "not true: " #condition); \
            return;                                                             \
        }                                                                       \
    } while (false)
