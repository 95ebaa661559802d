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
enum class Format { BF16, MXFP4, INT8 };

static constexpr int64_t padded(int64_t K) { return (K + 31) / 32 * 32; }

static constexpr int64_t row_bytes(Format format, int64_t K) {
    return format == Format::BF16 ? 2 * K : format == Format::MXFP4 ? K / 2 : padded(K);
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

#define TILE __attribute__((noinline))
#define UNROLLED _Pragma("GCC unroll 8")  // else accumulators may stay in memory

static const int64_t WIDTH = 64;      // rows of weights in one call of products, at most
static const int64_t MOST_ROWS = 96;  // rows of x, likewise

#ifdef __AVX512BF16__

typedef bf16 X;
static const int64_t PARTIALS = 0;

static inline int64_t x_columns(int64_t K) { return K; }

// PREFETCH asks for the weights `ahead` elements further on, which the next tile reads.
template <int RM, int RN, bool PREFETCH = false>
static TILE void dot_tile(const X* const* x, const bf16* w, int64_t K, float* out, int64_t stride, int64_t ahead = 0) {
    F acc[RM][RN];
    const X* row[RM];
    UNROLLED
    for (int i = 0; i < RM; i++) {
        row[i] = x[i];
        UNROLLED
        for (int j = 0; j < RN; j++) acc[i][j] = f_set(0);
    }
    for (int64_t k = 0; k < K; k += 32) {
        B a[RM];
        UNROLLED
        for (int i = 0; i < RM; i++) a[i] = b_load(row[i] + k, K - k);
        UNROLLED
        for (int j = 0; j < RN; j++) {
            const B b = b_load(w + j * K + k, K - k);
            if (PREFETCH) _mm_prefetch((const char*)(w + j * K + k + ahead), _MM_HINT_T0);
            UNROLLED
            for (int i = 0; i < RM; i++) acc[i][j] = b_dot(acc[i][j], a[i], b);
        }
    }
    UNROLLED
    for (int i = 0; i < RM; i++) {
        if constexpr (RN == 4) _mm_storeu_ps(out + i * stride, f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
        else
            UNROLLED
            for (int j = 0; j < RN; j++) out[i * stride + j] = f_sum(acc[i][j]);
    }
}

template <int RN, bool PREFETCH = true>
static inline void dot_rows(const X* const* x, int64_t rows, const bf16* w, int64_t K, float* out, int64_t stride,
                            int64_t ahead) {
    int64_t m = 0;
    if (rows >= MAX_ROWS) {
        dot_tile<MAX_ROWS, RN, PREFETCH>(x, w, K, out, stride, ahead);
        for (m = MAX_ROWS; m + MAX_ROWS <= rows; m += MAX_ROWS)
            dot_tile<MAX_ROWS, RN>(x + m, w, K, out + m * stride, stride);
    } else if (rows >= 4) {
        dot_tile<4, RN, PREFETCH>(x, w, K, out, stride, ahead);
        m = 4;
    } else {
        dot_tile<1, RN, PREFETCH>(x, w, K, out, stride, ahead);
        m = 1;
    }
    for (; m + 2 <= rows; m += 2) dot_tile<2, RN>(x + m, w, K, out + m * stride, stride);
    for (; m < rows; m++) dot_tile<1, RN>(x + m, w, K, out + m * stride, stride);
}

// 2^(s - 127) of `groups` E8M0 scales; s = 0 is the denormal 2^-127
static inline void decode_scales(const uint8_t* scales, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; g++) {
        const uint32_t bits = scales[g] ? uint32_t(scales[g]) << 23 : 0x00400000;
        std::memcpy(out + g, &bits, 4);
    }
}

// RM rows of x against 4 neighbouring rows of the matrix.
template <int RM>
static TILE void mxfp4_tile(const X* const* x, const uint8_t* block, const float* scale, int64_t groups, Table table,
                              float* out, int64_t stride) {
    F acc[RM][4];
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < 4; j++) acc[i][j] = f_set(0);
    const int64_t row_bytes = groups * 16;
    for (int64_t g = 0; g < groups; g++) {
        B a[RM];
        UNROLLED
        for (int i = 0; i < RM; i++) a[i] = b_load(x[i] + g * 32, 32);
        UNROLLED
        for (int j = 0; j < 4; j++) {
            const uint8_t* at = block + j * row_bytes + g * 16;
            const B weights = b_decode(at, table);
            const F s = f_set(scale[j * groups + g]);
            UNROLLED
            for (int i = 0; i < RM; i++)
                acc[i][j] = f_fma(b_dot(f_set(0), weights, a[i]), s, acc[i][j]);
        }
    }
    UNROLLED
    for (int i = 0; i < RM; i++)
        _mm_storeu_ps(out + i * stride, f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
}

static inline void mxfp4_rows(const X* const* x, int64_t rows, const Matrix& w, float* out, int64_t stride) {
    const int64_t groups = w.K / 32;
    const Table table = e2m1_table();
    const uint8_t* block = (const uint8_t*)w.data;
    for (int64_t byte = 0; byte < 64 * groups; byte += 64) _mm_prefetch((const char*)(block + 64 * groups + byte), _MM_HINT_T0);
    float scale[4096];  // 4 rows, K up to 32,768
    decode_scales(w.scales, 4 * groups, scale);
    for (int64_t m = 0; m < rows;) {
        float* to = out + m * stride;
        switch (std::min<int64_t>(rows - m, MAX_ROWS)) {
            case 1: mxfp4_tile<1>(x + m, block, scale, groups, table, to, stride); m += 1; break;
            case 2: mxfp4_tile<2>(x + m, block, scale, groups, table, to, stride); m += 2; break;
            case 3: mxfp4_tile<3>(x + m, block, scale, groups, table, to, stride); m += 3; break;
            case 4: mxfp4_tile<4>(x + m, block, scale, groups, table, to, stride); m += 4; break;
            case 5: mxfp4_tile<5>(x + m, block, scale, groups, table, to, stride); m += 5; break;
            default: mxfp4_tile<6>(x + m, block, scale, groups, table, to, stride); m += 6; break;
        }
    }
}

// RM rows of x against RN neighbouring rows of the matrix; the row of weights after them is asked for on the way.
template <int RM, int RN>
static TILE void int8_tile(const X* const* x, const int8_t* w, int64_t K, float* out, int64_t stride) {
    const int64_t row = padded(K);
    F acc[RM][RN];
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < RN; j++) acc[i][j] = f_set(0);
    for (int64_t k = 0; k < K; k += 32) {
        B a[RM];
        UNROLLED
        for (int i = 0; i < RM; i++) a[i] = b_load(x[i] + k, K - k);
        UNROLLED
        for (int j = 0; j < RN; j++) {
            const int8_t* at = w + j * row + k;
            if (k % 64 == 0) _mm_prefetch((const char*)(at + RN * row), _MM_HINT_T0);
            const B b = b_from_int8(at);
            UNROLLED
            for (int i = 0; i < RM; i++) acc[i][j] = b_dot(acc[i][j], a[i], b);
        }
    }
    UNROLLED
    for (int i = 0; i < RM; i++) {
        if constexpr (RN == 4) _mm_storeu_ps(out + i * stride, f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
        else
            UNROLLED
            for (int j = 0; j < RN; j++) out[i * stride + j] = f_sum(acc[i][j]);
    }
}

// Four rows of the matrix: for few rows of x decoded in registers, for many once, as bfloat16, which holds them exactly.
static inline void int8_rows(const X* const* x, int64_t rows, const int8_t* w, int64_t K, float* out, int64_t stride) {
    switch (rows) {
        case 1: return int8_tile<1, 4>(x, w, K, out, stride);
        case 2: return int8_tile<2, 4>(x, w, K, out, stride);
        case 3: return int8_tile<3, 4>(x, w, K, out, stride);
        case 4: return int8_tile<4, 4>(x, w, K, out, stride);
        case 5: return int8_tile<5, 4>(x, w, K, out, stride);
        case 6: return int8_tile<6, 4>(x, w, K, out, stride);
    }
    if (rows <= 8) {
        int8_tile<4, 4>(x, w, K, out, stride);
        return int8_rows(x + 4, rows - 4, w, K, out + 4 * stride, stride);
    }
    const int64_t row = padded(K);
    bf16* decoded = kept_scratch<bf16, 6>(4 * K + 32);  // a row's zeros are overwritten by the next row
    for (int j = 0; j < 4; j++)
        for (int64_t k = 0; k < K; k += 32) {
            const int8_t* at = w + j * row + k;
            if (k % 64 == 0) _mm_prefetch((const char*)(at + 4 * row), _MM_HINT_T0);
            _mm512_storeu_si512(decoded + j * K + k, (__m512i)b_from_int8(at));
        }
    dot_rows<4, false>(x, rows, decoded, K, out, stride, 0);
}

// out[r * stride + j] = x[r] . row j of w, for `rows` up to MOST_ROWS and `count` up to WIDTH, a multiple of 4 in MXFP4.
static inline void products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                            float*) {
    int64_t n = 0;
    if (w.format == Format::MXFP4) {
        for (; n < count; n += 4) mxfp4_rows(x, rows, w.from(n), out + n, stride);
        return;
    }
    if (w.format == Format::INT8) {
        auto row = [&w](int64_t n) { return (const int8_t*)w.from(n).data; };
        for (; n + 4 <= count; n += 4) int8_rows(x, rows, row(n), w.K, out + n, stride);
        for (; n < count; n++)
            for (int64_t m = 0; m < rows; m++) int8_tile<1, 1>(x + m, row(n), w.K, out + m * stride + n, stride);
        return;
    }
    const bf16* data = (const bf16*)w.data;
    for (; n + 4 <= count; n += 4) dot_rows<4>(x, rows, data + n * w.K, w.K, out + n, stride, 16 * w.K);
    for (; n < count; n++) dot_rows<1>(x, rows, data + n * w.K, w.K, out + n, stride, 0);
}

