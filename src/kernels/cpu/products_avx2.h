// Matrix products with AVX2 and FMA; see products.h.

#pragma once

typedef float X;
static const int64_t PANEL = 16, BLOCK_K = 256;         // rows and columns that are decoded at once: 16 kB of float32
static const int64_t BLOCK_GROUPS = 20;                 // of 32 columns that are decoded on the way: 10 kB of four rows of x
static const int64_t BLOCK_ROWS = 48;                   // from so many rows on decoding at once pays
static const int64_t PARTIALS = MOST_ROWS * WIDTH * 8;  // floats of scratch that products takes

// 32 bfloat16 numbers of x as four vectors in the order of `widen`.
static inline void spread_group(const bf16* x, Format format, X* out) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)x), b = _mm256_loadu_si256((const __m256i*)(x + 16));
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    const __m256i vectors[4] = {_mm256_slli_epi32(a, 16), _mm256_and_si256(a, high), _mm256_slli_epi32(b, 16),
                                _mm256_and_si256(b, high)};
    if (format == Format::INT8)
        for (int i = 0; i < 32; i++) out[i] = to_float(x[i]);
    else
        for (int n = 0; n < 4; n++) _mm256_storeu_si256((__m256i*)(out + 8 * n), vectors[n]);
}

// 32 columns of a row in bfloat16.
struct Words {
    __m256i first, second;
};

// Columns 32 g to 32 g + 31, of which `left` are there.
template <Format FORMAT>
static inline auto row_words(const uint8_t* data, int64_t g, int64_t left) {
    if constexpr (FORMAT == Format::INT8) {
        return (const int8_t*)data + 32 * g;
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
    const int64_t row = row_bytes(FORMAT, w.K);
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
            decltype(row_words<FORMAT>(data, g, 32)) words[SOME];
            UNROLLED
            for (int j = 0; j < SOME; j++) {
                const uint8_t* from = data + (part * SOME + j) * row;
                if (GROUP * g % 64 == 0) prefetch(from + GROUP * g, 512, ahead);
                words[j] = row_words<FORMAT>(from, g, w.K - 32 * g);
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

// RM rows of x against RN rows of the matrix, decoded on the way, over groups `begin` to `end` - 1; the sums lie in `partials`
// [row of x][WIDTH][8] in between. Asks for what the next RN rows have there.
template <Format FORMAT, int RM, int RN>
static TILE void block_tile(const X* const* x, const Matrix& w, int64_t begin, int64_t end, float* partials) {
    constexpr int64_t GROUP = row_bytes(FORMAT, 32);
    const int64_t row = row_bytes(FORMAT, w.K);
    const uint8_t* data = (const uint8_t*)w.data;
    const X* at[RM];
    __m256 acc[RM][RN];
    UNROLLED
    for (int i = 0; i < RM; i++) {
        at[i] = x[i] + 32 * begin;
        UNROLLED
        for (int j = 0; j < RN; j++) acc[i][j] = begin ? _mm256_loadu_ps(partials + (i * WIDTH + j) * 8) : _mm256_setzero_ps();
    }
    auto add = [&](int64_t g, int64_t left) __attribute__((always_inline)) {
        decltype(row_words<FORMAT>(data, g, left)) words[RN];
        UNROLLED
        for (int j = 0; j < RN; j++) {
            _mm_prefetch((const char*)(data + (RN + j) * row + GROUP * g), _MM_HINT_T0);
            words[j] = row_words<FORMAT>(data + j * row, g, left);
        }
        add_quarter<RM, RN, 0>(acc, at, words);
        add_quarter<RM, RN, 1>(acc, at, words);
        add_quarter<RM, RN, 2>(acc, at, words);
        add_quarter<RM, RN, 3>(acc, at, words);
        UNROLLED
        for (int i = 0; i < RM; i++) at[i] += 32;
    };
    const int64_t whole = std::min(end, w.K / 32);
    for (int64_t g = begin; g < whole; g++) add(g, 32);
    if (whole < end) add(whole, w.K - 32 * whole);
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < RN; j++) _mm256_storeu_ps(partials + (i * WIDTH + j) * 8, acc[i][j]);
}

// What is read after a block of weights, asked for in parts, so that memory delivers it while the block is multiplied.
struct NextBlock {
    const uint8_t* data;
    int64_t row_bytes, bytes, rows, part;  // `bytes` of each of `rows`; lines at once

    NextBlock(const uint8_t* data, int64_t row_bytes, int64_t bytes, int64_t rows, int64_t parts)
        : data(data), row_bytes(row_bytes), bytes(bytes), rows(rows), part(rows * ((bytes + 63) / 64) / parts + 1) {}

    void prefetch() {
        for (int64_t n = 0; n < part && rows; n++) {
            _mm_prefetch((const char*)data + at_, _MM_HINT_T1);
            if ((at_ += 64) < bytes) continue;
            at_ = 0;
            data += row_bytes;
            rows--;
        }
    }

  private:
    int64_t at_ = 0;
};

// RM rows of x against `count` rows of the matrix, RN of them at once.
template <Format FORMAT, int RM, int RN>
static inline void block_tiles(const X* const* x, const Matrix& w, int64_t count, int64_t begin, int64_t end, float* partials,
                               NextBlock& next) {
    for (int64_t n = 0; n < count;) {
        const int64_t left = count - n, some = left < RN || (RN == 3 && left == 4) ? std::min<int64_t>(2, left) : RN;
        next.prefetch();
        if (some == RN) block_tile<FORMAT, RM, RN>(x, w.from(n), begin, end, partials + n * 8);
        else if (some == 2) block_tile<FORMAT, RM, 2>(x, w.from(n), begin, end, partials + n * 8);
        else block_tile<FORMAT, RM, 1>(x, w.from(n), begin, end, partials + n * 8);
        n += some;
    }
}

// The outputs from the sums of their lanes, [row of x][WIDTH][8].
static inline void add_up(const float* partials, int64_t rows, int64_t count, float* out, int64_t stride) {
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < count; n += 4) {
            const float* sums = partials + (m * WIDTH + n) * 8;
            alignas(16) float four[4];
            _mm_store_ps(four, sum4(_mm256_loadu_ps(sums), _mm256_loadu_ps(sums + 8), _mm256_loadu_ps(sums + 16),
                                    _mm256_loadu_ps(sums + 24)));
            for (int64_t j = 0; j < 4 && n + j < count; j++) out[m * stride + n + j] = four[j];
        }
}

// Blocks of columns, so that four rows of x stay in the first cache and the weights in the second.
template <Format FORMAT>
static inline void block_products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                  float* partials) {
    const int64_t groups = padded(w.K) / 32, blocks = (groups + BLOCK_GROUPS - 1) / BLOCK_GROUPS;
    const int64_t size = (groups + blocks - 1) / blocks, row = row_bytes(FORMAT, w.K), bytes = row_bytes(FORMAT, 32 * size);
    for (int64_t begin = 0; begin < groups; begin += size) {
        const int64_t end = std::min(groups, begin + size);
        const uint8_t* after = end < groups ? (const uint8_t*)w.data + row_bytes(FORMAT, 32 * end) : (const uint8_t*)w.from(count).data;
        NextBlock next(after, row, bytes, count, rows / 4 * ((count + 2) / 3) + (rows % 4 ? count / 8 : 0));
        for (int64_t m = 0; m < rows; m += 4) {
            float* sums = partials + m * WIDTH * 8;
            switch (rows - m) {
                case 1: block_tiles<FORMAT, 1, 8>(x + m, w, count, begin, end, sums, next); break;
                case 2: block_tiles<FORMAT, 2, 4>(x + m, w, count, begin, end, sums, next); break;
                case 3: block_tiles<FORMAT, 3, 3>(x + m, w, count, begin, end, sums, next); break;
                default: block_tiles<FORMAT, 4, 3>(x + m, w, count, begin, end, sums, next); break;
            }
        }
    }
    add_up(partials, rows, count, out, stride);
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
            const auto words = row_words<FORMAT>(data, g, w.K - 32 * g);
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
    const int64_t width = padded(w.K), row = row_bytes(FORMAT, w.K);
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
    add_up(partials, rows, count, out, stride);
}

