// MXFP4's matrix products with AVX2, in integers: the weights' codes are whole numbers of halves, and 32 columns of x become
// 16-bit numbers with a power of two in common, which is exact but for columns below 1/128 of the largest one. A group's sum is
// exact; then it is scaled and added to a chain of float32 sums, two groups at a time.

#pragma once

// Columns 64 p to 64 p + 63, the first group in the lower lanes. Of each group 4 i, 4 i + 2, 4 i + 1 and 4 i + 3; against GGUF's
// blocks 2 i, 2 i + 1, 2 i + 16 and 2 i + 17.
struct GroupPair {
    int16_t columns[4][16];
    float scale[8];
};
static_assert(sizeof(GroupPair) == 160, "40 floats of a row of X");

static const int64_t PAIR_FLOATS = sizeof(GroupPair) / sizeof(float);
static const int64_t PACKED_PANEL = 8, BLOCK_PAIRS = 12;  // rows and pairs that are decoded at once: 15 kB

static constexpr bool is_packed(Format format) { return format == Format::MXFP4 || format == Format::GGUF; }
static constexpr int64_t pairs_of(int64_t K) { return (K + 63) / 64; }
static inline const GroupPair* pairs_at(const X* row) { return (const GroupPair*)row; }

// After its pairs a row has the scales once more, one of each group, and ones: eight may be read from any even one on.
static constexpr int64_t packed_columns(int64_t K) { return pairs_of(K) * (PAIR_FLOATS + 2) + 7; }

// 16 words in the order even, odd of each lane.
static inline __m256i split_words(__m256i words) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6,
                                           7, 10, 11, 14, 15);
    return _mm256_permute4x64_epi64(_mm256_shuffle_epi8(words, order), _MM_SHUFFLE(3, 1, 2, 0));
}

// 32 bfloat16 numbers of x into lane `lane` of `out`.
static inline void pack_group(const bf16* x, int64_t lane, Format format, GroupPair* out) {
    const __m256i a = _mm256_loadu_si256((const __m256i*)x), b = _mm256_loadu_si256((const __m256i*)(x + 16));
    const __m256i all = _mm256_set1_epi16(0x7FFF), high = _mm256_set1_epi32((int)0xFFFF0000);
    const __m256i most = _mm256_max_epu16(_mm256_and_si256(a, all), _mm256_and_si256(b, all));
    const __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    const int peak = 0xFFFF - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1))), 0);
    const int exponent = std::max(peak >> 7, 24);  // below 2^-103 x loses digits
    const __m256 factor = _mm256_castsi256_ps(_mm256_set1_epi32((268 - exponent) << 23));  // the largest: 2^14 to 2^15
    auto integers = [&](__m256i low, __m256i up) {
        const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(low), factor)),
                                                 _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_castsi256_ps(up), factor)));
        const __m256i ordered = _mm256_permute4x64_epi64(words, _MM_SHUFFLE(3, 1, 2, 0));
        return format == Format::GGUF ? ordered : split_words(ordered);
    };
    const __m256i even = integers(_mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
    const __m256i odd = integers(_mm256_and_si256(a, high), _mm256_and_si256(b, high));
    _mm_storeu_si128((__m128i*)&out->columns[0][8 * lane], _mm256_castsi256_si128(even));
    const int second = format == Format::GGUF ? 2 : 1;
    _mm_storeu_si128((__m128i*)&out->columns[second][8 * lane], _mm256_extracti128_si256(even, 1));
    _mm_storeu_si128((__m128i*)&out->columns[3 - second][8 * lane], _mm256_castsi256_si128(odd));
    _mm_storeu_si128((__m128i*)&out->columns[3][8 * lane], _mm256_extracti128_si256(odd, 1));
    // 2^-14 of x, 2^-1 of the codes, 2^-8 of the upper bytes in which they are multiplied
    const __m128 scale = _mm_castsi128_ps(_mm_set1_epi32((exponent - 23) << 23));
    _mm_storeu_ps(&out->scale[4 * lane], peak < 0x7F80 ? scale : _mm_set1_ps(NAN));
}

// Group g of a row of `groups`; an odd row's last pair ends with zeros.
static inline void pack_group(const bf16* x, int64_t g, int64_t groups, Format format, X* row) {
    static const bf16 ZEROS[32] = {0};
    GroupPair* pair = (GroupPair*)row + g / 2;
    pack_group(x, g % 2, format, pair);
    if (g + 1 == groups && g % 2 == 0) pack_group(ZEROS, 1, format, pair);
    float* scale = row + (groups + 1) / 2 * PAIR_FLOATS + g;
    *scale = pair->scale[4 * (g % 2)];
    if (g + 1 == groups) std::fill(scale + 1, scale + 8, 1.0f);
}