#else

typedef float X;
static const int64_t PANEL = 16, BLOCK_K = 256;         // rows and columns that are decoded at once: 16 kB of float32
static const int64_t PARTIALS = MOST_ROWS * WIDTH * 8;  // floats of scratch that products takes

static inline int64_t x_columns(int64_t K) { return padded(K); }

// 32 bfloat16 numbers of x as four vectors in the order of `widen`.
static inline void spread_group(const bf16* x, Format format, X* out) {
    static const int8_t DENSE[32] = {0,  2,  4,  6,  8,  10, 12, 14, 1,  3,  5,  7,  9,  11, 13, 15,
                                     16, 18, 20, 22, 24, 26, 28, 30, 17, 19, 21, 23, 25, 27, 29, 31};
    static const int8_t PACKED[32] = {0,  4,  8,  12, 1,  5,  9,  13, 2,  6,  10, 14, 3,  7,  11, 15,
                                      16, 20, 24, 28, 17, 21, 25, 29, 18, 22, 26, 30, 19, 23, 27, 31};
    if (format == Format::INT8) {
        for (int i = 0; i < 32; i++) out[i] = to_float(x[i]);
        return;
    }
    const int8_t* order = format == Format::MXFP4 ? PACKED : DENSE;
    for (int i = 0; i < 32; i++) out[i] = to_float(x[order[i]]);
}

