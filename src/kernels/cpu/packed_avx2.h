// MXFP4's matrix products with AVX2, in integers: the weights' codes are whole numbers of halves, and 32 columns of x become
// 16-bit numbers with a power of two in common, which is exact but for columns below 1/128 of the largest one. A group's sum is
// exact, in whatever order; then it is scaled and added to one of two chains of float32 sums, of the even groups and the odd.

#pragma once

// Columns 64 p to 64 p + 63, the first group in the lower lanes. Of each group 4 i, 4 i + 2, 4 i + 1 and 4 i + 3; against GGUF's
// blocks 2 i, 2 i + 1, 2 i + 16 and 2 i + 17.
struct GroupPair {
    int16_t columns[4][16];
    float scale[8];
};
static_assert(sizeof(GroupPair) == 160, "40 floats of a row of X");

// Else the compiler adds 16 products as a tree, for which there are not enough registers.
#define KEEP_ORDER(sum) asm("" : "+x"(sum))

static const int64_t PAIR_FLOATS = sizeof(GroupPair) / sizeof(float);
static const int64_t STREAM_ROWS = 4;  // of the matrix, multiplied together as they are read
static const int64_t PANEL_ROWS = 16, BLOCK_PAIRS = 12, PANEL_GROUPS = 2 * BLOCK_PAIRS;  // decoded at once: 14 kB
static const int PANEL_TILE = 5;  // rows of x against a panel

static constexpr bool is_packed(Format format) { return format == Format::MXFP4 || format == Format::GGUF; }
static constexpr int64_t pairs_of(int64_t K) { return (K + 63) / 64; }
static inline const GroupPair* pairs_at(const X* row) { return (const GroupPair*)row; }

// After its pairs a row has each group's scale once more, for codes that are not in upper bytes.
static constexpr int64_t packed_columns(int64_t K) { return pairs_of(K) * (PAIR_FLOATS + 2); }
static inline const float* panel_scales(const X* row, int64_t K) { return row + pairs_of(K) * PAIR_FLOATS; }

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
    row[(groups + 1) / 2 * PAIR_FLOATS + g] = 256 * pair->scale[4 * (g % 2)];
}

// The columns of a pair of groups, each in the upper byte of a word: twice the codes.
struct Codes {
    __m256i words[4];
};

// Twice the codes in the lower and in the upper halves of bytes.
static inline __m256i lower_codes(__m256i bytes) {
    const __m256i values = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    return _mm256_shuffle_epi8(values, _mm256_and_si256(bytes, _mm256_set1_epi8(15)));
}
static inline __m256i upper_codes(__m256i bytes) { return lower_codes(_mm256_srli_epi16(bytes, 4)); }

