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
