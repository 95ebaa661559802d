// CPU kernels for bfloat16 on the vector types of simd.h. Compiled at first use by kernels/cpu/native.py.
//
// Each output element is one accumulator chain over k in a fixed order, whatever the number of rows: results do not
// depend on what else is in the batch, nor on how a prompt is cut into chunks.
//
// Shapes: M rows, N outputs, K inputs; T tokens, H hidden, I intermediate, E experts, k experts per token; heads = query
// heads, groups = key-value heads, D head_dim (64).

#include "experts.h"
#include "pool.h"
#include "products.h"
#include "sampling.h"
#include "simd.h"
#include "team.h"

#include <algorithm>
#include <vector>

// body(t) for each of T rows, eight to a piece.
template <typename Body>
static auto by_rows(int64_t T, const Body& body) {
    return [=](int64_t piece) {
        for (int64_t t = 8 * piece; t < std::min(T, 8 * piece + 8); t++) body(t);
    };
}

static int64_t pieces_of(int64_t rows) { return (rows + 7) / 8; }

// --- linear: out[m, n] = x[m] . w[n] + bias[n] ---

// The rows of x [M, K] as products() reads them.
template <int USE, typename Workers>
static const X* const* rows_of_x(Workers& workers, const bf16* x, int64_t M, int64_t K, Format format) {
    const X** rows = kept_scratch<const X*, USE>(M);
#ifdef __AVX512BF16__
    for (int64_t m = 0; m < M; m++) rows[m] = x + m * K;
#else
    const int64_t width = x_columns(K, format);
    float* wide = kept_scratch<float, USE>(M * width);
    for (int64_t m = 0; m < M; m++) rows[m] = wide + m * width;
    workers.run_minor(pieces_of(M), by_rows(M, [=](int64_t m) { store_row(x + m * K, K, format, wide + m * width); }));
#endif
    return rows;
}

static inline F to_int8(F x, F inverse) { return f_max(f_min(f_round(f_mul(x, inverse)), f_set(127.0f)), f_set(-127.0f)); }

// Squared error of the row, whose largest number is 1, when `ratio` becomes 127.
static float rounding_error(const float* row, int64_t width, float ratio) {
    const F inverse = f_set(127.0f / ratio), step = f_set(ratio / 127.0f);
    F sum = f_set(0);
    for (int64_t k = 0; k < width; k += 16) {
        const F x = f_load(row + k), lost = f_sub(x, f_mul(to_int8(x, inverse), step));
        sum = f_fma(lost, lost, sum);
    }
    return f_sum(sum);
}

// scales [N]: w is int8 and its rows are multiplied by them; null: w is bfloat16.
template <typename Workers>
static void linear(Workers& workers, const bf16* x, const void* w, const float* scales, const bf16* bias, const bf16* residual,
                   void* out, int out_is_float, int64_t M, int64_t N, int64_t K) {
    const Matrix matrix{w, nullptr, K, scales ? Format::INT8 : Format::BF16};
    const int64_t threads = workers.threads(), width = N >= 4 * threads * WIDTH ? WIDTH : 16;
    const int64_t blocks = (N + width - 1) / width, tiles = (M + MOST_ROWS - 1) / MOST_ROWS;
    const X* const* rows = rows_of_x<0>(workers, x, M, K, matrix.format);
    workers.run(blocks * tiles, [&](int64_t piece) {
        const int64_t n0 = piece / tiles * width, columns = std::min(width, N - n0);
        const int64_t m0 = piece % tiles * MOST_ROWS, count = std::min(MOST_ROWS, M - m0);
        float *part = kept_scratch<float, 5>(MOST_ROWS * WIDTH), *partials = kept_scratch<float, 1>(PARTIALS);
        products(rows + m0, count, matrix.from(n0), columns, part, WIDTH, partials);
        for (int64_t m = 0; m < count; m++)
            for (int64_t j = 0; j < columns; j++) {
                const int64_t at = (m0 + m) * N + n0 + j;
                const float sum = scales ? part[m * WIDTH + j] * scales[n0 + j] : part[m * WIDTH + j];
                float value = sum + (bias ? to_float(bias[n0 + j]) : 0.0f);
                if (residual) value += to_float(residual[at]);
                if (out_is_float) ((float*)out)[at] = value;
                else ((bf16*)out)[at] = to_bf16(value);
            }
    });
}

extern "C" void linear(const bf16* x, const void* w, const float* scales, const bf16* bias, const bf16* residual, void* out,
                       int out_is_float, int64_t M, int64_t N, int64_t K) {
    Led led;
    linear(led, x, w, scales, bias, residual, out, out_is_float, M, N, K);
}

