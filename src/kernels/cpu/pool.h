// Work in small pieces that idle threads take. A parallel region ends when its pieces are done, not when all threads have
// arrived: a thread that another process keeps off its core holds up one piece at the most. Which thread computes a piece
// never changes a result.
//
// The caller works too. Helpers wait for the next region in a loop for SPIN_NS and then sleep.

#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
  public:
    static Pool& shared() {
        static Pool* pool = new Pool;  // never destroyed: its threads end with the process
        return *pool;
    }

    // body(piece) for each piece from 0 to count - 1, in any order, on up to omp_get_max_threads() threads.
    template <typename Body>
    void run(int64_t count, const Body& body) {
        const int64_t threads = std::min<int64_t>(omp_get_max_threads(), count);
        if (threads <= 1 || busy_.exchange(true, std::memory_order_acquire)) {  // alone, or called from two threads
            for (int64_t piece = 0; piece < count; piece++) body(piece);
            return;
        }
        const uint32_t epoch = publish([](const void* b, int64_t piece) { (*(const Body*)b)(piece); }, &body, count, threads - 1, true);
        work(epoch);
        const Region& region = regions_[epoch % RING];
        for (int spins = 0; region.done.load(std::memory_order_acquire) < count; spins++) pause(spins);
        busy_.store(false, std::memory_order_release);
    }

    // Runs own() here while helpers, as far as they are free, run call(body): no more of them begin when own() has returned, but
    // those that have begun may not be through. Returns how many have begun; -1, and runs nothing, if the helpers are another
    // thread's.
    template <typename Own>
    int64_t run_beside(void (*call)(const void*, int64_t), const void* body, int64_t helpers, const Own& own) {
        if (busy_.exchange(true, std::memory_order_acquire)) return -1;
        const uint32_t epoch = publish(call, body, helpers, helpers, false);
        own();
        const uint64_t ticket = ticket_.exchange(uint64_t(epoch) << 32 | uint64_t(helpers), std::memory_order_acq_rel);
        busy_.store(false, std::memory_order_release);
        return uint32_t(ticket);
    }

    // Waits a little: `spins` counts the calls. A thread that waits for long gives its core to one that it may be waiting for.
    static void pause(int spins) {
        if (spins < 2000) _mm_pause();
        else sched_yield();
    }

  private:
    static const int64_t RING = 64;  // regions whose fields a late helper may still read
    static const int64_t SPIN_NS = 100000;
    static const int64_t SHARES = 8;  // a thread takes this part of its share of what is left, so pieces lie next to one another

    struct Region {
        std::atomic<void (*)(const void*, int64_t)> call{nullptr};
        std::atomic<const void*> body{nullptr};
        std::atomic<int64_t> count{0}, helpers{0};
        std::atomic<bool> is_awaited{false};
        alignas(64) std::atomic<int64_t> done{0};
    };

    // Makes a region's pieces free to take, and returns its number.
    uint32_t publish(void (*call)(const void*, int64_t), const void* body, int64_t count, int64_t helpers, bool is_awaited) {
        start_helpers(helpers);
        const uint32_t epoch = uint32_t(ticket_.load(std::memory_order_relaxed) >> 32) + 1;
        Region& region = regions_[epoch % RING];
        region.call.store(call, std::memory_order_relaxed);
        region.body.store(body, std::memory_order_relaxed);
        region.count.store(count, std::memory_order_relaxed);
        region.helpers.store(helpers, std::memory_order_relaxed);
        region.is_awaited.store(is_awaited, std::memory_order_relaxed);
        region.done.store(0, std::memory_order_relaxed);
        ticket_.store(uint64_t(epoch) << 32, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst)) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        return epoch;
    }

    // Takes runs of pieces of the region until none is left or another region has begun. The ticket holds the region's number and
    // the next piece, so a piece can only be taken from the region whose fields were read.
    void work(uint32_t epoch) {
        Region& region = regions_[epoch % RING];
        auto call = region.call.load(std::memory_order_relaxed);
        const void* body = region.body.load(std::memory_order_relaxed);
        const int64_t count = region.count.load(std::memory_order_relaxed);
        const bool is_awaited = region.is_awaited.load(std::memory_order_relaxed);  // else the fields may be another region's after the call
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        const int64_t shares = SHARES * (1 + region.helpers.load(std::memory_order_relaxed));
        while (uint32_t(ticket >> 32) == epoch && int64_t(uint32_t(ticket)) < count) {
            const int64_t first = uint32_t(ticket), taken = std::max<int64_t>(1, (count - first) / shares);
            if (!ticket_.compare_exchange_weak(ticket, ticket + taken, std::memory_order_acq_rel)) continue;
            for (int64_t piece = first; piece < first + taken; piece++) call(body, piece);
            if (is_awaited) region.done.fetch_add(taken, std::memory_order_release);
            ticket = ticket_.load(std::memory_order_acquire);
        }
    }

    void start_helpers(int64_t wanted) {
        for (; started_ < wanted; started_++) std::thread(&Pool::help, this, started_).detach();
    }

    void help(int64_t index) {
        uint32_t seen = 0;
        for (;;) {
            seen = next_region(seen);
            if (index < regions_[seen % RING].helpers.load(std::memory_order_relaxed)) work(seen);
        }
    }

    uint32_t next_region(uint32_t seen) {
        const auto began = std::chrono::steady_clock::now();
        for (int spins = 1;; spins++) {
            const uint32_t epoch = uint32_t(ticket_.load(std::memory_order_acquire) >> 32);
            if (epoch != seen) return epoch;
            _mm_pause();
            if (spins % 64 == 0 && std::chrono::steady_clock::now() - began > std::chrono::nanoseconds(SPIN_NS)) break;
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        uint32_t epoch;
        wake_.wait(lock, [&] { return (epoch = uint32_t(ticket_.load(std::memory_order_seq_cst) >> 32)) != seen; });
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
        return epoch;
    }

    std::atomic<uint64_t> ticket_{0};
    std::atomic<bool> busy_{false};
    std::atomic<int> sleeping_{0};
    int64_t started_ = 0;
    std::mutex mutex_;
    std::condition_variable wake_;
    Region regions_[RING];
};

// A buffer that its thread keeps, at the start of a cache line; its content is undefined.
template <typename T, int USE>
static T* kept_scratch(int64_t count) {
    thread_local std::vector<uint8_t> buffer;
    const size_t bytes = count * sizeof(T) + 63;
    if (buffer.size() < bytes) buffer.resize(bytes);
    return (T*)((uintptr_t(buffer.data()) + 63) / 64 * 64);
}