static inline void spread(const bf16* x, int64_t K, Format format, X* out) {
    for (int64_t k = 0; k < K; k += 32) {
        bf16 line[32] = {0};
        std::memcpy(line, x + k, std::min<int64_t>(32, K - k) * sizeof(bf16));
        spread_group(line, format, out + k);
    }
}

// bfloat16 of each code under each scale: 16 lower bytes, then 16 upper bytes.
struct ScaledCodes {
    alignas(64) uint8_t bytes[256][32];
    ScaledCodes() {
        for (int s = 0; s < 256; s++) {
            const uint32_t bits = s ? uint32_t(s) << 23 : 0x00400000;
            float scale;
            std::memcpy(&scale, &bits, 4);
            for (int code = 0; code < 16; code++) {
                const bf16 value = to_bf16((code & 8 ? -E2M1[code & 7] : E2M1[code & 7]) * scale);
                bytes[s][code] = value & 0xFF;
                bytes[s][code + 16] = value >> 8;
            }
        }
    }
};
static const ScaledCodes SCALED_CODES;

static inline __m256i twice(const uint8_t* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)); }

// 32 columns of a row in bfloat16.
struct Words {
    __m256i first, second;
};

// Columns 32 g to 32 g + 31, of which `left` are there.
template <Format FORMAT>
static inline auto row_words(const uint8_t* data, const uint8_t* scales, int64_t g, int64_t left) {
    if constexpr (FORMAT == Format::INT8) {
        return (const int8_t*)data + 32 * g;
    } else if constexpr (FORMAT == Format::MXFP4) {
        const __m256i codes = _mm256_and_si256(_mm256_srlv_epi64(twice(data + 16 * g), _mm256_setr_epi64x(0, 0, 4, 4)),
                                               _mm256_set1_epi8(15));
        const uint8_t* table = SCALED_CODES.bytes[scales[g]];
        const __m256i low = _mm256_shuffle_epi8(twice(table), codes), high = _mm256_shuffle_epi8(twice(table + 16), codes);
        return Words{_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)};
    } else {
        alignas(32) bf16 line[32] = {0};
        const __m256i* at = (const __m256i*)(data + 64 * g);
        if (left < 32) at = (const __m256i*)std::memcpy(line, at, left * sizeof(bf16));
        return Words{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)};
    }
}