static inline Codes decode_codes(__m256i bytes) {
    const __m256i upper = _mm256_set1_epi16((short)0xFF00), first = lower_codes(bytes), second = upper_codes(bytes);
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
static inline __m256 decode_scales(__m128i eight) {
    const __m256i bits = _mm256_slli_epi32(_mm256_cvtepu8_epi32(eight), 23);
    return _mm256_castsi256_ps(_mm256_max_epi32(bits, _mm256_set1_epi32(0x00400000)));
}

// The scales of a row of `groups` from `first` on, eight or as many as are left, then ones: multiplying the denormals that zeros
// stand for is slow.
static inline __attribute__((always_inline)) int64_t eight_scales(const uint8_t* row, int64_t first, int64_t groups) {
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
static inline __attribute__((always_inline)) int64_t eight_block_scales(const uint8_t* row, int64_t first, int64_t groups) {
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

// The scales of groups `first` to `first` + 7 of row j, or of as many as are left, then ones.
template <Format FORMAT, bool WHOLE>
static inline __attribute__((always_inline)) __m128i row_scales(const Matrix& w, int64_t j, int64_t first) {
    const int64_t groups = w.K / 32, end = WHOLE ? first + 8 : groups;
    if (FORMAT == Format::MXFP4) return _mm_cvtsi64_si128(eight_scales(w.scales + j * groups, first, end));
    return _mm_cvtsi64_si128(eight_block_scales((const uint8_t*)w.data + j * row_bytes(FORMAT, w.K), first, end));
}

// The scales of four rows from j on: of four groups in each part, a group's rows side by side.
struct ScalesOfRows {
    __m128i parts[2];

    // of groups 2 n and 2 n + 1 as numbers
    __m256 pair(int n) const { return decode_scales(n % 2 ? _mm_srli_si128(parts[n / 2], 8) : parts[n / 2]); }
};

// WHOLE: eight groups are left.
template <Format FORMAT, bool WHOLE>
static inline __attribute__((always_inline)) ScalesOfRows scales_of_rows(const Matrix& w, int64_t j, int64_t first) {
    auto row = [&](int64_t n) { return row_scales<FORMAT, WHOLE>(w, j + n, first); };
    const __m128i even = _mm_unpacklo_epi8(row(0), row(1)), odd = _mm_unpacklo_epi8(row(2), row(3));
    return {{_mm_unpacklo_epi16(even, odd), _mm_unpackhi_epi16(even, odd)}};
}

// w . x of a pair of groups, in four parts of each.
static inline __m256i multiply_pair(const Codes& w, const GroupPair& x) {
    auto products = [&](int n) { return _mm256_madd_epi16(w.words[n], _mm256_load_si256((const __m256i*)x.columns[n])); };
    return _mm256_add_epi32(_mm256_add_epi32(products(0), products(1)), _mm256_add_epi32(products(2), products(3)));
}

// The sums of two vectors' lanes 0 and 2, then those of 1 and 3, in each half: first, second, first, second.
static inline __m256 add_halves(__m256i first, __m256i second) {
    return _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_unpacklo_epi32(first, second), _mm256_unpackhi_epi32(first, second)));
}

// RM rows of x against STREAM_ROWS rows of the matrix, decoded on the way.
template <Format FORMAT, int RM>
static TILE void packed_stream_tile(const X* const* x, const Matrix& w, float* out, int64_t stride) {
    const int64_t groups = w.K / 32, row = row_bytes(FORMAT, w.K), pair = row_bytes(FORMAT, 64);
    const uint8_t* data = (const uint8_t*)w.data;
    const GroupPair* at[RM];
    __m256 sums[RM];  // of the even groups of four rows, then of the odd
    UNROLLED
    for (int i = 0; i < RM; i++) {
        at[i] = pairs_at(x[i]);
        sums[i] = _mm256_setzero_ps();
    }
    if (FORMAT == Format::MXFP4)
        for (int64_t byte = 0; byte < STREAM_ROWS * groups; byte += 64)
            _mm_prefetch((const char*)(w.scales + 4 * STREAM_ROWS * groups + byte), _MM_HINT_T0);
    auto add = [&](int64_t p, int64_t end, __m256 scale) __attribute__((always_inline)) {
        __m256d halves[RM][2];
        UNROLLED
        for (int j = 0; j < STREAM_ROWS; j += 2) {
            const Codes first = decode_codes(pair_bytes<FORMAT>(data + j * row, p, end));
            const Codes second = decode_codes(pair_bytes<FORMAT>(data + (j + 1) * row, p, end));
            UNROLLED
            for (int i = 0; i < RM; i++)
                halves[i][j / 2] = _mm256_castps_pd(add_halves(multiply_pair(first, at[i][p]), multiply_pair(second, at[i][p])));
        }
        UNROLLED
        for (int i = 0; i < RM; i++) {
            const __m256 four = _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(halves[i][0], halves[i][1])),
                                              _mm256_castpd_ps(_mm256_unpackhi_pd(halves[i][0], halves[i][1])));
            sums[i] = _mm256_fmadd_ps(four, _mm256_mul_ps(scale, _mm256_load_ps(at[i][p].scale)), sums[i]);
        }
    };
    int64_t p = 0;
    for (; 2 * p + 8 <= groups; p += 4) {
        UNROLLED
        for (int j = 0; j < STREAM_ROWS; j++) {
            prefetch(data + j * row + pair * p, 256, STREAM_ROWS * row);
            prefetch(data + j * row + pair * p + 64, 256, STREAM_ROWS * row);
            if (FORMAT == Format::GGUF) prefetch(data + j * row + pair * p + 128, 256, STREAM_ROWS * row);  // 136 bytes
        }
        const ScalesOfRows scales = scales_of_rows<FORMAT, true>(w, 0, 2 * p);
        UNROLLED
        for (int n = 0; n < 4; n++) add(p + n, 2 * (p + n) + 2, scales.pair(n));
    }
    if (2 * p < groups) {
        const ScalesOfRows scales = scales_of_rows<FORMAT, false>(w, 0, 2 * p);
        UNROLLED
        for (int n = 0; n < 4; n++)
            if (2 * (p + n) < groups) add(p + n, groups, scales.pair(n));
    }
    UNROLLED
    for (int i = 0; i < RM; i++)
        _mm_storeu_ps(out + i * stride, _mm_add_ps(_mm256_castps256_ps128(sums[i]), _mm256_extractf128_ps(sums[i], 1)));
}

template <Format FORMAT, int RM>
static inline void packed_stream(const X* const* x, const Matrix& w, int64_t count, float* out, int64_t stride) {
    for (int64_t n = 0; n < count; n += STREAM_ROWS) packed_stream_tile<FORMAT, RM>(x, w.from(n), out + n, stride);
}

