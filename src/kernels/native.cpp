// CPU kernels for bfloat16 on the vector types of simd.h. Compiled at first use by kernels/native.py.
//
// Each output element is one accumulator chain over k in a fixed order, whatever the number of rows: results do not
// depend on what else is in the batch, nor on how a prompt is cut into chunks.
//
// Shapes: M rows, N outputs, K inputs; T tokens, H hidden, I intermediate, E experts, k experts per token; heads = query
// heads, groups = key-value heads, D head_dim (64).

#include "sampling.h"
#include "simd.h"

#include <algorithm>
#include <vector>

// --- linear: out[m, n] = x[m] . w[n] + bias[n] ---

// PREFETCH asks for the weights `ahead` elements further on, which the next tile reads.
template <int RM, int RN, bool PREFETCH = false>
static inline void dot_tile(const bf16* x, const bf16* w, int64_t K, float* out, int64_t stride, int64_t ahead = 0) {
    F acc[RM][RN];
    for (int i = 0; i < RM; i++)
        for (int j = 0; j < RN; j++) acc[i][j] = f_set(0);
    for (int64_t k = 0; k < K; k += 32) {
        B a[RM];
        for (int i = 0; i < RM; i++) a[i] = b_load(x + i * K + k, K - k);
        for (int j = 0; j < RN; j++) {
            const B b = b_load(w + j * K + k, K - k);
            if (PREFETCH) _mm_prefetch((const char*)(w + j * K + k + ahead), _MM_HINT_T0);
            for (int i = 0; i < RM; i++) acc[i][j] = b_dot(acc[i][j], a[i], b);
        }
    }
    for (int i = 0; i < RM; i++) {
        if constexpr (RN == 4) _mm_storeu_ps(out + i * stride, f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
        else
            for (int j = 0; j < RN; j++) out[i * stride + j] = f_sum(acc[i][j]);
    }
}

template <int RN>
static inline void dot_rows(const bf16* x, int64_t rows, const bf16* w, int64_t K, float* out, int64_t stride,
                            int64_t ahead) {
    int64_t m = 0;
    if (rows >= MAX_ROWS) {
        dot_tile<MAX_ROWS, RN, true>(x, w, K, out, stride, ahead);
        for (m = MAX_ROWS; m + MAX_ROWS <= rows; m += MAX_ROWS)
            dot_tile<MAX_ROWS, RN>(x + m * K, w, K, out + m * stride, stride);
    } else if (rows >= 4) {
        dot_tile<4, RN, true>(x, w, K, out, stride, ahead);
        m = 4;
    } else {
        dot_tile<1, RN, true>(x, w, K, out, stride, ahead);
        m = 1;
    }
    for (; m + 2 <= rows; m += 2) dot_tile<2, RN>(x + m * K, w, K, out + m * stride, stride);
    for (; m < rows; m++) dot_tile<1, RN>(x + m * K, w, K, out + m * stride, stride);
}

extern "C" void linear(const bf16* x, const bf16* w, const bf16* bias, const bf16* residual, void* out, int out_is_float,
                       int64_t M, int64_t N, int64_t K) {
    const int64_t tile_n = 16, tile_m = 96;
    const int64_t blocks = (N + tile_n - 1) / tile_n;
#pragma omp parallel for schedule(static)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t n0 = block * tile_n, width = std::min(tile_n, N - n0);
        float part[96 * 16];
        for (int64_t m0 = 0; m0 < M; m0 += tile_m) {
            const int64_t rows = std::min(tile_m, M - m0);
            int64_t n = 0;
            for (; n + 4 <= width; n += 4) dot_rows<4>(x + m0 * K, rows, w + (n0 + n) * K, K, part + n, tile_n, tile_n * K);
            for (; n < width; n++) dot_rows<1>(x + m0 * K, rows, w + (n0 + n) * K, K, part + n, tile_n, 0);
            for (int64_t m = 0; m < rows; m++)
                for (int64_t j = 0; j < width; j++) {
                    const int64_t at = (m0 + m) * N + n0 + j;
                    float value = part[m * tile_n + j] + (bias ? to_float(bias[n0 + j]) : 0.0f);
                    if (residual) value += to_float(residual[at]);
                    if (out_is_float) ((float*)out)[at] = value;
                    else ((bf16*)out)[at] = to_bf16(value);
                }
        }
    }
}

// --- RMSNorm ---