// Rows of w [N, K] as int8 [N, padded(K)] and a scale each: of RATIOS the part of the row's largest number that becomes 127 with
// the least squared error. A row of zeros, or of numbers below the normal ones, has scale 0; one with infinities or NaN, NaN.
extern "C" void quantize_int8(const bf16* w, int8_t* out, float* scales, int64_t N, int64_t K) {
    static const float RATIOS[] = {1.0f, 0.99f, 0.98f, 0.97f, 0.95f, 0.92f, 0.88f, 0.8f};
    const int64_t width = padded(K);
    Pool::shared().run(pieces_of(N), by_rows(N, [=](int64_t n) {
        float* row = kept_scratch<float, 7>(width);
        std::fill(row + K, row + width, 0.0f);
        float peak = 0;
        for (int64_t k = 0; k < K; k++) {
            row[k] = to_float(w[n * K + k]);
            peak = std::max(peak, std::abs(row[k]));
        }
        const bool is_zero = peak < 1.17549435e-38f;
        for (int64_t k = 0; k < K; k++) row[k] = is_zero ? 0.0f : row[k] / peak;
        float best = RATIOS[0], least = INFINITY;
        for (const float ratio : RATIOS) {
            const float error = rounding_error(row, width, ratio);
            if (error < least) best = ratio, least = error;
        }
        scales[n] = is_zero ? 0.0f : least < INFINITY ? peak * (best / 127.0f) : NAN;
        const F inverse = f_set(127.0f / best);
        for (int64_t k = 0; k < width; k += 16) {
            float line[16];
            f_store(line, to_int8(f_load(row + k), inverse));
            for (int i = 0; i < 16; i++) out[n * width + k + i] = int8_t(line[i]);
        }
    }));
}

// --- RMSNorm ---

template <typename Workers>
static void rms_norm(Workers& workers, const bf16* x, const bf16* scale, bf16* out, float eps, int64_t T, int64_t H) {
    workers.run_minor(pieces_of(T), by_rows(T, [=](int64_t t) {
        F sum = f_set(0);
        for (int64_t h = 0; h < H; h += 32) {
            const B v = b_load(x + t * H + h, H - h);
            sum = b_dot(sum, v, v);
        }
        const float r = 1.0f / std::sqrt(f_sum(sum) / H + eps);
        for (int64_t h = 0; h < H; h++) out[t * H + h] = to_bf16(to_float(x[t * H + h]) * r * to_float(scale[h]));
    }));
}

extern "C" void rms_norm(const bf16* x, const bf16* scale, bf16* out, float eps, int64_t T, int64_t H) {
    Led led;
    rms_norm(led, x, scale, out, eps, T, H);
}

// --- rotary embedding of Q and K, then K and V into the cache ---
// qkv [T, heads + 2 groups, D]; cos, sin float [T, D / 2]; slots [T]. `out`, which may be qkv: Q and K go there.

template <typename Workers>
static void rope_and_store(Workers& workers, const bf16* qkv, bf16* out, const float* cos, const float* sin,
                           const int64_t* slots, bf16* key_cache, bf16* value_cache, int64_t T, int64_t heads, int64_t groups,
                           int64_t D) {
    const int64_t half = D / 2, width = (heads + 2 * groups) * D;
    workers.run_once(pieces_of(T), by_rows(T, [=](int64_t t) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (int64_t n = 0; n < heads + groups; n++) {
            const bf16* v = qkv + t * width + n * D;
            bf16* to = out + t * width + n * D;
            for (int64_t d = 0; d < half; d++) {
                const float a = to_float(v[d]), b = to_float(v[d + half]);
                to[d] = to_bf16(a * c[d] - b * s[d]);
                to[d + half] = to_bf16(b * c[d] + a * s[d]);
            }
        }
        const int64_t keys = t * width + heads * D, bytes = groups * D * sizeof(bf16);
        std::memcpy(key_cache + slots[t] * groups * D, out + keys, bytes);
        std::memcpy(value_cache + slots[t] * groups * D, qkv + keys + groups * D, bytes);
    }));
}

extern "C" void rope_and_store(bf16* qkv, const float* cos, const float* sin, const int64_t* slots, bf16* key_cache,
                               bf16* value_cache, int64_t T, int64_t heads, int64_t groups, int64_t D) {
    Led led;
    rope_and_store(led, qkv, qkv, cos, sin, slots, key_cache, value_cache, T, heads, groups, D);
}

// --- attention over the block cache, with sinks ---
// Query t sees positions first[t] .. last[t]; the slot of position p is slots[base[t] + p].

static inline int64_t padded_to(int64_t count) { return (count + 15) / 16 * 16; }

// QH query heads of a token, which share a key-value head; keys and values of a position lie `row` apart in the cache.
template <int QH>
struct Heads {
    const bf16* query;
    const bf16 *keys, *values, *sinks;
    const int64_t* slots;
    int64_t count, padded, row;
    float *scores, inverse[QH];  // scores [QH, padded]

