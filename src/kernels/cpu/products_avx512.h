// Matrix products with AVX-512 and its BF16 dot product; see products.h.

#pragma once

typedef bf16 X;
static const int64_t PARTIALS = 0;

static inline int64_t x_columns(int64_t K, Format) { return K; }

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
            if (PREFETCH) prefetch(w + j * K + k, 512, 2 * ahead);
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

// bfloat16 of each code under the scales 2^-254 to 1, twice: the fifth bit of an index does not matter.
struct ScaledCodes {
    alignas(64) bf16 words[255][32];
    ScaledCodes() {
        for (int e = 0; e < 255; e++)
            for (int i = 0; i < 32; i++)
                words[e][i] = to_bf16(std::ldexp(i & 8 ? -E2M1[i & 7] : E2M1[i & 7], e - 254));
    }
};
static const ScaledCodes SCALED_CODES;

// For each place in a block of GGUF: the bytes of the 64 from there on that are scales.
struct ScalePlaces {
    uint64_t masks[GGUF_BLOCK] = {};
    ScalePlaces() {
        for (int64_t place = 0; place < GGUF_BLOCK; place++)
            for (int64_t i = 0; i < 64; i++) masks[place] |= uint64_t((place + i) % GGUF_BLOCK == 0) << i;
    }
};
static const ScalePlaces SCALE_PLACES;

static inline int largest_byte(__m512i bytes) {
    const __m256i half = _mm256_max_epu8(_mm512_castsi512_si256(bytes), _mm512_extracti64x4_epi64(bytes, 1));
    const __m128i bytes16 = _mm_max_epu8(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    const __m128i words = _mm_max_epu16(_mm_and_si128(bytes16, _mm_set1_epi16(255)), _mm_srli_epi16(bytes16, 8));
    return 0xFFFF - _mm_extract_epi16(_mm_minpos_epu16(_mm_xor_si128(words, _mm_set1_epi16(-1))), 0);
}

// The largest scale of a row: of one for each group, or of GGUF's blocks.
template <bool IN_BLOCKS>
static inline int largest_scale(const uint8_t* row, int64_t groups) {
    const int64_t bytes = IN_BLOCKS ? groups * GGUF_BLOCK : groups;
    __m512i most = _mm512_setzero_si512();
    for (int64_t at = 0, place = 0; at < bytes; at += 64, place = (place + 64) % GGUF_BLOCK) {
        const uint64_t there = bytes - at < 64 ? (uint64_t(1) << (bytes - at)) - 1 : ~uint64_t(0);
        const uint64_t scales = IN_BLOCKS ? SCALE_PLACES.masks[place] : ~uint64_t(0);
        most = _mm512_max_epu8(most, _mm512_maskz_loadu_epi8(scales & there, row + at));
    }
    return largest_byte(most);
}

// Four neighbouring rows of MXFP4. A row's codes are decoded under the ratios of their scales to the row's largest, so that
// neither the largest nor the smallest E8M0 scales leave what bfloat16 holds; sums are multiplied by `factors`.
template <Format FORMAT>
struct FourRows {
    static constexpr bool IN_BLOCKS = FORMAT == Format::GGUF;
    static constexpr int64_t STEP = IN_BLOCKS ? GGUF_BLOCK : 16, SCALE_STEP = IN_BLOCKS ? GGUF_BLOCK : 1;
    static constexpr int64_t ASKED = IN_BLOCKS ? 2 : 4;  // groups between two lines that are asked for
    const uint8_t *data, *scales;
    int64_t groups, row, scale_row;
    const bf16* codes[4];  // under scale 0
    alignas(16) float factors[4];

    FourRows(const Matrix& w, const int* largest)  // scales of the rows
        : data((const uint8_t*)w.data + IN_BLOCKS),
          scales(IN_BLOCKS ? (const uint8_t*)w.data : w.scales),
          groups(w.K / 32),
          row(row_bytes(FORMAT, w.K)),
          scale_row(IN_BLOCKS ? row : groups) {
        for (int j = 0; j < 4; j++) {
            codes[j] = SCALED_CODES.words[254 - std::min(largest[j], 254)];
            const uint32_t bits = largest[j] ? uint32_t(largest[j]) << 23 : 0x00400000;  // 2^-127 is a denormal
            std::memcpy(&factors[j], &bits, 4);
        }
    }

    B group(int j, int64_t g) const {
        const __m128i bytes = _mm_loadu_si128((const __m128i*)(data + j * row + STEP * g));
        __m512i indices;
        if constexpr (IN_BLOCKS) {  // words b of all bytes, then b >> 4
            const __m256i words = _mm256_cvtepu8_epi16(bytes);
            indices = _mm512_inserti64x4(_mm512_castsi256_si512(words), _mm256_srli_epi16(words, 4), 1);
        } else {  // words b and b >> 4 of each byte
            const __m512i wide = _mm512_cvtepu8_epi32(bytes);
            indices = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 12));
        }
        return (__m512bh)_mm512_permutexvar_epi16(indices, _mm512_load_si512(codes[j] + 32 * scales[j * scale_row + SCALE_STEP * g]));
    }

    // Calls use(j, g, columns) for each row j and group g, and asks for what the next rows have there.
    template <typename Use>
    __attribute__((always_inline)) void each_group(const Use& use) const {
        int64_t g = 0;
        auto some = [&](int64_t count) __attribute__((always_inline)) {
            UNROLLED
            for (int n = 0; n < count; n++)
                UNROLLED
                for (int j = 0; j < 4; j++) use(j, g + n, group(j, g + n));
        };
        for (; g + ASKED <= groups; g += ASKED) {
            UNROLLED
            for (int j = 0; j < 4; j++) prefetch(data + j * row + STEP * g, 128, 16 * row);
            some(ASKED);
        }
        for (; g < groups; g++) some(1);
    }
};