extern "C" void rms_norm(const bf16* x, const bf16* scale, bf16* out, float eps, int64_t T, int64_t H) {
#pragma omp parallel for schedule(static) if (T > 8)
    for (int64_t t = 0; t < T; t++) {
        F sum = f_set(0);
        for (int64_t h = 0; h < H; h += 32) {
            const B v = b_load(x + t * H + h, H - h);
            sum = b_dot(sum, v, v);
        }
        const float r = 1.0f / std::sqrt(f_sum(sum) / H + eps);
        for (int64_t h = 0; h < H; h++) out[t * H + h] = to_bf16(to_float(x[t * H + h]) * r * to_float(scale[h]));
    }
}

// --- rotary embedding of Q and K, then K and V into the cache ---
// qkv [T, heads + 2 groups, D] changed in place; cos, sin float [T, D / 2]; slots [T]

extern "C" void rope_and_store(bf16* qkv, const float* cos, const float* sin, const int64_t* slots, bf16* key_cache,
                               bf16* value_cache, int64_t T, int64_t heads, int64_t groups, int64_t D) {
    const int64_t half = D / 2, width = (heads + 2 * groups) * D;
#pragma omp parallel for schedule(static) if (T > 8)
    for (int64_t t = 0; t < T; t++) {
        const float *c = cos + t * half, *s = sin + t * half;
        for (int64_t n = 0; n < heads + groups; n++) {
            bf16* v = qkv + t * width + n * D;
            for (int64_t d = 0; d < half; d++) {
                const float a = to_float(v[d]), b = to_float(v[d + half]);
                v[d] = to_bf16(a * c[d] - b * s[d]);
                v[d + half] = to_bf16(b * c[d] + a * s[d]);
            }
        }
        const bf16* key = qkv + t * width + heads * D;
        std::memcpy(key_cache + slots[t] * groups * D, key, groups * D * sizeof(bf16));
        std::memcpy(value_cache + slots[t] * groups * D, key + groups * D, groups * D * sizeof(bf16));
    }
}

// --- attention over the block cache, with sinks ---
// Query t sees positions first[t] .. last[t]; the slot of position p is slots[base[t] + p].

template <int QH>  // query heads handled together
static void attend(const bf16* query, const bf16* key_cache, const bf16* value_cache, const bf16* sinks, bf16* out,
                   const int64_t* slots, int64_t count, int64_t row, int64_t column, float scale, float* scores) {
    B q[QH][2];
    for (int h = 0; h < QH; h++) {
        q[h][0] = b_load(query + h * 64, 32);
        q[h][1] = b_load(query + h * 64 + 32, 32);
    }
    const int64_t padded = (count + 15) / 16 * 16;
    for (int64_t s = 0; s < count; s++) {
        const bf16* key = key_cache + slots[s] * row + column;
        const B k0 = b_load(key, 32), k1 = b_load(key + 32, 32);
        for (int h = 0; h < QH; h++) {
            const F d = b_dot(b_dot(f_set(0), q[h][0], k0), q[h][1], k1);
            scores[h * padded + s] = f_sum(d) * scale;
        }
    }
    float inverse[QH];
    for (int h = 0; h < QH; h++) {
        float* row_scores = scores + h * padded;
        for (int64_t s = count; s < padded; s++) row_scores[s] = -INFINITY;
        const float sink = to_float(sinks[h]);
        F top = f_set(sink);
        for (int64_t s = 0; s < padded; s += 16) top = f_max(top, f_load(row_scores + s));
        const float peak = f_top(top);
        F total = f_set(0);
        for (int64_t s = 0; s < padded; s += 16) {
            const F v = f_load(row_scores + s);
            const F e = f_where_finite(v, f_exp(f_sub(v, f_set(peak))));
            f_store(row_scores + s, e);
            total = f_add(total, e);
        }
        inverse[h] = 1.0f / (f_sum(total) + std::exp(sink - peak));
    }
    F acc[QH][4];
    for (int h = 0; h < QH; h++)
        for (int d = 0; d < 4; d++) acc[h][d] = f_set(0);
    for (int64_t s = 0; s < count; s++) {
        const bf16* value = value_cache + slots[s] * row + column;
        F v[4];
        for (int d = 0; d < 4; d++)
            v[d] = f_widen(value + 16 * d);
        for (int h = 0; h < QH; h++) {
            const F p = f_set(scores[h * padded + s]);
            for (int d = 0; d < 4; d++) acc[h][d] = f_fma(p, v[d], acc[h][d]);
        }
    }
    for (int h = 0; h < QH; h++) {
        float line[64];
        for (int d = 0; d < 4; d++) f_store(line + 16 * d, acc[h][d]);
        for (int d = 0; d < 64; d++) out[h * 64 + d] = to_bf16(line[d] * inverse[h]);
    }
}

