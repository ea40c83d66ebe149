// Memory and threads of the engine. Not included by the files compiled for an instruction set: inline functions of the
// standard library must exist for the plain CPU only.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <new>
#include <thread>
#include <vector>

#include "engine.h"

// Floats on cache lines, zeroed, freed together.
class Arena {
   public:
    Arena() = default;
    Arena(const Arena &) = delete;
    Arena &operator=(const Arena &) = delete;
    ~Arena() {
        for (void *block : blocks_) std::free(block);
    }

    float *floats(int64_t count) { return static_cast<float *>(zeros(count, sizeof(float))); }
    float **pointers(int64_t count) { return static_cast<float **>(zeros(count, sizeof(float *))); }

   private:
    void *zeros(int64_t count, std::size_t size) {
        blocks_.push_back(nullptr);
        // Aligned by hand: an aligned `new` needs a recent macOS.
        void *block = std::calloc(static_cast<std::size_t>(count) * size + 64, 1);
        if (!block) throw std::bad_alloc();
        blocks_.back() = block;
        return reinterpret_cast<void *>((reinterpret_cast<std::uintptr_t>(block) + 63) / 64 * 64);
    }

    std::vector<void *> blocks_;
};

// Runs a function on so many threads of a pool that is there already (GOMP_parallel of libgomp); null: there is none.
// PyTorch's pool waits busily for a while after each of its operations: threads of our own would share cores with it.
using SfPool = void (*)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
inline SfPool sf_pool = nullptr;

// Calls work(0) ... work(count - 1) on up to `count` threads, this one among them. Which thread makes which call is
// open; results must not depend on it.
template <class Work>
void in_parallel(int64_t count, Work work) {
    struct Shared {
        Work &work;
        const int64_t count;
        std::atomic<int64_t> next;
        std::atomic<bool> failed;
        std::exception_ptr failure;

        static void run(void *data) {
            Shared &shared = *static_cast<Shared *>(data);
            for (int64_t i = shared.next++; i < shared.count; i = shared.next++) try {
                    shared.work(i);
                } catch (...) {
                    if (!shared.failed.exchange(true)) shared.failure = std::current_exception();
                }
        }
    } shared{work, count, {0}, {false}, {}};
    if (count > 1 && sf_pool) {
        sf_pool(Shared::run, &shared, static_cast<unsigned>(count), 0);
    } else {
        std::vector<std::thread> others;
        try {
            for (int64_t i = 1; i < count; ++i) others.emplace_back(Shared::run, &shared);
        } catch (...) {  // no more threads to be had: fewer do the same work
        }
        Shared::run(&shared);
        for (std::thread &other : others) other.join();
    }
    if (shared.failed) std::rethrow_exception(shared.failure);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The kernels called `name`, or null where this CPU or this build lacks them.
const SfKernels *find_kernels(const char *name);

// Rows of a tile for `points` points: evened out, at most `most` (0: what suits the caches), whole blocks.
int64_t tile_rows(const SfKernels &kernels, int64_t points, int64_t most);

// A network's layers, gradients and buffers, in the layouts of engine.h.
SfLayer allocate_layer(Arena &arena, const SfKernels &kernels, int64_t in, int64_t out);
void pack_layer(const SfKernels &kernels, SfLayer &layer, const float *weight, const float *bias, float omega);
SfGradient allocate_gradient(Arena &arena, const SfKernels &kernels, const SfLayer &layer, bool weight,
                             bool bias);
SfScratch allocate_scratch(Arena &arena, const SfKernels &kernels, const SfTask &task, int64_t tile);
