// Two ways for threads to go through a kernel of several phases, as the kernels' parameter `workers`.
//
// Led: the calling thread goes through the kernel and shares out each phase; a phase ends when all its pieces are done.
//
// Team: every thread goes through the whole kernel by itself, and only the pieces of a phase are shared. A thread that another
// process keeps off its core holds up nobody: after a short wait the others compute its pieces again, and when it is back it
// finds them done. What makes that safe: a piece yields the same bits whoever computes it; it writes only to `shared` memory,
// which belongs to one phase of one section; and a section's memory is used again when all threads have left it.

#pragma once

#include "pool.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>

static constexpr int64_t in_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Memory that grows when it is asked for more; its content is undefined.
struct Lines {
    std::unique_ptr<uint8_t[]> data;
    int64_t size = 0;

    uint8_t* of(int64_t bytes) {
        if (size < bytes) data.reset(new uint8_t[bytes + 63]), size = bytes;
        return (uint8_t*)in_lines(int64_t(data.get()));
    }
};

class Led {
  public:
    int64_t threads() const { return omp_get_max_threads(); }
    bool is_over() const { return false; }

    // Memory for what `run` computes, until the next call with the same USE.
    template <typename T, int USE>
    T* shared(int64_t count) {
        static_assert(USE < USES, "raise USES");
        return (T*)buffers_[USE].of(count * sizeof(T));
    }

    template <typename Body>
    void run(int64_t count, const Body& body) { Pool::shared().run(count, body); }  // body(piece) for each piece
    template <typename Body>
    void run_once(int64_t count, const Body& body) { run(count, body); }  // each piece once: it may write anywhere
    template <typename Body>
    void run_minor(int64_t count, const Body& body) { run(count, body); }  // writes memory of the thread that calls this

  private:
    static const int USES = 8;
    Lines buffers_[USES];
};

struct Phase {  // all zeros at first
    std::atomic<uint32_t> next;
    std::atomic<uint8_t> is_complete;
    std::atomic<uint8_t> is_done[1];  // of each piece

    static constexpr int64_t bytes(int64_t count) { return in_lines(sizeof(Phase) + count); }
};

class Team;

// One run through a kernel.
struct Section {
    std::function<void(Team&)> program;
    Lines inputs, memory, phases;
    int64_t threads = 0;
    std::atomic<bool> is_over{false};
    std::atomic<int64_t> left{0};
    int64_t entered = 0;  // helpers; of them `left` are through

    bool is_free() const { return left.load(std::memory_order_acquire) == entered; }
};

class Team {
  public:
    explicit Team(Section& section)
        : section_(section), memory_(section.memory.of(0)), phases_(section.phases.of(0)) {}

    int64_t threads() const { return section_.threads; }
    bool is_over() const { return section_.is_over.load(std::memory_order_relaxed); }

    template <typename T, int>
    T* shared(int64_t count) {
        return (T*)take(memory_, count * sizeof(T), section_.memory);
    }

    template <typename Body>
    void run(int64_t count, const Body& body) {
        if (count == 1) return body(0);  // sooner done by each than waited for
        Phase& phase = next_phase(count);
        if (phase.is_complete.load(std::memory_order_acquire)) return;
        const uint64_t began = __rdtsc();
        int64_t first, some, done = 0;
        for (; (some = take_run(phase, count, first)); done += some)
            for (int64_t piece = first; piece < first + some; piece++) compute(phase, piece, body);
        if (done) ticks_of_piece_ = (__rdtsc() - began) / done;
        finish(phase, count, body);
        phase.is_complete.store(1, std::memory_order_release);
    }

    template <typename Body>
    void run_once(int64_t count, const Body& body) {
        Phase& phase = next_phase(0);
        if (phase.next.load(std::memory_order_relaxed) == 0 && phase.next.exchange(1, std::memory_order_relaxed) == 0) {
            run_minor(count, body);
            phase.is_complete.store(1, std::memory_order_release);
        }
        for (int spins = 0; !phase.is_complete.load(std::memory_order_acquire); spins++) Pool::pause(spins);
    }