// The columns of a pair of groups, each in the upper byte of a word: twice the codes.
struct Codes {
    __m256i words[4];
};

static inline Codes decode_codes(__m256i bytes) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const __m256i low = _mm256_set1_epi8(15), upper = _mm256_set1_epi16((short)0xFF00);
    const __m256i first = _mm256_shuffle_epi8(values, _mm256_and_si256(bytes, low));
    const __m256i second = _mm256_shuffle_epi8(values, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), low));
    return {{_mm256_slli_epi16(first, 8), _mm256_and_si256(first, upper), _mm256_slli_epi16(second, 8),
             _mm256_and_si256(second, upper)}};
}

// The codes of pair p of a row of `groups` groups: 32 bytes, or 16 and zeros.
template <Format FORMAT>
static inline __attribute__((always_inline)) __m256i pair_bytes(const uint8_t* row, int64_t p, int64_t groups) {
    constexpr bool IN_BLOCKS = FORMAT == Format::GGUF;
    const uint8_t* at = row + p * row_bytes(FORMAT, 64) + IN_BLOCKS;
    if (2 * p + 1 == groups) return _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i*)at));
    if (!IN_BLOCKS) return _mm256_loadu_si256((const __m256i*)at);
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)at)),
                                   _mm_loadu_si128((const __m128i*)(at + GGUF_BLOCK)), 1);
}

// 2^(s - 127) of eight E8M0 scales; s = 0 is the denormal 2^-127.
static inline __m256 decode_scales(int64_t eight) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(eight)), 23);
    return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x00400000)));
}

// The scales of a row of `groups` from `first` on, eight or as many as are left, then ones: multiplying the denormals that zeros
// stand for is slow.
static inline int64_t eight_scales(const uint8_t* row, int64_t first, int64_t groups) {
    const int64_t left = groups - first;
    uint64_t eight = 0;
    if (left >= 8) std::memcpy(&eight, row + first, 8);
    else if (groups >= 8) {
        std::memcpy(&eight, row + groups - 8, 8);
        eight = eight >> (8 * (8 - left)) | 0x7F7F7F7F7F7F7F7Fu << (8 * left);
    } else
        for (int64_t n = 0; n < 8; n++) eight |= uint64_t(n < left ? row[first + n] : 127) << (8 * n);
    return int64_t(eight);
}

// The same of a row in GGUF's blocks.
static inline int64_t eight_block_scales(const uint8_t* row, int64_t first, int64_t groups) {
    const int64_t left = groups - first;
    const uint8_t* at = row + first * GGUF_BLOCK;
    uint64_t eight = 0;
    if (left >= 8)
        UNROLLED
        for (int64_t n = 0; n < 8; n++) eight |= uint64_t(at[n * GGUF_BLOCK]) << (8 * n);
    else
        for (int64_t n = 0; n < 8; n++) eight |= uint64_t(n < left ? at[n * GGUF_BLOCK] : 127) << (8 * n);
    return int64_t(eight);
}

// The scales of groups `first` to `first` + 7 of row j.
template <Format FORMAT>
static inline __attribute__((always_inline)) __m256 scales_of(const Matrix& w, int64_t j, int64_t first) {
    const int64_t groups = w.K / 32;
    if (FORMAT == Format::MXFP4) return decode_scales(eight_scales(w.scales + j * groups, first, groups));
    return decode_scales(eight_block_scales((const uint8_t*)w.data + j * row_bytes(FORMAT, w.K), first, groups));
}

// Scales 2 n and 2 n + 1 of eight, each in the lanes of its group.
static inline __m256 spread_scales(__m256 eight, int n) {
    return _mm256_permutevar8x32_ps(eight, _mm256_setr_epi32(2 * n, 2 * n, 2 * n, 2 * n, 2 * n + 1, 2 * n + 1, 2 * n + 1, 2 * n + 1));
}

// sum + scale (w . x) in each of eight lanes
static inline __m256 add_group(__m256 sum, const Codes& w, __m256 scale, const GroupPair& x) {
    auto products = [&](int n) { return _mm256_madd_epi16(w.words[n], _mm256_loadu_si256((const __m256i*)x.columns[n])); };
    const __m256i group = _mm256_add_epi32(_mm256_add_epi32(products(0), products(1)), _mm256_add_epi32(products(2), products(3)));
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(group), scale, sum);
}