// A quarter of the columns as float32, in the order of spread_group.
template <int QUARTER>
static inline __m256 widen(const Words& words) {
    const __m256i half = QUARTER < 2 ? words.first : words.second;
    return _mm256_castsi256_ps(QUARTER % 2 ? _mm256_and_si256(half, _mm256_set1_epi32((int)0xFFFF0000))
                                           : _mm256_slli_epi32(half, 16));
}

template <int QUARTER>
static inline __m256 widen(const int8_t* columns) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(columns + 8 * QUARTER))));
}

static inline __m128 sum4(__m256 a0, __m256 a1, __m256 a2, __m256 a3) {
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(a0, a1), _mm256_hadd_ps(a2, a3));
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}

template <int RM, int RN, int QUARTER, typename Columns>
static inline void add_quarter(__m256 (&acc)[RM][RN], const X* const* x, const Columns* words) {
    __m256 v[RN];
    UNROLLED
    for (int j = 0; j < RN; j++) v[j] = widen<QUARTER>(words[j]);
    UNROLLED
    for (int i = 0; i < RM; i++) {
        const __m256 a = _mm256_loadu_ps(x[i] + 8 * QUARTER);
        UNROLLED
        for (int j = 0; j < RN; j++) acc[i][j] = _mm256_fmadd_ps(v[j], a, acc[i][j]);
    }
}

