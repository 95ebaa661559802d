// Calls a library's `moe` on weights of zeros, for bench/expert_reads.py: LIBRARY CALLS ROWS PER_TOKEN EXPERTS HIDDEN INTERMEDIATE.
// Prints how many experts the rows have chosen at random.

#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <vector>

// Pages that are neither read nor written here, so that what the cache misses is the kernel's.
static void* zeros(int64_t bytes) { return mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

int main(int, char** argv) {
    void* library = dlopen(argv[1], RTLD_LAZY);
    if (!library) return fprintf(stderr, "%s\n", dlerror()), 1;
    using Moe = void (*)(const void*, const int64_t*, const float*, const void*, const void*, const void*, const void*, const void*,
                         const void*, const void*, void*, void*, float, int64_t, int64_t, int64_t, int64_t, int64_t, const void*, int64_t);
    const auto moe = (Moe)dlsym(library, "moe");
    const int64_t calls = atoll(argv[2]), T = atoll(argv[3]), k = atoll(argv[4]), E = atoll(argv[5]), H = atoll(argv[6]), I = atoll(argv[7]);
    std::mt19937 random(1);
    std::vector<int64_t> experts, all(E);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t t = 0; t < T; t++) {
        std::shuffle(all.begin(), all.end(), random);
        experts.insert(experts.end(), all.begin(), all.begin() + k);
    }
    const std::vector<float> shares(T * k, 1.0f / k);
    const void *w1 = zeros(E * I * H), *s1 = zeros(E * 2 * I * H / 32), *b1 = zeros(E * 2 * I * 2);
    const void *w2 = zeros(E * I * H / 2), *s2 = zeros(E * I * H / 32), *b2 = zeros(E * H * 2);
    void *x = zeros(T * H * 2), *out = zeros(T * H * 2), *parts = zeros(T * k * H * 4);
    for (int64_t call = 0; call < calls; call++)
        moe(x, experts.data(), shares.data(), w1, s1, b1, w2, s2, b2, x, out, parts, 7.0f, T, k, E, H, I, nullptr, 0);
    printf("%zu\n", std::set<int64_t>(experts.begin(), experts.end()).size());
}