// RM rows of x against RN rows of the matrix, decoded on the way, four pairs of a row after the other.
template <Format FORMAT, int RM, int RN>
static TILE void packed_stream_tile(const X* const* x, const Matrix& w, float* out, int64_t stride) {
    const int64_t groups = w.K / 32, row = row_bytes(FORMAT, w.K), pair = row_bytes(FORMAT, 64);
    const uint8_t* data = (const uint8_t*)w.data;
    const GroupPair* at[RM];
    const float* scales_of_x = x[0] + pairs_of(w.K) * PAIR_FLOATS;  // for one row of x; for more they are multiplied one by one
    __m256 sums[RM][RN];
    UNROLLED
    for (int i = 0; i < RM; i++) {
        at[i] = pairs_at(x[i]);
        UNROLLED
        for (int j = 0; j < RN; j++) sums[i][j] = _mm256_setzero_ps();
    }
    if (FORMAT == Format::MXFP4)
        for (int64_t byte = 0; byte < RN * groups; byte += 64) _mm_prefetch((const char*)(w.scales + 4 * RN * groups + byte), _MM_HINT_T0);
    auto add = [&](int j, int64_t p, int of_four, __m256i bytes, __m256 eight) __attribute__((always_inline)) {
        const Codes codes = decode_codes(bytes);
        const __m256 spread = spread_scales(eight, of_four);
        UNROLLED
        for (int i = 0; i < RM; i++) {
            const __m256 scale = RM == 1 ? spread : _mm256_mul_ps(spread, _mm256_loadu_ps(at[i][p].scale));
            sums[i][j] = add_group(sums[i][j], codes, scale, at[i][p]);
        }
    };
    auto scales_at = [&](int j, int64_t p) __attribute__((always_inline)) {
        const __m256 scales = scales_of<FORMAT>(w, j, 2 * p);
        return RM == 1 ? _mm256_mul_ps(scales, _mm256_loadu_ps(scales_of_x + 2 * p)) : scales;
    };
    int64_t p = 0;
    for (; 2 * p + 8 <= groups; p += 4) {
        __m256 scales[RN];
        UNROLLED
        for (int j = 0; j < RN; j++) {
            prefetch(data + j * row + pair * p, 128, 2 * RN * row);
            prefetch(data + j * row + pair * p + 64, 128, 2 * RN * row);
            if (FORMAT == Format::GGUF) prefetch(data + j * row + pair * p + 128, 128, 2 * RN * row);  // 136 bytes
            scales[j] = scales_at(j, p);
        }
        _Pragma("GCC unroll 16")
        for (int step = 0; step < 4 * RN; step++) {  // with one row of x row by row, with more each pair of x once
            const int j = RM == 1 ? step / 4 : step % RN, n = RM == 1 ? step % 4 : step / RN;
            add(j, p + n, n, pair_bytes<FORMAT>(data + j * row, p + n, 2 * (p + n) + 2), scales[j]);
        }
    }
    if (2 * p < groups)
        UNROLLED
        for (int j = 0; j < RN; j++) {
            const __m256 scales = scales_at(j, p);
            UNROLLED
            for (int n = 0; n < 4; n++)
                if (2 * (p + n) < groups) add(j, p + n, n, pair_bytes<FORMAT>(data + j * row, p + n, groups), scales);
        }
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < RN; j += 4) {
            const __m256 none = _mm256_setzero_ps();
            alignas(16) float four[4];
            _mm_store_ps(four, sum4(sums[i][j], j + 1 < RN ? sums[i][j + 1] : none, j + 2 < RN ? sums[i][j + 2] : none,
                                    j + 3 < RN ? sums[i][j + 3] : none));
            for (int n = 0; n < 4 && j + n < RN; n++) out[i * stride + j + n] = four[n];
        }
}

template <Format FORMAT, int RM, int RN>
static inline void packed_stream(const X* const* x, const Matrix& w, int64_t count, float* out, int64_t stride) {
    for (int64_t n = 0; n < count; n += RN) packed_stream_tile<FORMAT, RM, RN>(x, w.from(n), out + n, stride);
}

