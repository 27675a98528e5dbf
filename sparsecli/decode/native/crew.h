// Threads and working memory of operations that are called one at a time, from any thread of the process.
#pragma once
#include <atomic>
#include <functional>
#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "memory.h"
#include "pool.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace sparsecli {

// Tasks that do not depend on one another: a worker takes the next one as soon as it is done with its last.
struct Tasks {
    int64_t count;
    std::function<void(int64_t task, int64_t worker)> run;
};

class Crew {
  public:
    // The process's crew, locked until the result goes out of scope.
    static Crew& locked(std::unique_lock<std::mutex>& lock, int64_t threads) {
        static Crew* crew = new Crew;  // never destroyed: threads may still wait when the process ends
        lock = std::unique_lock(crew->mutex_);
        crew->prepare(threads);
        return *crew;
    }

    int64_t threads() const { return pool_->threads(); }

    // One set of tasks after the other.
    void run(const std::vector<Tasks>& steps) {
        std::vector<std::atomic<int64_t>> next(steps.size());
        pool_->run(
            [&](int64_t worker) {
                for (size_t s = 0; s < steps.size(); ++s) {
                    if (s) pool_->barrier();
                    while (true) {
                        const int64_t task = next[s].fetch_add(1, std::memory_order_relaxed);
                        if (task >= steps[s].count) break;
                        steps[s].run(task, worker);
                    }
                }
            },
            false);
    }

    // Memory that lasts until the next call of `locked`, with room for `count` values.
    template <class T>
    T* scratch(int64_t count) {
        if (used_ == held_.size()) held_.push_back(std::make_unique<Held>());
        Held& held = *held_[used_++];
        const int64_t bytes = count * int64_t(sizeof(T));
        if (held.bytes < bytes) {
            held.bytes = 0;
            held.buffer.bytes(bytes, false);
            held.bytes = bytes;
        }
        return (T*)held.buffer.data;
    }

  private:
    struct Held {
        Buffer<char> buffer;
        int64_t bytes = 0;
    };

    void prepare(int64_t threads) {
        used_ = 0;
#if defined(__unix__) || defined(__APPLE__)
        if (pool_ && process_ != getpid()) (void)pool_.release();  // threads do not live on in a forked process
        process_ = getpid();
#endif
        if (pool_ && pool_->threads() == threads) return;
        pool_.reset();
        pool_ = std::make_unique<Pool>(threads, false, false);
    }

    std::mutex mutex_;
    std::unique_ptr<Pool> pool_;
    std::vector<std::unique_ptr<Held>> held_;
    size_t used_ = 0;
#if defined(__unix__) || defined(__APPLE__)
    pid_t process_ = 0;
#endif
};

// Sets of tasks of which none depends on another, as one.
inline Tasks together(std::vector<Tasks> parts) {
    int64_t count = 0;
    for (const Tasks& part : parts) count += part.count;
    return {count, [parts = std::move(parts)](int64_t task, int64_t worker) {
                for (const Tasks& part : parts) {
                    if (task < part.count) return part.run(task, worker);
                    task -= part.count;
                }
            }};
}

}  // namespace sparsecli