    // scores = scale q . k, of four positions at once
    void score(float scale) {
        B q[QH][2];
        for (int h = 0; h < QH; h++) {
            q[h][0] = b_load(query + h * 64, 32);
            q[h][1] = b_load(query + h * 64 + 32, 32);
        }
        auto dots = [&](int64_t s, F* out, int64_t stride) __attribute__((always_inline)) {
            const bf16* key = keys + slots[s] * row;
            const B k0 = b_load(key, 32), k1 = b_load(key + 32, 32);
            UNROLLED
            for (int h = 0; h < QH; h++) out[h * stride] = b_dot(b_dot(f_set(0), q[h][0], k0), q[h][1], k1);
        };
        int64_t s = 0;
        for (; s + 4 <= count; s += 4) {
            F found[QH][4];
            UNROLLED
            for (int i = 0; i < 4; i++) dots(s + i, &found[0][i], 4);
            UNROLLED
            for (int h = 0; h < QH; h++) {
                const __m128 four = f_sum4(found[h][0], found[h][1], found[h][2], found[h][3]);
                _mm_storeu_ps(scores + h * padded + s, _mm_mul_ps(four, _mm_set1_ps(scale)));
            }
        }
        for (; s < count; s++) {
            F found[QH];
            dots(s, found, 1);
            for (int h = 0; h < QH; h++) scores[h * padded + s] = f_sum(found[h]) * scale;
        }
    }

    // scores = exp(score - largest), and the inverse of their sum with the sink's
    void soften() {
        for (int h = 0; h < QH; h++) {
            float* line = scores + h * padded;
            for (int64_t s = count; s < padded; s++) line[s] = -INFINITY;
            const float sink = to_float(sinks[h]);
            F top = f_set(sink);
            for (int64_t s = 0; s < padded; s += 16) top = f_max(top, f_load(line + s));
            const float peak = f_top(top);
            F total = f_set(0);
            for (int64_t s = 0; s < padded; s += 16) {
                const F v = f_load(line + s);
                const F e = f_where_finite(v, f_exp(f_sub(v, f_set(peak))));
                f_store(line + s, e);
                total = f_add(total, e);
            }
            inverse[h] = 1.0f / (f_sum(total) + std::exp(sink - peak));
        }
    }

    // out [QH, 64] = the values' sum weighted by the scores; as many columns at once as registers hold sums for
    void weigh(bf16* out) const {
        constexpr int SOME = std::min(4, MAX_SUMS / QH);
        for (int d = 0; d < 4; d += SOME) {
            F sums[QH][SOME];
            UNROLLED
            for (int h = 0; h < QH; h++)
                UNROLLED
                for (int i = 0; i < SOME; i++) sums[h][i] = f_set(0);
            for (int64_t s = 0; s < count; s++) {
                const bf16* value = values + slots[s] * row + 16 * d;
                F v[SOME];
                UNROLLED
                for (int i = 0; i < SOME; i++) v[i] = f_widen(value + 16 * i);
                UNROLLED
                for (int h = 0; h < QH; h++) {
                    const F p = f_set(scores[h * padded + s]);
                    UNROLLED
                    for (int i = 0; i < SOME; i++) sums[h][i] = f_fma(p, v[i], sums[h][i]);
                }
            }
            for (int h = 0; h < QH; h++)
                for (int i = 0; i < SOME; i++) {
                    float line[16];
                    f_store(line, sums[h][i]);
                    for (int n = 0; n < 16; n++) out[h * 64 + 16 * (d + i) + n] = to_bf16(line[n] * inverse[h]);
                }
        }
    }
};

template <int QH>
static void attend(Heads<QH> heads, float scale, bf16* out) {
    heads.score(scale);
    heads.soften();
    heads.weigh(out);
}

template <typename Workers>
static void attention(Workers& workers, const bf16* qkv, const bf16* key_cache, const bf16* value_cache, const bf16* sinks,
                      bf16* out, const int64_t* slots, const int64_t* base, const int64_t* first, const int64_t* last, float scale,
                      int64_t T, int64_t heads, int64_t groups) {
    const int64_t D = 64, per_group = heads / groups, width = (heads + 2 * groups) * D;
    int64_t longest = 0;
    for (int64_t t = 0; t < T; t++) longest = std::max(longest, last[t] - first[t] + 1);
    const int64_t padded = padded_to(longest);
    workers.run(T * groups, [=](int64_t piece) {
        const int64_t t = piece / groups, g = piece % groups, count = last[t] - first[t] + 1, row = groups * D;
        const int64_t* where = slots + base[t] + first[t];
        const bf16 *keys = key_cache + g * D, *values = value_cache + g * D;
        float* scores = kept_scratch<float, 4>(4 * padded);
        int64_t h = g * per_group;
        const int64_t end = h + per_group;
        for (; h + 4 <= end; h += 4)
            attend(Heads<4>{qkv + t * width + h * D, keys, values, sinks + h, where, count, padded_to(count), row, scores, {}}, scale,
                   out + (t * heads + h) * D);
        for (; h < end; h++)
            attend(Heads<1>{qkv + t * width + h * D, keys, values, sinks + h, where, count, padded_to(count), row, scores, {}}, scale,
                   out + (t * heads + h) * D);
    });
}

extern "C" void attention(const bf16* qkv, const bf16* key_cache, const bf16* value_cache, const bf16* sinks, bf16* out,
                          const int64_t* slots, const int64_t* base, const int64_t* first, const int64_t* last, float scale,
                          int64_t T, int64_t heads, int64_t groups) {
    Led led;
    attention(led, qkv, key_cache, value_cache, sinks, out, slots, base, first, last, scale, T, heads, groups);
}

#include "moe.h"

#include "lora.h"

#include "decoder.h"
