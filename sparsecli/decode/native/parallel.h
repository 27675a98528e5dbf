// Work in parts, a thread each, for functions that are called seldom and keep no threads.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsecli {

// part(0) to part(threads - 1) at the same time.
template <class Part>
void in_parallel(int64_t threads, const Part& part) {
    std::vector<std::thread> others;
    for (int64_t number = 1; number < threads; ++number) others.emplace_back(part, number);
    part(0);
    for (std::thread& other : others) other.join();
}

}  // namespace sparsecli