// Decoded rows in which a lane is a row of the matrix. Of each group: 16 times two columns, in the order of GroupPair's, of
// eight rows and eight more.
struct CodePanel {
    alignas(32) int8_t codes[PANEL_GROUPS][16][PANEL_ROWS][2];
    alignas(32) float scales[PANEL_GROUPS][PANEL_ROWS];
};

// rows[r] [2][8] 16-bit units -> out[u] [2][8]: unit u of each row.
static inline void transpose_units(const __m256i rows[8], __m256i out[8]) {
    __m256i two[8], four[8];
    UNROLLED
    for (int n = 0; n < 4; n++) {
        two[n] = _mm256_unpacklo_epi16(rows[2 * n], rows[2 * n + 1]);  // units 0 to 3
        two[4 + n] = _mm256_unpackhi_epi16(rows[2 * n], rows[2 * n + 1]);
    }
    UNROLLED
    for (int n = 0; n < 8; n += 2) {
        four[n] = _mm256_unpacklo_epi32(two[n], two[n + 1]);  // two units of four rows
        four[n + 1] = _mm256_unpackhi_epi32(two[n], two[n + 1]);
    }
    UNROLLED
    for (int n = 0; n < 8; n += 4)
        UNROLLED
        for (int k = 0; k < 2; k++) {
            out[n + 2 * k] = _mm256_unpacklo_epi64(four[n + k], four[n + 2 + k]);
            out[n + 2 * k + 1] = _mm256_unpackhi_epi64(four[n + k], four[n + 2 + k]);
        }
}

// Pair p of eight rows into groups 2 n and 2 n + 1 of the panel, from row `first` of it on.
template <Format FORMAT>
static inline void decode_pair_of_rows(const Matrix& w, int64_t p, int64_t n, int64_t first, CodePanel& panel) {
    const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15));
    __m256i codes[2][8], units[8];
    UNROLLED
    for (int j = 0; j < 8; j++) {
        const uint8_t* row = (const uint8_t*)w.data + j * row_bytes(FORMAT, w.K);
        const __m256i bytes = _mm256_shuffle_epi8(pair_bytes<FORMAT>(row, p, w.K / 32), order);
        codes[0][j] = lower_codes(bytes);
        codes[1][j] = upper_codes(bytes);
    }
    UNROLLED
    for (int half = 0; half < 2; half++) {
        transpose_units(codes[half], units);
        UNROLLED
        for (int u = 0; u < 8; u++) {
            _mm_store_si128((__m128i*)panel.codes[2 * n][8 * half + u][first], _mm256_castsi256_si128(units[u]));
            _mm_store_si128((__m128i*)panel.codes[2 * n + 1][8 * half + u][first], _mm256_extracti128_si256(units[u], 1));
        }
    }
}

// Pairs p0 to p0 + pairs - 1 of PANEL_ROWS rows.
template <Format FORMAT>
static inline void decode_panel(const Matrix& w, int64_t p0, int64_t pairs, CodePanel& panel) {
    for (int64_t j = 0; j < PANEL_ROWS; j += 8)
        for (int64_t n = 0; n < pairs; n++) decode_pair_of_rows<FORMAT>(w.from(j), p0 + n, n, j, panel);
    for (int64_t j = 0; j < PANEL_ROWS; j += 4)
        for (int64_t n = 0; n < pairs; n++) {
            const __m256 scales = scales_of_rows<FORMAT, false>(w, j, 2 * (p0 + n / 4 * 4)).pair(int(n % 4));
            _mm_store_ps(panel.scales[2 * n] + j, _mm256_castps256_ps128(scales));
            _mm_store_ps(panel.scales[2 * n + 1] + j, _mm256_extractf128_ps(scales, 1));
        }
}

