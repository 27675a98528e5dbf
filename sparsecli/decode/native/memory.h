// Working memory: aligned for the widest vectors, in huge pages where it is large.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace sparsecli {

template <class T>
struct Buffer {
    T* data = nullptr;
    int64_t stride = 0;

    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data(other.data), stride(other.stride) { other.data = nullptr; }
    ~Buffer() { std::free(data); }

    T* row(int64_t index) const { return data + index * stride; }

    // Zeros; with `poison`, everything that a computation has to write before it is read is NaN.
    void bytes(int64_t size, bool poison) {
        constexpr int64_t HUGE = int64_t(1) << 21;
        const int64_t alignment = size >= HUGE ? HUGE : 64;
        std::free(data);
        data = nullptr;
        if (size == 0) return;
        data = (T*)std::aligned_alloc(size_t(alignment), size_t((size + alignment - 1) / alignment * alignment));
        if (!data) throw std::bad_alloc();
#if defined(__linux__)
        if (size >= HUGE) madvise(data, size_t(size), MADV_HUGEPAGE);
#endif
        std::memset((void*)data, poison ? 0xff : 0, size_t(size));
    }

    // `count` rows of `width` values, `step` apart; what lies between stays zero.
    void rows(int64_t count, int64_t width, int64_t step, bool poison) {
        bytes(count * step * int64_t(sizeof(T)), false);
        stride = step;
        if (poison)
            for (int64_t i = 0; i < count; ++i) std::memset((void*)row(i), 0xff, size_t(width) * sizeof(T));
    }
};

}  // namespace sparsecli
