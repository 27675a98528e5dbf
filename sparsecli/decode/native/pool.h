// Threads that live as long as an engine and meet at barriers inside one call.
//
// A waiting thread spins briefly, then yields its processor, since the thread it waits for may need it. Between calls
// threads sleep after a while.
//
// Where other programs keep the processors busy, threads lose a time slice at each of the hundreds of barriers of a
// token. When a thread gets much less processor time than has passed, the caller works alone for some calls before all
// threads try again.
//
// For a token of a small model one thread may be faster than several with barriers: the first short jobs are timed both
// ways. Results do not depend on any of this.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <ctime>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "parallel.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace sparsecli {

class Pool {
  public:
    // `yielding`: work alone where processors are busy.
    Pool(int64_t threads, bool pin, bool yielding) : threads_(threads), yielding_(yielding), pin_(pin) {
#if defined(__linux__)
        caller_ = pthread_self();
        if (pin_) pin_ = !pthread_getaffinity_np(caller_, sizeof allowed_, &allowed_);
#endif
        try {
            for (int64_t worker = 1; worker < threads; ++worker)
                workers_.emplace_back([this, worker] { serve(worker); });
        } catch (const std::system_error&) {
            stop();
            throw std::runtime_error("the system does not start " + std::to_string(threads) + " threads; use fewer");
        } catch (...) {
            stop();
            throw;
        }
        if (pin_) pin_to(0);
    }

    ~Pool() {
        stop();
#if defined(__linux__)
        if (pin_) pthread_setaffinity_np(caller_, sizeof allowed_, &allowed_);  // restores the caller's processors
#endif
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int64_t threads() const { return threads_; }

    // Threads of the job that is running.
    int64_t active() const { return single_ || alone_ > 0 ? 1 : threads_; }

    // Runs job(worker) on every active thread, the caller's being worker 0; returns when all are done. Jobs that are
    // `alike` take about the same time each.
    void run(const std::function<void(int64_t)>& job, bool alike) {
        const bool timed = alike && threads_ > 1 && alone_ == 0 && trials_ < 2 * TRIALS;
        single_ = alike && (timed ? trials_ % 2 == 1 && fastest_together_ < SHORT_JOB : faster_alone_);
        const double begin = timed ? seconds(CLOCK_MONOTONIC) : 0;
        dispatch(job);
        if (timed) compare(seconds(CLOCK_MONOTONIC) - begin);
        single_ = false;
    }

    // Every active thread waits for all others.
    void barrier() {
        if (active() == 1) return;
        const uint32_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads_) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins)
            if (spins < SPINS)
                relax();
            else
                std::this_thread::yield();
    }

  private:
    void dispatch(const std::function<void(int64_t)>& job) {
        if (active() == 1) {
            job(0);
            if (alone_ > 0) --alone_;
            return;
        }
        job_ = &job;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        watched(0);
        barrier();
        if (yielding_) judge();
    }

    // After a timed job. Long jobs gain from every thread and are not tried alone.
    void compare(double passed) {
        double& best = single_ ? fastest_alone_ : fastest_together_;
        best = std::min(best, passed);
        if (++trials_ == 2 * TRIALS) faster_alone_ = fastest_alone_ < fastest_together_;
    }

    static constexpr int SPINS = 256;
    static constexpr double SHORTEST = 2e-4,
                            LEAST_SHARE = 0.75;  // shortest job that is judged (seconds), least share of a processor
    static constexpr int64_t TRIALS = 8;         // timed jobs of either way
    static constexpr double SHORT_JOB = 2e-3;    // seconds
    static constexpr int64_t SHORTEST_PAUSE = 16, LONGEST_PAUSE = 512, CALM = 16;  // jobs
    static constexpr std::chrono::microseconds AWAKE{500};                         // until a thread without work sleeps

    void stop() {
        stopping_ = true;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void serve(int64_t worker) {
        if (pin_) pin_to(worker);
        uint32_t seen = 0;
        while (true) {
            wait_for_work(seen);
            ++seen;
            if (stopping_) return;
            watched(worker);
            barrier();
        }
    }

    // Runs the job, and notes whether this thread had its processor for most of it.
    void watched(int64_t worker) {
        const double begin = seconds(CLOCK_MONOTONIC), used = seconds(CLOCK_THREAD_CPUTIME_ID);
        (*job_)(worker);
        const double passed = seconds(CLOCK_MONOTONIC) - begin;
        if (passed > SHORTEST && seconds(CLOCK_THREAD_CPUTIME_ID) - used < LEAST_SHARE * passed) crowded_ = true;
    }

    static double seconds(clockid_t clock) {
        timespec now{};
        clock_gettime(clock, &now);
        return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
    }

    // After a job of all threads. One crowded job may be chance; a second one in a row is not.
    void judge() {
        const bool crowded = crowded_.exchange(false);
        if (!crowded) {
            if (++calm_ >= CALM) pause_ = SHORTEST_PAUSE;
            strikes_ = 0;
            return;
        }
        calm_ = 0;
        if (++strikes_ < 2) return;
        alone_ = pause_;
        pause_ = pause_ < LONGEST_PAUSE ? 2 * pause_ : pause_;
        strikes_ = 1;  // when all try again, the first crowded job is enough
    }

    void wait_for_work(uint32_t seen) {
        for (int spins = 0; spins < SPINS; ++spins) {
            if (epoch_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        const auto start = std::chrono::steady_clock::now();
        while (std::chrono::steady_clock::now() - start < AWAKE) {
            if (epoch_.load(std::memory_order_acquire) != seen) return;
            std::this_thread::yield();
        }
        epoch_.wait(seen, std::memory_order_acquire);
    }

    void pin_to([[maybe_unused]] int64_t worker) {
#if defined(__linux__)
        cpu_set_t one;
        int64_t left = worker % CPU_COUNT(&allowed_);
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
            if (CPU_ISSET(cpu, &allowed_) && left-- == 0) {
                CPU_ZERO(&one);
                CPU_SET(cpu, &one);
                pthread_setaffinity_np(pthread_self(), sizeof one, &one);
                return;
            }
#endif
    }

    const int64_t threads_;
    const bool yielding_;
    bool single_ = false, faster_alone_ = false;  // the job that is running, and short ones after the trials
    int64_t trials_ = 0;
    double fastest_alone_ = INFINITY, fastest_together_ = INFINITY;  // seconds
    int64_t alone_ = 0, pause_ = SHORTEST_PAUSE, strikes_ = 0, calm_ = 0;
    std::atomic<bool> crowded_{false};
    bool pin_;
#if defined(__linux__)
    pthread_t caller_;
    cpu_set_t allowed_;  // processors of the thread that made the pool
#endif
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* job_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace sparsecli