template <Format FORMAT>
static inline void products_of(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                               float* partials) {
    constexpr bool IS_INT8 = FORMAT == Format::INT8;
    if (!IS_INT8 && rows > 4 && rows < BLOCK_ROWS) return block_products<FORMAT>(x, rows, w, count, out, stride, partials);
    switch (rows) {
        case 1: return stream_rows<FORMAT, 1, 8, 1>(x, w, count, out, stride);
        case 2: return stream_rows<FORMAT, 2, 4, 1>(x, w, count, out, stride);
        case 3: return stream_rows<FORMAT, 3, 4, IS_INT8 ? 2 : 1>(x, w, count, out, stride);
        case 4: return stream_rows<FORMAT, 4, 3, 3>(x, w, count, out, stride);
        case 5: case 6: case 7: case 8:
            products_of<FORMAT>(x, 4, w, count, out, stride, partials);
            return products_of<FORMAT>(x + 4, rows - 4, w, count, out + 4 * stride, stride, partials);
        default: return panel_products<FORMAT>(x, rows, w, count, out, stride, partials);
    }
}

#include "packed_avx2.h"

static inline int64_t x_columns(int64_t K, Format format) {
    return is_packed(format) ? (packed_columns(K) + 15) / 16 * 16 : padded(K);
}

// Columns 32 g to 32 g + 31 of a row of K.
static inline void store_group(const bf16* x, int64_t g, int64_t K, Format format, X* row) {
    if (is_packed(format)) pack_group(x, g, K / 32, format, row);
    else spread_group(x, format, row + 32 * g);
}

static inline void store_row(const bf16* x, int64_t K, Format format, X* row) {
    for (int64_t k = 0; k < K; k += 32) {
        bf16 line[32] = {0};
        const int64_t left = K - k;
        if (left < 32) std::memcpy(line, x + k, left * sizeof(bf16));
        store_group(left < 32 ? line : x + k, k / 32, K, format, row);
    }
}

// out[r * stride + j] = x[r] . row j of w, for `rows` up to MOST_ROWS and `count` up to WIDTH; `partials`: scratch.
static inline void products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                            float* partials) {
    switch (w.format) {
        case Format::BF16: return products_of<Format::BF16>(x, rows, w, count, out, stride, partials);
        case Format::MXFP4: return packed_products<Format::MXFP4>(x, rows, w, count, out, stride, partials);
        case Format::GGUF: return packed_products<Format::GGUF>(x, rows, w, count, out, stride, partials);
        case Format::INT8: return products_of<Format::INT8>(x, rows, w, count, out, stride, partials);
    }
}
