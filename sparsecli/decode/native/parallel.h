// Threads for functions that are called seldom and keep none, and what every kind of thread needs.
#pragma once
#include <cstdint>
#include <thread>
#include <vector>

namespace sparsecli {

// A pause between two looks at what another thread writes.
inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// part(0) to part(threads - 1) at the same time.
template <class Part>
void in_parallel(int64_t threads, const Part& part) {
    std::vector<std::thread> others;
    for (int64_t number = 1; number < threads; ++number) others.emplace_back(part, number);
    part(0);
    for (std::thread& other : others) other.join();
}

}  // namespace sparsecli