// RM rows of x against 2 decoded rows, over `pairs`; the sums lie in `partials` [row of x][WIDTH][8] in between.
template <int RM>
static TILE void packed_panel_tile(const X* const* x, int64_t p0, const GroupPair* panel, int64_t pairs, float* partials, bool first) {
    const GroupPair* at[RM];
    __m256 sums[RM][2];
    UNROLLED
    for (int i = 0; i < RM; i++) {
        at[i] = pairs_at(x[i]) + p0;
        UNROLLED
        for (int j = 0; j < 2; j++) sums[i][j] = first ? _mm256_setzero_ps() : _mm256_loadu_ps(partials + (i * WIDTH + j) * 8);
    }
    for (int64_t p = 0; p < pairs; p++) {
        UNROLLED
        for (int j = 0; j < 2; j++) {
            const GroupPair& w = panel[j * BLOCK_PAIRS + p];
            Codes codes;
            UNROLLED
            for (int n = 0; n < 4; n++) codes.words[n] = _mm256_load_si256((const __m256i*)w.columns[n]);
            const __m256 scale = _mm256_load_ps(w.scale);
            UNROLLED
            for (int i = 0; i < RM; i++) sums[i][j] = add_group(sums[i][j], codes, _mm256_mul_ps(scale, _mm256_loadu_ps(at[i][p].scale)), at[i][p]);
        }
    }
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < 2; j++) _mm256_storeu_ps(partials + (i * WIDTH + j) * 8, sums[i][j]);
}

template <Format FORMAT>
static inline void decode_packed_panel(const Matrix& w, int64_t count, int64_t p0, int64_t pairs, GroupPair* panel) {
    const int64_t groups = w.K / 32;
    for (int64_t j = 0; j < count; j++)
        for (int64_t p = 0; p < pairs; p += 4) {
            const __m256 scales = scales_of<FORMAT>(w, j, 2 * (p0 + p));
            for (int64_t n = 0; n < std::min<int64_t>(4, pairs - p); n++) {
                const Codes codes = decode_codes(pair_bytes<FORMAT>((const uint8_t*)w.from(j).data, p0 + p + n, groups));
                GroupPair& to = panel[j * BLOCK_PAIRS + p + n];
                for (int i = 0; i < 4; i++) _mm256_store_si256((__m256i*)to.columns[i], codes.words[i]);
                _mm256_store_ps(to.scale, spread_scales(scales, int(n)));
            }
        }
}

template <Format FORMAT>
static inline void packed_panels(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                 float* partials) {
    alignas(64) GroupPair panel[PACKED_PANEL * BLOCK_PAIRS];
    const int64_t all = pairs_of(w.K), row = row_bytes(FORMAT, w.K), pair = row_bytes(FORMAT, 64), parts = (rows + 3) / 4 * (PACKED_PANEL / 2);
    for (int64_t p0 = 0; p0 < all; p0 += BLOCK_PAIRS)
        for (int64_t n0 = 0; n0 < count; n0 += PACKED_PANEL) {
            const int64_t pairs = std::min(BLOCK_PAIRS, all - p0), some = std::min(PACKED_PANEL, count - n0);
            decode_packed_panel<FORMAT>(w.from(n0), some, p0, pairs, panel);
            const bool is_last = n0 + PACKED_PANEL >= count, is_end = p0 + BLOCK_PAIRS >= all;
            const int64_t row_after = is_last ? (is_end ? count : 0) : n0 + PACKED_PANEL, after = is_last ? (is_end ? 0 : p0 + BLOCK_PAIRS) : p0;
            NextBlock next((const uint8_t*)w.from(row_after).data + pair * after, row, pair * BLOCK_PAIRS, PACKED_PANEL, parts);
            for (int64_t m = 0; m < rows; m += 4)
                for (int64_t n = 0; n < some; n += 2) {
                    float* sums = partials + (m * WIDTH + n0 + n) * 8;
                    const GroupPair* weights = panel + n * BLOCK_PAIRS;
                    next.prefetch();
                    switch (rows - m) {
                        case 1: packed_panel_tile<1>(x + m, p0, weights, pairs, sums, p0 == 0); break;
                        case 2: packed_panel_tile<2>(x + m, p0, weights, pairs, sums, p0 == 0); break;
                        case 3: packed_panel_tile<3>(x + m, p0, weights, pairs, sums, p0 == 0); break;
                        default: packed_panel_tile<4>(x + m, p0, weights, pairs, sums, p0 == 0); break;
                    }
                }
        }
    add_up(partials, rows, count, out, stride);
}

// `count` is a multiple of 8.
template <Format FORMAT>
static inline void packed_products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                   float* partials) {
    switch (rows) {
        case 1: return packed_stream<FORMAT, 1, 4>(x, w, count, out, stride);
        case 2: return packed_stream<FORMAT, 2, 4>(x, w, count, out, stride);
        case 3: return packed_stream<FORMAT, 3, 2>(x, w, count, out, stride);
        case 4: return packed_stream<FORMAT, 4, 2>(x, w, count, out, stride);
        default: return packed_panels<FORMAT>(x, rows, w, count, out, stride, partials);
    }
}
