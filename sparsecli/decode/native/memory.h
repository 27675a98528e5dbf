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
    ~Buffer() { release(); }

    T* row(int64_t index) const { return data + index * stride; }

    // Zeros, or NaN with `poison`: for tests, in buffers that a computation writes before it reads. Large buffers come
    // from the system directly, which clears pages when they are first used.
    void bytes(int64_t size, bool poison) {
        release();
        if (size == 0) return;
#if defined(__linux__)
        constexpr int64_t HUGE_PAGE = int64_t(1) << 21;
        if (size >= HUGE_PAGE) {
            void* pages = mmap(nullptr, size_t(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (pages == MAP_FAILED) throw std::bad_alloc();
            madvise(pages, size_t(size), MADV_HUGEPAGE);
            data = (T*)pages;
            mapped_ = size;
        }
#endif
        if (!data) data = (T*)std::aligned_alloc(64, size_t((size + 63) / 64 * 64));
        if (!data) throw std::bad_alloc();
        if (!mapped_ || poison) std::memset((void*)data, poison ? 0xff : 0, size_t(size));
    }

    // `count` rows of `width` values, `step` apart; the padding between them stays zero.
    void rows(int64_t count, int64_t width, int64_t step, bool poison) {
        bytes(count * step * int64_t(sizeof(T)), false);
        stride = step;
        if (poison && width)
            for (int64_t i = 0; i < count; ++i) std::memset((void*)row(i), 0xff, size_t(width) * sizeof(T));
    }

  private:
    void release() {
#if defined(__linux__)
        if (mapped_) munmap((void*)data, size_t(mapped_));
#endif
        if (!mapped_) std::free(data);
        data = nullptr;
        mapped_ = 0;
    }

    int64_t mapped_ = 0;
};

}  // namespace sparsecli