// RM rows of x against 4 neighbouring rows of the matrix.
template <int RM, Format FORMAT>
static TILE void packed_tile(const X* const* x, const FourRows<FORMAT>& rows, float* out, int64_t stride) {
    F acc[RM][4];
    UNROLLED
    for (int i = 0; i < RM; i++)
        UNROLLED
        for (int j = 0; j < 4; j++) acc[i][j] = f_set(0);
    const FourRows<FORMAT> four = rows;
    four.each_group([&](int j, int64_t g, B columns) __attribute__((always_inline)) {
        UNROLLED
        for (int i = 0; i < RM; i++) acc[i][j] = b_dot(acc[i][j], b_load(x[i] + 32 * g, 32), columns);
    });
    const __m128 factors = _mm_load_ps(rows.factors);
    UNROLLED
    for (int i = 0; i < RM; i++)
        _mm_storeu_ps(out + i * stride, _mm_mul_ps(f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]), factors));
}

// Four rows of the matrix: for few rows of x decoded in registers, for many once.
template <Format FORMAT>
static inline void packed_rows(const X* const* x, int64_t count, const Matrix& w, const int* largest, float* out, int64_t stride) {
    const FourRows<FORMAT> rows(w, largest);
    switch (count) {
        case 1: return packed_tile<1, FORMAT>(x, rows, out, stride);
        case 2: return packed_tile<2, FORMAT>(x, rows, out, stride);
        case 3: return packed_tile<3, FORMAT>(x, rows, out, stride);
        case 4: return packed_tile<4, FORMAT>(x, rows, out, stride);
        case 5: return packed_tile<5, FORMAT>(x, rows, out, stride);
        case 6: return packed_tile<6, FORMAT>(x, rows, out, stride);
    }
    bf16* decoded = kept_scratch<bf16, 6>(4 * w.K);
    rows.each_group([&](int j, int64_t g, B columns) __attribute__((always_inline)) {
        _mm512_store_si512(decoded + j * w.K + 32 * g, (__m512i)columns);
    });
    dot_rows<4, false>(x, count, decoded, w.K, out, stride, 0);
    const __m128 factors = _mm_load_ps(rows.factors);
    for (int64_t m = 0; m < count; m++)
        _mm_storeu_ps(out + m * stride, _mm_mul_ps(_mm_loadu_ps(out + m * stride), factors));
}

template <Format FORMAT>
static inline void packed_products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride) {
    constexpr bool IN_BLOCKS = FORMAT == Format::GGUF;
    int largest[WIDTH];
    if (!IN_BLOCKS)
        for (int64_t byte = 0, bytes = count * w.K / 32; byte < bytes; byte += 64) _mm_prefetch((const char*)(w.scales + bytes + byte), _MM_HINT_T0);
    for (int64_t n = 0; n < count; n++) {
        const Matrix row = w.from(n);
        largest[n] = largest_scale<IN_BLOCKS>(IN_BLOCKS ? (const uint8_t*)row.data : row.scales, w.K / 32);
    }
    for (int64_t n = 0; n < count; n += 4) packed_rows<FORMAT>(x, rows, w.from(n), largest + n, out + n, stride);
}

// RM rows of x against RN neighbouring rows of the matrix; the weights after them are asked for on the way.
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
            if (k % 64 == 0) prefetch(at, 512, 2 * RN * row);
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
            if (k % 64 == 0) prefetch(at, 512, 8 * row);
            _mm512_storeu_si512(decoded + j * K + k, (__m512i)b_from_int8(at));
        }
    dot_rows<4, false>(x, rows, decoded, K, out, stride, 0);
}

// out[r * stride + j] = x[r] . row j of w, for `rows` up to MOST_ROWS and `count` up to WIDTH, a multiple of 4 in MXFP4 and GGUF.
static inline void products(const X* const* x, int64_t rows, const Matrix& w, int64_t count, float* out, int64_t stride,
                            float*) {
    int64_t n = 0;
    if (w.format == Format::MXFP4) return packed_products<Format::MXFP4>(x, rows, w, count, out, stride);
    if (w.format == Format::GGUF) return packed_products<Format::GGUF>(x, rows, w, count, out, stride);
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