extern "C" void attention(const bf16* qkv, const bf16* key_cache, const bf16* value_cache, const bf16* sinks, bf16* out,
                          const int64_t* slots, const int64_t* base, const int64_t* first, const int64_t* last,
                          float scale, int64_t T, int64_t heads, int64_t groups) {
    const int64_t D = 64, per_group = heads / groups, width = (heads + 2 * groups) * D;
    int64_t longest = 0;
    for (int64_t t = 0; t < T; t++) longest = std::max(longest, last[t] - first[t] + 1);
    const int64_t padded = (longest + 15) / 16 * 16;
#pragma omp parallel
    {
        std::vector<float> scores(4 * padded);
#pragma omp for schedule(dynamic, 4) collapse(2)
        for (int64_t t = 0; t < T; t++)
            for (int64_t g = 0; g < groups; g++) {
                const int64_t count = last[t] - first[t] + 1;
                const int64_t* where = slots + base[t] + first[t];
                int64_t h = g * per_group;
                const int64_t end = h + per_group;
                for (; h + 4 <= end; h += 4)
                    attend<4>(qkv + t * width + h * D, key_cache, value_cache, sinks + h, out + (t * heads + h) * D,
                              where, count, groups * D, g * D, scale, scores.data());
                for (; h < end; h++)
                    attend<1>(qkv + t * width + h * D, key_cache, value_cache, sinks + h, out + (t * heads + h) * D,
                              where, count, groups * D, g * D, scale, scores.data());
            }
    }
}

// --- mixture of experts ---

// 2^(s - 127) of `groups` E8M0 scales; s = 0 is the denormal 2^-127
static inline void decode_scales(const uint8_t* scales, int64_t groups, float* out) {
    for (int64_t g = 0; g < groups; g++) {
        const uint32_t bits = scales[g] ? uint32_t(scales[g]) << 23 : 0x00400000;
        std::memcpy(out + g, &bits, 4);
    }
}

// RM rows of x against 4 neighbouring rows of the matrix.
template <int RM>
static inline void mxfp4_tile(const bf16* const* x, const uint8_t* block, const float* scale, int64_t groups,
                              Table table, float* out, int64_t stride) {
    F acc[RM][4];
    for (int i = 0; i < RM; i++)
        for (int j = 0; j < 4; j++) acc[i][j] = f_set(0);
    const int64_t row_bytes = groups * 16;
    for (int64_t g = 0; g < groups; g++) {
        B a[RM];
        for (int i = 0; i < RM; i++) a[i] = b_load(x[i] + g * 32, 32);
        for (int j = 0; j < 4; j++) {
            const uint8_t* at = block + j * row_bytes + g * 16;
            const B weights = b_decode(at, table);
            const F s = f_set(scale[j * groups + g]);
            for (int i = 0; i < RM; i++)
                acc[i][j] = f_fma(b_dot(f_set(0), weights, a[i]), s, acc[i][j]);
        }
    }
    for (int i = 0; i < RM; i++)
        _mm_storeu_ps(out + i * stride, f_sum4(acc[i][0], acc[i][1], acc[i][2], acc[i][3]));
}

struct Experts {  // E matrices of R rows and K columns, in MXFP4, or in bf16 where scales is null
    const void* data;
    const uint8_t* scales;
    int64_t R, K;
};