    template <typename Body>
    void run_minor(int64_t count, const Body& body) {
        for (int64_t piece = 0; piece < count; piece++) body(piece);
    }

  private:
    static const int64_t SHARES = 8;    // as Pool's
    static const uint64_t PATIENCE = 2;  // times as long as a piece takes, before another thread's is computed again

    static uint8_t* take(uint8_t*& at, int64_t bytes, Lines& of) {
        uint8_t* const taken = at;
        at += in_lines(bytes);
        if (at > of.of(0) + of.size) std::abort();  // the kernel has asked for less than it needs
        return taken;
    }

    Phase& next_phase(int64_t count) { return *(Phase*)take(phases_, Phase::bytes(count), section_.phases); }

    // The next pieces that nobody has taken, from `first` on; returns how many.
    int64_t take_run(Phase& phase, int64_t count, int64_t& first) {
        uint32_t next = phase.next.load(std::memory_order_relaxed);
        while (next < count) {
            const int64_t some = std::max<int64_t>(1, (count - next) / (SHARES * section_.threads));
            first = next;
            if (phase.next.compare_exchange_weak(next, next + some, std::memory_order_relaxed)) return some;
        }
        return 0;
    }

    template <typename Body>
    static void compute(Phase& phase, int64_t piece, const Body& body) {
        body(piece);
        phase.is_done[piece].store(1, std::memory_order_release);
    }

    // Waits for the pieces that others have taken, and computes them again, the last first, if that takes long.
    template <typename Body>
    void finish(Phase& phase, int64_t count, const Body& body) {
        const uint64_t began = __rdtsc();
        for (int64_t left = count;;) {
            while (left && phase.is_done[left - 1].load(std::memory_order_acquire)) left--;
            if (!left) return;
            if (__rdtsc() - began < PATIENCE * ticks_of_piece_) _mm_pause();
            else compute(phase, left - 1, body);
        }
    }

    Section& section_;
    uint8_t *memory_, *phases_;
    uint64_t ticks_of_piece_ = 100000;
};

// The sections of a process: one more than helpers, each of which is in one at the most.
class Sections {
  public:
    static Sections& all() {
        static Sections* sections = new Sections;  // never destroyed, as the pool
        return *sections;
    }

    // make(section) prepares it and returns its program, which then runs on up to `threads` threads. False, and nothing runs,
    // if the helpers are busy. bytes: of all `shared` memory; phases: of all phases.
    template <typename Make>
    bool run(int64_t threads, int64_t bytes, int64_t phases, const Make& make) {
        std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
        if (!lock.owns_lock()) return false;
        Section& section = free_one();
        section.memory.of(bytes);
        std::memset(section.phases.of(phases), 0, phases);
        section.threads = threads;
        section.is_over.store(false, std::memory_order_relaxed);
        section.left.store(0, std::memory_order_relaxed);
        section.program = make(section);
        const int64_t entered = Pool::shared().run_beside(enter, &section, threads - 1, [&] {
            Team team(section);
            section.program(team);
            section.is_over.store(true, std::memory_order_relaxed);
        });
        section.entered = std::max<int64_t>(0, entered);
        return entered >= 0;
    }

    // Returns when no thread reads or writes anything for a section that has ended.
    void settle() {
        std::lock_guard<std::mutex> lock(mutex_);
        for (auto& section : sections_)
            for (int spins = 0; !section->is_free(); spins++) Pool::pause(spins);
    }

  private:
    static void enter(const void* at, int64_t) {
        Section& section = *(Section*)at;
        Team team(section);
        section.program(team);
        section.left.fetch_add(1, std::memory_order_release);
    }

    Section& free_one() {
        for (auto& section : sections_)
            if (section->is_free()) return *section;
        sections_.push_back(std::make_unique<Section>());
        return *sections_.back();
    }

    std::mutex mutex_;
    std::vector<std::unique_ptr<Section>> sections_;
};

extern "C" void settle() { Sections::all().settle(); }