// RM rows of x against RN rows of the matrix, decoded on the way, SOME of them at once. `ahead`: bytes from here to what is
// read next.
template <Format FORMAT, int RM, int RN, int SOME>
static TILE void stream_tile(const X* const* x, const Matrix& w, float* out, int64_t stride, int64_t ahead) {
    constexpr int64_t GROUP = row_bytes(FORMAT, 32);
    const int64_t row = row_bytes(FORMAT, w.K), row_scales = w.K / 32;
    const uint8_t* data = (const uint8_t*)w.data;
    const X* at[RM];
    __m256 acc[RN / SOME][RM][SOME];
    UNROLLED
    for (int i = 0; i < RM; i++) at[i] = x[i];
    UNROLLED
    for (int j = 0; j < RN; j++)
        UNROLLED
        for (int i = 0; i < RM; i++) acc[j / SOME][i][j % SOME] = _mm256_setzero_ps();
    for (int64_t g = 0; g * 32 < w.K; g++) {
        UNROLLED
        for (int part = 0; part < RN / SOME; part++) {
            decltype(row_words<FORMAT>(data, w.scales, g, 32)) words[SOME];
            UNROLLED
            for (int j = 0; j < SOME; j++) {
                const uint8_t* from = data + (part * SOME + j) * row;
                if (GROUP * g % 64 == 0) _mm_prefetch((const char*)(from + GROUP * g + ahead), _MM_HINT_T0);
                words[j] = row_words<FORMAT>(from, w.scales + (part * SOME + j) * row_scales, g, w.K - 32 * g);
            }
            add_quarter<RM, SOME, 0>(acc[part], at, words);
            add_quarter<RM, SOME, 1>(acc[part], at, words);
            add_quarter<RM, SOME, 2>(acc[part], at, words);
            add_quarter<RM, SOME, 3>(acc[part], at, words);
        }
        UNROLLED
        for (int i = 0; i < RM; i++) at[i] += 32;
    }
    const __m256 none = _mm256_setzero_ps();
    auto sum_of = [&](int i, int j) { return j < RN ? acc[j / SOME][i][j % SOME] : none; };
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < RN; j += 4) {
            alignas(16) float sums[4];
            _mm_store_ps(sums, sum4(sum_of(i, j), sum_of(i, j + 1), sum_of(i, j + 2), sum_of(i, j + 3)));
            for (int n = 0; n < 4 && j + n < RN; n++) out[i * stride + j + n] = sums[n];
        }
}

template <Format FORMAT, int RM, int RN, int SOME>
static inline void stream_rows(const X* const* x, const Matrix& w, int64_t count, float* out, int64_t stride) {
    const int64_t row = row_bytes(FORMAT, w.K);
    int64_t n = 0;
    for (; n + RN <= count; n += RN) stream_tile<FORMAT, RM, RN, SOME>(x, w.from(n), out + n, stride, RN * row);
    for (; n < count; n++) stream_tile<FORMAT, RM, 1, 1>(x, w.from(n), out + n, stride, row);
}

// Four rows of the panel that is decoded next: a step of panel_tile asks for one of their lines.
struct NextPanel {
    const uint8_t* data;
    int64_t row_bytes, lines;  // of a row, a power of two

    void prefetch(int64_t step) const {
        if (step < 4 * lines) _mm_prefetch((const char*)(data + step / lines * row_bytes + step % lines * 64), _MM_HINT_T0);
    }
};

// RM rows of x against 4 decoded rows, over `columns`; the accumulators lie in `partials` [row of x][WIDTH][8] in between.
template <int RM, bool PREFETCH>
static TILE void panel_tile(const X* const* x, int64_t k0, const float* panel, int64_t columns, float* partials, bool first,
                            NextPanel next) {
    __m256 acc[RM][4];
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < 4; j++)
            acc[i][j] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(partials + (i * WIDTH + j) * 8);
    for (int64_t k = 0; k < columns; k += 8) {
        if (PREFETCH) next.prefetch(k / 8);
        __m256 a[RM];
        UNROLLED
        for (int i = 0; i < RM; i++) a[i] = _mm256_loadu_ps(x[i] + k0 + k);
        UNROLLED
        for (int j = 0; j < 4; j++) {
            const __m256 b = _mm256_load_ps(panel + j * BLOCK_K + k);
            UNROLLED
            for (int i = 0; i < RM; i++) acc[i][j] = _mm256_fmadd_ps(b, a[i], acc[i][j]);
        }
    }
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < 4; j++) _mm256_storeu_ps(partials + (i * WIDTH + j) * 8, acc[i][j]);
}

template <Format FORMAT>
static inline void decode_panel(const Matrix& w, int64_t count, int64_t k0, int64_t columns, float* panel) {
    const int64_t row = row_bytes(FORMAT, w.K);
    for (int64_t j = 0; j < (count + 3) / 4 * 4; j++) {
        float* to = panel + j * BLOCK_K;
        if (j >= count) {
            std::fill(to, to + columns, 0.0f);
            continue;
        }
        const uint8_t* data = (const uint8_t*)w.data + j * row;
        for (int64_t g = k0 / 32; g * 32 < k0 + columns; g++, to += 32) {
            const auto words = row_words<FORMAT>(data, w.scales + j * (w.K / 32), g, w.K - 32 * g);
            _mm256_store_ps(to, widen<0>(words));
            _mm256_store_ps(to + 8, widen<1>(words));
            _mm256_store_ps(to + 16, widen<2>(words));
            _mm256_store_ps(to + 24, widen<3>(words));
        }
    }
}