// out[r * stride + j] = row n + j of the expert's matrix . x[r], j = 0..3
static inline void expert_dots(const bf16* const* x, int64_t rows, const Experts& w, int64_t expert, int64_t n, float* out,
                               int64_t stride) {
    const int64_t row = expert * w.R + n, groups = w.K / 32;
    if (!w.scales) {
        for (int64_t m = 0; m < rows; m++)
            dot_tile<1, 4>(x[m], (const bf16*)w.data + row * w.K, w.K, out + m * stride, stride);
        return;
    }
    const Table table = e2m1_table();
    const uint8_t* block = (const uint8_t*)w.data + row * groups * 16;
    for (int64_t byte = 0; byte < 64 * groups; byte += 64) _mm_prefetch((const char*)(block + 64 * groups + byte), _MM_HINT_T0);
    float scale[4096];  // 4 rows, K up to 32,768
    decode_scales(w.scales + row * groups, 4 * groups, scale);
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

// 32 columns: min(gate, limit) sigmoid(1.702 gate) (clamp(up) + 1)
static inline void clamped_swiglu(const float* gate, const float* up, const bf16* bias_gate, const bf16* bias_up,
                                  float limit, bf16* out) {
    const F high = f_set(limit), low = f_set(-limit), one = f_set(1.0f);
    for (int n = 0; n < 32; n += 16) {
        const F g = f_min(f_add(f_load(gate + n), f_widen(bias_gate + n)), high);
        const F u = f_max(low, f_min(f_add(f_load(up + n), f_widen(bias_up + n)), high));
        const F e = f_exp(f_min(f_mul(g, f_set(-1.702f)), f_set(88.0f)));
        const F v = f_mul(f_div(g, f_add(one, e)), f_add(u, one));
        float line[16];
        f_store(line, v);
        for (int i = 0; i < 16; i++) out[n + i] = to_bf16(line[i]);
    }
}

// logits [T, E] -> the k largest (ties: the smaller index), softmax over them alone
extern "C" void route(const float* logits, int64_t* experts, float* weights, int64_t T, int64_t E, int64_t k) {
    for (int64_t t = 0; t < T; t++) {
        const float* row = logits + t * E;
        float total = 0;
        for (int64_t j = 0; j < k; j++) {
            int64_t best = -1;
            for (int64_t e = 0; e < E; e++) {
                bool taken = false;
                for (int64_t i = 0; i < j; i++) taken |= experts[t * k + i] == e;
                if (!taken && (best < 0 || row[e] > row[best])) best = e;
            }
            experts[t * k + j] = best;
            weights[t * k + j] = std::exp(row[best] - row[experts[t * k]]);
            total += weights[t * k + j];
        }
        for (int64_t j = 0; j < k; j++) weights[t * k + j] /= total;
    }
}

// out[t] = residual[t] + sum_j weight[t, j] * (w2 . swiglu(w1 . x[t] + b1) + b2); w1 rows: I gates, then I ups.
// scales null: the matrices are bf16 instead of MXFP4. hidden [T k, I] and parts [T k, H] are scratch.
extern "C" void moe(const bf16* x, const int64_t* experts, const float* weights, const void* w1, const uint8_t* s1,
                    const bf16* b1, const void* w2, const uint8_t* s2, const bf16* b2, const bf16* residual, bf16* out,
                    bf16* hidden, float* parts, float limit, int64_t T, int64_t k, int64_t E, int64_t H, int64_t I) {
    std::vector<int64_t> start(E + 1, 0), rows(T * k);
    for (int64_t i = 0; i < T * k; i++) start[experts[i] + 1]++;
    for (int64_t e = 0; e < E; e++) start[e + 1] += start[e];
    std::vector<int64_t> next(start.begin(), start.end() - 1), active;
    for (int64_t i = 0; i < T * k; i++) rows[next[experts[i]]++] = i;
    for (int64_t e = 0; e < E; e++)
        if (start[e + 1] > start[e]) active.push_back(e);
    std::vector<const bf16*> x_of(T * k), h_of(T * k);
    for (int64_t r = 0; r < T * k; r++) {
        x_of[r] = x + rows[r] / k * H;
        h_of[r] = hidden + r * I;
    }
    const Experts first_layer{w1, s1, 2 * I, H}, second_layer{w2, s2, H, I};
    const int64_t chunk = 32, chunks1 = I / chunk, chunks2 = H / chunk;  // both are multiples of 32
#pragma omp parallel
    {
        std::vector<float> gate(T * k * chunk), up(T * k * chunk);
#pragma omp for schedule(dynamic, 2)
        for (int64_t job = 0; job < (int64_t)active.size() * chunks1; job++) {
            const int64_t e = active[job / chunks1], n0 = job % chunks1 * chunk, first = start[e];
            const int64_t count = start[e + 1] - first;
            for (int64_t n = 0; n < chunk; n += 4) {
                expert_dots(&x_of[first], count, first_layer, e, n0 + n, gate.data() + n, chunk);
                expert_dots(&x_of[first], count, first_layer, e, I + n0 + n, up.data() + n, chunk);
            }
            for (int64_t r = 0; r < count; r++)
                clamped_swiglu(gate.data() + r * chunk, up.data() + r * chunk, b1 + e * 2 * I + n0, b1 + e * 2 * I + I + n0,
                               limit, hidden + (first + r) * I + n0);
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t job = 0; job < (int64_t)active.size() * chunks2; job++) {
            const int64_t e = active[job / chunks2], n0 = job % chunks2 * chunk, first = start[e];
            const int64_t count = start[e + 1] - first;
            for (int64_t n = n0; n < n0 + chunk; n += 4) {
                expert_dots(&h_of[first], count, second_layer, e, n, gate.data(), 4);
                for (int64_t r = 0; r < count; r++)
                    for (int64_t j = 0; j < 4; j++)
                        parts[rows[first + r] * H + n + j] = gate[r * 4 + j] + to_float(b2[e * H + n + j]);
            }
        }
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; t++)
            for (int64_t h = 0; h < H; h++) {
                float sum = to_float(residual[t * H + h]);
                for (int64_t j = 0; j < k; j++) sum += weights[t * k + j] * parts[(t * k + j) * H + h];
                out[t * H + h] = to_bf16(sum);
            }
    }
}

#include "decoder.h"
