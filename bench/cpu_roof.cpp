// What the cores can do at most: bytes read and float32 multiply-adds in a second. Compiled by bench/cpu_products.py.

#include <immintrin.h>
#include <omp.h>

#include <cstdint>

// Reads `bytes` (a multiple of 4096 a thread) and returns a sum, so that nothing is left out. Asking for lines ahead, for both
// caches, is what reaches the memory's rate.
extern "C" double read_all(const uint8_t* data, int64_t bytes) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t page = 0; page < bytes / 4096; page++) {
        __m256i sums[4] = {};
        const uint8_t* at = data + page * 4096;
        for (int i = 0; i < 4096; i += 128) {
            for (int line = 0; line < 128; line += 64) {
                _mm_prefetch((const char*)at + i + line + 512, _MM_HINT_T0);
                _mm_prefetch((const char*)at + i + line + 16384, _MM_HINT_T1);
            }
            for (int j = 0; j < 4; j++) sums[j] = _mm256_xor_si256(sums[j], _mm256_loadu_si256((const __m256i*)(at + i + 32 * j)));
        }
        const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sums[0], sums[1]), _mm256_xor_si256(sums[2], sums[3]));
        total ^= _mm256_extract_epi64(all, 0);
    }
    return double(total);
}

// 24 floating-point operations of 8 lanes in a round of each thread.
extern "C" double multiply_add(int64_t rounds) {
    double total = 0;
#pragma omp parallel reduction(+ : total)
    {
        __m256 sums[12];
        for (int j = 0; j < 12; j++) sums[j] = _mm256_set1_ps(float(j + omp_get_thread_num()));
        const __m256 factor = _mm256_set1_ps(0.999f), more = _mm256_set1_ps(0.001f);
        for (int64_t i = 0; i < rounds; i++)
            for (int j = 0; j < 12; j++) sums[j] = _mm256_fmadd_ps(sums[j], factor, more);
        for (int j = 0; j < 12; j++) total += _mm256_cvtss_f32(sums[j]);
    }
    return total;
}