template <Format FORMAT>
static inline void panel_products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                  float* partials) {
    alignas(64) float panel[PANEL * BLOCK_K];
    constexpr int64_t LINES = row_bytes(FORMAT, BLOCK_K) / 64;  // in BLOCK_K columns
    const int64_t width = x_columns(w.K), row = row_bytes(FORMAT, w.K);
    for (int64_t k0 = 0; k0 < width; k0 += BLOCK_K)
        for (int64_t n0 = 0; n0 < count; n0 += PANEL) {
            const int64_t columns = std::min(BLOCK_K, width - k0), some = std::min(PANEL, count - n0);
            decode_panel<FORMAT>(w.from(n0), some, k0, columns, panel);
            const int64_t line = row_bytes(FORMAT, k0);
            const uint8_t* ahead = (const uint8_t*)w.data + (n0 + PANEL < count ? (n0 + PANEL) * row + line : line + LINES * 64);
            for (int64_t m = 0; m < rows; m += 3)
                for (int64_t n = 0; n < some; n += 4) {
                    float* sums = partials + (m * WIDTH + n0 + n) * 8;
                    const float* weights = panel + n * BLOCK_K;
                    const NextPanel next{ahead + n * row, row, LINES};
                    if (m == 0) panel_tile<3, true>(x, k0, weights, columns, sums, k0 == 0, next);
                    else if (m + 3 <= rows) panel_tile<3, false>(x + m, k0, weights, columns, sums, k0 == 0, next);
                    else if (m + 2 == rows) panel_tile<2, false>(x + m, k0, weights, columns, sums, k0 == 0, next);
                    else panel_tile<1, false>(x + m, k0, weights, columns, sums, k0 == 0, next);
                }
        }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < count; n += 4) {
            const float* sums = partials + (m * WIDTH + n) * 8;
            alignas(16) float four[4];
            _mm_store_ps(four, sum4(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8), _mm256_loadu_ps(sums + 16),
                                    _mm256_loadu_ps(sums + 24)));
            for (int64_t j = 0; j < 4 && n + j < count; j++) out[m * stride + n + j] = four[j];
        }
}

template <Format FORMAT>
static inline void products_of(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                               float* partials) {
    constexpr bool IS_INT8 = FORMAT == Format::INT8;
    switch (rows) {
        case 1: return stream_rows<FORMAT, 1, 8, 1>(x, w, count, out, stride);
        case 2: return stream_rows<FORMAT, 2, 4, 1>(x, w, count, out, stride);
        case 3: return stream_rows<FORMAT, 3, IS_INT8 ? 4 : 2, 2>(x, w, count, out, stride);
        case 4: return stream_rows<FORMAT, 4, IS_INT8 ? 3 : 2, IS_INT8 ? 3 : 2>(x, w, count, out, stride);
        case 5: case 6: case 7: case 8:
            products_of<FORMAT>(x, 4, w, count, out, stride, partials);
            return products_of<FORMAT>(x + 4, rows - 4, w, count, out + 4 * stride, stride, partials);
        default: return panel_products<FORMAT>(x, rows, w, count, out, stride, partials);
    }
}

// out[r * stride + j] = x[r] . row j of w, for `rows` up to MOST_ROWS and `count` up to WIDTH; `partials`: scratch.
static inline void products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                            float* partials) {
    switch (w.format) {
        case Format::BF16: return products_of<Format::BF16>(x, rows, w, count, out, stride, partials);
        case Format::MXFP4: return products_of<Format::MXFP4>(x, rows, w, count, out, stride, partials);
        case Format::INT8: return products_of<Format::INT8>(x, rows, w, count, out, stride, partials);
    }
}

#endif