// RM rows of x against a panel, over `groups` from pair p0 on, added to `sums` [row of x][WIDTH][8]: of the even groups of
// PANEL_ROWS rows, then of the odd.
template <int RM>
static TILE void packed_panel_tile(const X* const* x, int64_t K, int64_t p0, const CodePanel& panel, int64_t groups, float* sums,
                                   NextBlock& next) {
    const int32_t* at[RM];
    const float* scales[RM];
    UNROLLED
    for (int i = 0; i < RM; i++) {
        at[i] = (const int32_t*)(pairs_at(x[i]) + p0);
        scales[i] = panel_scales(x[i], K) + 2 * p0;
    }
    for (int64_t g = 0; g < groups; g++) {
        const int64_t offset = g / 2 * PAIR_FLOATS + g % 2 * 4;
        __m256i group[RM][2];
        next.prefetch();
        _Pragma("GCC unroll 16")
        for (int n = 0; n < 16; n++) {
            const __m128i* codes = (const __m128i*)panel.codes[g][n];
            const __m256i low = _mm256_cvtepi8_epi16(_mm_load_si128(codes)), high = _mm256_cvtepi8_epi16(_mm_load_si128(codes + 1));
            UNROLLED
            for (int i = 0; i < RM; i++) {
                const __m256i columns = _mm256_set1_epi32(at[i][offset + n / 4 * 8 + n % 4]);
                const __m256i first = _mm256_madd_epi16(low, columns), second = _mm256_madd_epi16(high, columns);
                group[i][0] = n ? _mm256_add_epi32(group[i][0], first) : first;
                group[i][1] = n ? _mm256_add_epi32(group[i][1], second) : second;
                KEEP_ORDER(group[i][0]);
                KEEP_ORDER(group[i][1]);
            }
        }
        UNROLLED
        for (int i = 0; i < RM; i++) {
            float* to = sums + i * WIDTH * 8 + g % 2 * PANEL_ROWS;
            const __m256 scale = _mm256_broadcast_ss(scales[i] + g);
            UNROLLED
            for (int half = 0; half < 2; half++) {
                const __m256 both = _mm256_mul_ps(_mm256_load_ps(panel.scales[g] + 8 * half), scale);
                const __m256 sum = _mm256_loadu_ps(to + 8 * half);
                _mm256_storeu_ps(to + 8 * half, _mm256_fmadd_ps(_mm256_cvtepi32_ps(group[i][half]), both, sum));
            }
        }
    }
}

template <Format FORMAT>
static inline void packed_panels(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                 float* partials) {
    CodePanel panel;
    const int64_t groups = w.K / 32, all = pairs_of(w.K), row = row_bytes(FORMAT, w.K), pair = row_bytes(FORMAT, 64);
    const int64_t tiles = (rows + PANEL_TILE - 1) / PANEL_TILE;
    for (int64_t m = 0; m < rows; m++) std::fill_n(partials + m * WIDTH * 8, 2 * count, 0.0f);
    for (int64_t p0 = 0; p0 < all; p0 += BLOCK_PAIRS)
        for (int64_t n = 0; n < count; n += PANEL_ROWS) {
            const int64_t pairs = std::min(BLOCK_PAIRS, all - p0), some = std::min(2 * pairs, groups - 2 * p0);
            decode_panel<FORMAT>(w.from(n), p0, pairs, panel);
            const bool is_last = n + PANEL_ROWS >= count, is_end = p0 + BLOCK_PAIRS >= all;
            const int64_t row_after = is_last ? (is_end ? count : 0) : n + PANEL_ROWS, after = is_last ? (is_end ? 0 : p0 + BLOCK_PAIRS) : p0;
            NextBlock next((const uint8_t*)w.from(row_after).data + pair * after, row, pair * BLOCK_PAIRS, PANEL_ROWS, some * tiles);
            for (int64_t tile = 0, m = 0; tile < tiles; tile++) {
                const int64_t size = (rows - m) / (tiles - tile);
                float* sums = partials + m * WIDTH * 8 + 2 * n;
                switch (size) {
                    case 1: packed_panel_tile<1>(x + m, w.K, p0, panel, some, sums, next); break;
                    case 2: packed_panel_tile<2>(x + m, w.K, p0, panel, some, sums, next); break;
                    case 3: packed_panel_tile<3>(x + m, w.K, p0, panel, some, sums, next); break;
                    case 4: packed_panel_tile<4>(x + m, w.K, p0, panel, some, sums, next); break;
                    default: packed_panel_tile<PANEL_TILE>(x + m, w.K, p0, panel, some, sums, next); break;
                }
                m += size;
            }
        }
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < count; n += PANEL_ROWS)
            for (int64_t j = 0; j < PANEL_ROWS; j++) {
                const float* sum = partials + m * WIDTH * 8 + 2 * n + j;
                out[m * stride + n + j] = sum[0] + sum[PANEL_ROWS];
            }
}

// `count` is a multiple of PANEL_ROWS.
template <Format FORMAT>
static inline void packed_products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                                   float* partials) {
    switch (rows) {
        case 1: return packed_stream<FORMAT, 1>(x, w, count, out, stride);
        case 2: return packed_stream<FORMAT, 2>(x, w, count, out, stride);
        case 3: return packed_stream<FORMAT, 3>(x, w, count, out, stride);
        case 4: return packed_stream<FORMAT, 4>(x, w, count, out, stride);
        default: return packed_panels<FORMAT>(x, rows, w, count, out, stride, partials);
    }
}
