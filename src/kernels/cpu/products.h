// Dot products of rows of x with neighbouring rows of a weight matrix, in bfloat16, MXFP4 or int8.
//
// Each output is one accumulator over k in a fixed order, whatever the number of rows: results do not depend on what else is
// in the batch. X is what a row of x is read as: bfloat16 with AVX-512, with AVX2 float32 in the order in which decoded
// weights come.

#pragma once

#include "pool.h"
#include "simd.h"

#include <algorithm>

// INT8: rows end with zeros up to a multiple of 32 columns; the caller multiplies a row's sums by its scale.
// GGUF: MXFP4 in that file format's blocks of 17 bytes, the scale of 32 columns, then byte k with columns k and k + 16.
enum class Format { BF16, MXFP4, GGUF, INT8 };

static const int64_t GGUF_BLOCK = 17;

static constexpr int64_t padded(int64_t K) { return (K + 31) / 32 * 32; }

static constexpr int64_t row_bytes(Format format, int64_t K) {
    switch (format) {
        case Format::BF16: return 2 * K;
        case Format::MXFP4: return K / 2;
        case Format::GGUF: return K / 32 * GGUF_BLOCK;
        case Format::INT8: break;
    }
    return padded(K);
}

struct Matrix {  // rows of K columns
    const void* data;
    const uint8_t* scales;  // MXFP4's, else null
    int64_t K;
    Format format;

    Matrix from(int64_t row) const {
        return {(const uint8_t*)data + row * row_bytes(format, K), scales ? scales + row * (K / 32) : nullptr, K, format};
    }
};

// Asks for the line `near` bytes further on, for the first cache, and the one `far` bytes further on, for the second: asked for
// in the first alone, as few lines are on their way at once as it has places for them, about half of what memory delivers.
static inline __attribute__((always_inline)) void prefetch(const void* at, int64_t near, int64_t far) {
    _mm_prefetch((const char*)at + near, _MM_HINT_T0);
    _mm_prefetch((const char*)at + far, _MM_HINT_T1);
}

#define TILE __attribute__((noinline))
#define UNROLLED _Pragma("GCC unroll 8")  // else accumulators may stay in memory

static const int64_t WIDTH = 64;      // rows of weights in one call of products, at most
static const int64_t MOST_ROWS = 96;  // rows of x, likewise

#ifdef __AVX512BF16__
#include "products_avx512.h"
#else
#include "products_avx2.h"
#endif
