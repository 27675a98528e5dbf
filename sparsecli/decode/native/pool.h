// Threads that live as long as an engine and meet at barriers inside one call.
//
// Who waits spins briefly, then yields its processor (a neighbour that shares it would otherwise delay the very
// thread that is waited for), and between calls sleeps after a while.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace sparsecli {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    Pool(int64_t threads, bool pin) : threads_(threads), pin_(pin) {
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
        if (pin_) pthread_setaffinity_np(caller_, sizeof allowed_, &allowed_);  // as it was
#endif
    }

    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int64_t threads() const { return threads_; }

    // Runs job(worker) on every thread, the caller's being worker 0; returns when all are done.
    void run(const std::function<void(int64_t)>& job) {
        if (threads_ == 1) return job(0);
        job_ = &job;
        epoch_.fetch_add(1);
        epoch_.notify_all();
        job(0);
        barrier();
    }

    // Everybody waits for everybody.
    void barrier() {
        if (threads_ == 1) return;
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
    static constexpr int SPINS = 256;
    static constexpr std::chrono::microseconds AWAKE{500};  // until a thread without work sleeps

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
            (*job_)(worker);
            barrier();
        }
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
    bool pin_;
#if defined(__linux__)
    pthread_t caller_;
    cpu_set_t allowed_;  // processors of whoever made the pool
#endif
    std::vector<std::thread> workers_;
    const std::function<void(int64_t)>* job_ = nullptr;
    std::atomic<bool> stopping_{false};
    alignas(64) std::atomic<uint32_t> epoch_{0};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
};

}  // namespace sparsecli
