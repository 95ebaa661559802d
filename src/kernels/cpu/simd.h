// Sixteen floats (F) and thirty-two bfloat16 numbers (B) as native.cpp needs them, for AVX-512 with the BF16 dot product and
// for AVX2 with FMA. Both add a dot product's terms to lane i in the order 2i + 1, 2i; sums over lanes are trees of their own.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint16_t bf16;

static inline float to_float(bf16 x) {
    uint32_t bits = uint32_t(x) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 to_bf16(float f) {  // round to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if ((bits & 0x7FFFFFFF) > 0x7F800000) return uint16_t(bits >> 16) | 0x40;
    return uint16_t((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

static const float E2M1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};

#ifdef __AVX512BF16__

typedef __m512 F;
typedef __m512bh B;
static const int MAX_ROWS = 6;  // rows of x against four rows of weights that the registers hold
static const int MAX_SUMS = 16;  // sums F that they hold

static inline F f_set(float x) { return _mm512_set1_ps(x); }
static inline F f_load(const float* p) { return _mm512_loadu_ps(p); }
static inline void f_store(float* p, F x) { _mm512_storeu_ps(p, x); }
static inline F f_add(F x, F y) { return _mm512_add_ps(x, y); }
static inline F f_sub(F x, F y) { return _mm512_sub_ps(x, y); }
static inline F f_mul(F x, F y) { return _mm512_mul_ps(x, y); }
static inline F f_div(F x, F y) { return _mm512_div_ps(x, y); }
static inline F f_min(F x, F y) { return _mm512_min_ps(x, y); }
static inline F f_max(F x, F y) { return _mm512_max_ps(x, y); }
static inline F f_fma(F x, F y, F z) { return _mm512_fmadd_ps(x, y, z); }
static inline float f_sum(F x) { return _mm512_reduce_add_ps(x); }
static inline float f_top(F x) { return _mm512_reduce_max_ps(x); }
static inline F f_widen(const bf16* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
static inline F f_round(F x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F f_scale(F x, F n) { return _mm512_scalef_ps(x, n); }  // x 2^n
static inline F f_where_finite(F v, F x) {  // x where v is above -inf, else 0
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(v, _mm512_set1_ps(-INFINITY), _CMP_GT_OQ), x);
}
static inline B b_load(const bf16* p, int64_t left) {  // `left` of 32 are there, the rest are zeros
    const __mmask32 mask = left >= 32 ? 0xFFFFFFFFu : (__mmask32)((1u << left) - 1);
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
}
static inline F b_dot(F acc, B x, B y) { return _mm512_dpbf16_ps(acc, x, y); }
static inline B b_from_int8(const int8_t* p) {
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
    const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(p + 16))));
    return _mm512_cvtne2ps_pbh(high, low);
}
// Four sums at once: lane j of the result is the sum of the 16 lanes of a_j.
static inline __m128 f_sum4(F a0, F a1, F a2, F a3) {
    const __m512 r01 = _mm512_add_ps(_mm512_unpacklo_ps(a0, a1), _mm512_unpackhi_ps(a0, a1));
    const __m512 r23 = _mm512_add_ps(_mm512_unpacklo_ps(a2, a3), _mm512_unpackhi_ps(a2, a3));
    const __m512 r = _mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(r01), _mm512_castps_pd(r23))));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(r), _mm512_extractf32x8_ps(r, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

#else

struct F {
    __m256 lo, hi;
};
struct B {  // pairs: even and odd numbers, widened
    F even, odd;
};
static const int MAX_SUMS = 4;  // sums F that the registers hold

#define LANES(name, op) \
    static inline F name(F x, F y) { return {op(x.lo, y.lo), op(x.hi, y.hi)}; }
LANES(f_add, _mm256_add_ps)
LANES(f_sub, _mm256_sub_ps)
LANES(f_mul, _mm256_mul_ps)
LANES(f_div, _mm256_div_ps)
LANES(f_min, _mm256_min_ps)
LANES(f_max, _mm256_max_ps)
#undef LANES
static inline F f_set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F f_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void f_store(float* p, F x) {
    _mm256_storeu_ps(p, x.lo);
    _mm256_storeu_ps(p + 8, x.hi);
}
static inline F f_fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.lo, y.lo, z.lo), _mm256_fmadd_ps(x.hi, y.hi, z.hi)}; }
static inline __m128 fold(F x) {
    const __m256 half = _mm256_add_ps(x.lo, x.hi);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
static inline float f_sum(F x) {
    __m128 s = fold(x);
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
// Four sums at once: lane j of the result is the sum of the 16 lanes of a_j.
static inline __m128 f_sum4(F a0, F a1, F a2, F a3) {
    const __m256 first = _mm256_hadd_ps(_mm256_add_ps(a0.lo, a0.hi), _mm256_add_ps(a1.lo, a1.hi));
    const __m256 second = _mm256_hadd_ps(_mm256_add_ps(a2.lo, a2.hi), _mm256_add_ps(a3.lo, a3.hi));
    const __m256 pairs = _mm256_hadd_ps(first, second);
    return _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
}
static inline float f_top(F x) {
    const __m256 half = _mm256_max_ps(x.lo, x.hi);
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_shuffle_ps(s, s, 1)));
}
static inline __m256 widen8(const bf16* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F f_widen(const bf16* p) { return {widen8(p), widen8(p + 8)}; }
static inline F f_round(F x) {
    const int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return {_mm256_round_ps(x.lo, mode), _mm256_round_ps(x.hi, mode)};
}
static inline __m256 power8(__m256 n) {  // 2^n, n from -126 to 127
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline F f_scale(F x, F n) { return {_mm256_mul_ps(x.lo, power8(n.lo)), _mm256_mul_ps(x.hi, power8(n.hi))}; }
static inline F f_where_finite(F v, F x) {
    const __m256 none = _mm256_set1_ps(-INFINITY);
    return {_mm256_and_ps(_mm256_cmp_ps(v.lo, none, _CMP_GT_OQ), x.lo),
            _mm256_and_ps(_mm256_cmp_ps(v.hi, none, _CMP_GT_OQ), x.hi)};
}
static inline B b_split(__m256i first, __m256i second) {
    const __m256i high = _mm256_set1_epi32((int)0xFFFF0000);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(first, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(second, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(first, high)), _mm256_castsi256_ps(_mm256_and_si256(second, high))}};
}
static inline B b_load(const bf16* p, int64_t left) {
    if (left >= 32)
        return b_split(_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 16)));
    alignas(32) bf16 line[32] = {0};
    std::memcpy(line, p, left * sizeof(bf16));
    return b_split(*(const __m256i*)line, *(const __m256i*)(line + 16));
}
static inline F b_dot(F acc, B x, B y) { return f_fma(x.even, y.even, f_fma(x.odd, y.odd, acc)); }

#endif

static inline F f_exp(F x) {  // 2^n 2^f by a degree-6 polynomial: relative error below 2e-7; from -87 to 88
    x = f_max(x, f_set(-87.0f));
    const F t = f_mul(x, f_set(1.44269504088896341f));
    const F n = f_round(t);
    const F f = f_sub(t, n);
    F p = f_set(1.5403530e-4f);
    p = f_fma(p, f, f_set(1.3333558e-3f));
    p = f_fma(p, f, f_set(9.6181291e-3f));
    p = f_fma(p, f, f_set(5.5504109e-2f));
    p = f_fma(p, f, f_set(2.4022651e-1f));
    p = f_fma(p, f, f_set(6.9314718e-1f));
    p = f_fma(p, f, f_set(1.0f));
    return f_scale(p, n);
}
