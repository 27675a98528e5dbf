// Threads and working memory of operations that are called one at a time, from any thread of the process.
#pragma once
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "memory.h"
#include "parallel.h"

#if defined(__linux__)
#include <dlfcn.h>
#include <link.h>
#endif

namespace sparsecli {

// Tasks that do not depend on one another. Which worker runs one must not change its result.
struct Tasks {
    int64_t count;
    std::function<void(int64_t task, int64_t worker)> run;
};

// Sets of tasks, one after the other: all of a set are done before the next begins. Whoever is there takes the next
// task, and a set ends when its tasks do: no set waits for a worker that has not begun.
class Job {
  public:
    explicit Job(std::vector<Tasks> steps) : progress_(steps.size()), steps_(std::move(steps)) {}

    // Takes tasks until all of them are done, by whomever.
    void work(int64_t worker) {
        for (size_t s = 0; s < steps_.size(); ++s) {
            Progress& of_step = progress_[s];
            const int64_t count = steps_[s].count;
            for (int64_t task; (task = of_step.begun.fetch_add(1, std::memory_order_relaxed)) < count;) {
                attempt(steps_[s], task, worker);
                if (of_step.done.fetch_add(1, std::memory_order_acq_rel) + 1 == count) of_step.done.notify_all();
            }
            await(of_step.done, count);
        }
    }

    // After `work`: throws what a task threw.
    void check() const {
        if (problem_) std::rethrow_exception(problem_);
    }

  private:
    struct Progress {
        alignas(64) std::atomic<int64_t> begun{0};
        alignas(64) std::atomic<int64_t> done{0};
    };

    void attempt(const Tasks& tasks, int64_t task, int64_t worker) {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            tasks.run(task, worker);
        } catch (...) {
            if (!failed_.exchange(true)) problem_ = std::current_exception();
        }
    }

    // Spins, then sleeps, so that a worker without a processor gets this one's.
    static void await(std::atomic<int64_t>& done, int64_t count) {
        constexpr int SPINS = 2000;
        int64_t now;
        for (int spins = 0; (now = done.load(std::memory_order_acquire)) < count; ++spins)
            if (spins < SPINS)
                relax();
            else
                done.wait(now, std::memory_order_acquire);
    }

    std::vector<Progress> progress_;
    const std::vector<Tasks> steps_;
    std::atomic<bool> failed_{false};
    std::exception_ptr problem_;
};

// Runs part(0) to part(threads - 1), each on a thread, on those of PyTorch's OpenMP where there is one. Threads beside
// them would wait for processors on which PyTorch's threads look for work in a loop, for milliseconds at each call.
class Threads {
  public:
    template <class Part>
    static void run(int64_t threads, const Part& part) {
        static const Parallel parallel = find();
        if (threads < 2) return part(0);
        if (!parallel) return in_parallel(threads, part);
        struct Call {
            const Part& part;
            std::atomic<int64_t> number{0};
        } call{part};
        parallel(
            [](void* data) {
                Call& of = *(Call*)data;
                of.part(of.number.fetch_add(1));
            },
            &call, unsigned(threads), 0);
    }

  private:
    // GOMP_parallel, which the OpenMP libraries of GNU, Intel and LLVM have: runs a function on a team of threads, of
    // which there may be fewer.
    using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

    static Parallel find() {
#if defined(__linux__)
        // The loaded one, under whatever name a wheel gives it; loading another would make threads of its own.
        void* found = nullptr;
        dl_iterate_phdr(
            [](dl_phdr_info* info, size_t, void* to) {
                const std::string name = info->dlpi_name;
                const bool openmp = name.find("omp") != name.npos;
                void* library = openmp ? dlopen(name.c_str(), RTLD_LAZY | RTLD_NOLOAD) : nullptr;
                void* symbol = library ? dlsym(library, "GOMP_parallel") : nullptr;
                if (symbol && (!*(void**)to || name.find("torch/lib") != name.npos)) *(void**)to = symbol;
                return 0;
            },
            &found);
        return (Parallel)found;
#else
        return nullptr;
#endif
    }
};

class Crew {
  public:
    // The process's crew, locked until the result goes out of scope.
    static Crew& locked(std::unique_lock<std::mutex>& lock, int64_t threads) {
        static Crew* crew = new Crew;  // never destroyed: a thread may still run when the process ends
        lock = std::unique_lock(crew->mutex_);
        crew->used_ = 0;
        crew->threads_ = threads;
        return *crew;
    }

    int64_t threads() const { return threads_; }

    // One set of tasks after the other.
    void run(std::vector<Tasks> steps) {
        Job job(std::move(steps));
        Threads::run(threads_, [&](int64_t worker) { job.work(worker); });
        job.check();
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

    std::mutex mutex_;
    std::vector<std::unique_ptr<Held>> held_;
    size_t used_ = 0;
    int64_t threads_ = 1;
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
