// Threads and working memory of operations that are called one at a time, from any thread of the process.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "memory.h"
#include "parallel.h"

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

namespace sparsecli {

// Tasks that do not depend on one another. Which worker runs one must not change its result.
struct Tasks {
    int64_t count;
    std::function<void(int64_t task, int64_t worker)> run;
};

// Sets of tasks, one after the other: all of a set are done before the next begins. Whoever is there takes the next
// task, and a set ends when its tasks do: nobody waits for a worker that has none.
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

// Threads that help with jobs. Between jobs they sleep. One that wakes too late finds nothing to do.
class Helpers {
  public:
    explicit Helpers(int64_t count) {
        try {
            for (int64_t worker = 1; worker <= count; ++worker)
                threads_.emplace_back([this, worker] { serve(worker); });
        } catch (const std::system_error&) {
            stop();
            throw std::runtime_error("the system does not start " + std::to_string(count + 1) + " threads; use fewer");
        }
    }

    ~Helpers() { stop(); }

    Helpers(const Helpers&) = delete;
    Helpers& operator=(const Helpers&) = delete;

    int64_t count() const { return int64_t(threads_.size()); }

    // Runs a job, the caller being worker 0. Helpers may keep the job for longer, but none of its tasks.
    void run(std::vector<Tasks> steps) {
        const auto job = std::make_shared<Job>(std::move(steps));
        if (!threads_.empty()) offer(job);
        job->work(0);
        if (!threads_.empty()) offer(nullptr);
        job->check();
    }

  private:
    void offer(std::shared_ptr<Job> job) {
        {
            std::lock_guard lock(mutex_);
            job_.swap(job);
            if (!job_) return;
            ++offers_;
        }
        offered_.notify_all();
    }

    void stop() {
        {
            std::lock_guard lock(mutex_);
            stopping_ = true;
        }
        offered_.notify_all();
        for (std::thread& thread : threads_) thread.join();
    }

    void serve(int64_t worker) {
        for (uint64_t seen = 0;;) {
            std::shared_ptr<Job> job;
            {
                std::unique_lock lock(mutex_);
                offered_.wait(lock, [&] { return stopping_ || (job_ && offers_ != seen); });
                if (stopping_) return;
                seen = offers_;
                job = job_;
            }
            job->work(worker);
        }
    }

    std::vector<std::thread> threads_;
    std::mutex mutex_;
    std::condition_variable offered_;
    std::shared_ptr<Job> job_;
    uint64_t offers_ = 0;
    bool stopping_ = false;
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

    int64_t threads() const { return helpers_->count() + 1; }

    // One set of tasks after the other.
    void run(std::vector<Tasks> steps) { helpers_->run(std::move(steps)); }

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
        if (helpers_ && process_ != getpid()) (void)helpers_.release();  // threads do not live on in a forked process
        process_ = getpid();
#endif
        if (helpers_ && this->threads() == threads) return;
        helpers_.reset();
        helpers_ = std::make_unique<Helpers>(threads - 1);
    }

    std::mutex mutex_;
    std::unique_ptr<Helpers> helpers_;
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
