// What LoRA adapters add: y += (x A^T) B for the rows that have one, each row by itself, so that results do not depend on what
// else is in the batch. A is [rank, K]; B is [rank, N] and includes the adapter's scale; of experts there is one pair each.

#pragma once

#include <numeric>

struct LoraModule {  // of kernels/lora.py; null where the matrix is not adapted
    const bf16 *a, *b;
    int64_t rank;
};

enum { LORA_Q, LORA_K, LORA_V, LORA_OUT, LORA_ROUTER, LORA_W1, LORA_W2, LORA_MODULES };

struct Lora {  // of one layer; table [S, LORA_MODULES], slots [T]: -1 for a row without an adapter
    const LoraModule* table;
    const int64_t* slots;

    const LoraModule* of(int64_t t, int module) const {
        if (slots[t] < 0) return nullptr;
        const LoraModule* m = table + slots[t] * LORA_MODULES + module;
        return m->a ? m : nullptr;
    }
};

template <int R>
static inline void lora_dots(const bf16* a, const bf16* x, int64_t K, float* u) {
    F acc[R];
    UNROLLED
    for (int j = 0; j < R; j++) acc[j] = f_set(0);
    for (int64_t k = 0; k < K; k += 32) {
        const B v = b_load(x + k, K - k);
        UNROLLED
        for (int j = 0; j < R; j++) acc[j] = b_dot(acc[j], v, b_load(a + j * K + k, K - k));
    }
    UNROLLED
    for (int j = 0; j < R; j++) u[j] = f_sum(acc[j]);
}

// u [rank] = A x
static inline void lora_shrink(const bf16* a, const bf16* x, int64_t rank, int64_t K, float* u) {
    int64_t j = 0;
    for (; j + 8 <= rank; j += 8) lora_dots<8>(a + j * K, x, K, u + j);
    for (; j < rank; j++) lora_dots<1>(a + j * K, x, K, u + j);
}

// acc + 16 columns of u B
static inline F lora_expand(F acc, const bf16* b, const float* u, int64_t rank, int64_t N) {
    for (int64_t j = 0; j < rank; j++) acc = f_fma(f_set(u[j]), f_widen(b + j * N), acc);
    return acc;
}

// y [N] += u B
static inline void lora_expand(bf16* y, const bf16* b, const float* u, int64_t rank, int64_t N) {
    int64_t n = 0;
    for (; n + 16 <= N; n += 16) {
        float line[16];
        f_store(line, lora_expand(f_widen(y + n), b + n, u, rank, N));
        for (int i = 0; i < 16; i++) y[n + i] = to_bf16(line[i]);
    }
    for (; n < N; n++) {
        float sum = to_float(y[n]);
        for (int64_t j = 0; j < rank; j++) sum += u[j] * to_float(b[j * N + n]);
        y[n] = to_bf16(sum);
    }
}

// x [T, K], out [T, N]: `count` modules from `first` on add to neighbouring columns, `widths` of them each.
static void lora_linear(const Lora& lora, const bf16* x, bf16* out, int first, int count, const int64_t* widths, int64_t T,
                        int64_t K) {
    const int64_t N = std::accumulate(widths, widths + count, int64_t(0));
    Pool::shared().run(T, [&, N](int64_t t) {
        bf16* y = out + t * N;
        for (int i = 0; i < count; y += widths[i++]) {
            const LoraModule* m = lora.of(t, first + i);
            if (!m) continue;
            float* u = kept_scratch<float, 8>(m->rank);
            lora_shrink(m->a, x + t * K, m->rank, K, u);
            lora_expand(y, m->b, u, m->rank, widths[i]);
        }
    });
}

// x [T, K], out [T, N]
extern "C" void lora_linear(const LoraModule* table, const int64_t* slots, const bf16* x, bf16* out, int first, int count,
                            const int64_t* widths, int64_t T, int64_t K) {
    lora_linear(Lora{table, slots}, x, out, first, count, widths, T, K);
}

// A row's share of an expert's matrix [N, K], for a pair of token and expert; null rank: none.
struct LoraRow {
    const bf16* b = nullptr;
    float* u = nullptr;
    int64_t rank = 0;
};

static int64_t lora_width(const Lora& lora, int module, int64_t T) {  // the largest rank of the rows
    int64_t width = 0;
    for (int64_t t = 0; t < T; t++)
        if (const LoraModule* m = lora.of(t, module)) width = std::max(width, m->rank);
    return width;
}

// As moe() of native.cpp, with adapters. A row without one gets the same bits.
static void lora_moe(const Lora& lora, const bf16* x, const int64_t* experts, const float* weights, const void* w1,
                     const uint8_t* s1, const bf16* b1, const void* w2, const uint8_t* s2, const bf16* b2, const bf16* residual,
                     bf16* out, float* parts, float limit, int64_t T, int64_t k, int64_t E, int64_t H, int64_t I,
                     const void* ups, Layout layout) {
    const int64_t P = T * k, rank1 = lora_width(lora, LORA_W1, T), rank2 = lora_width(lora, LORA_W2, T);
    if (!rank1 && !rank2)
        return moe(x, experts, weights, w1, s1, b1, w2, s2, b2, residual, out, parts, limit, T, k, E, H, I, ups, layout);
    const ByExpert by(experts, T * k, E);
    const Experts w(w1, s1, ups, w2, s2, layout, H, I);
    const Format format = w.second.format;
    Led led;
    const X* const* tokens = rows_of_x<2>(led, x, T, H, format);
    const int64_t width = x_columns(I, format);
    X* hidden = kept_scratch<X, 3>(P * width);
    bf16* plain = kept_scratch<bf16, 9>(P * I);  // `hidden` in the order of its columns
    float *products1 = kept_scratch<float, 9>(P * rank1), *products2 = kept_scratch<float, 10>(P * rank2);
    std::vector<LoraRow> first(P), second(P);
    std::vector<const X*> x_of(P);
    std::vector<X*> hidden_of(P);
    for (int64_t r = 0; r < P; r++) {
        x_of[r] = tokens[by.rows[r] / k];
        hidden_of[r] = hidden + r * width;
    }
    // both modules' rows by position in `by.rows`
    auto shrink = [&](int module, std::vector<LoraRow>& rows, float* u, int64_t most, const bf16* values, bool by_token,
                      int64_t K, int64_t N) {
        if (!most) return;
        Pool::shared().run(P, [&, u, most, values, by_token, K, N](int64_t r) {
            const int64_t t = by.rows[r] / k, e = experts[by.rows[r]];
            const LoraModule* m = lora.of(t, module);
            if (!m) return;
            rows[r] = {m->b + e * m->rank * N, u + r * most, m->rank};
            lora_shrink(m->a + e * m->rank * K, values + (by_token ? t : r) * K, m->rank, K, rows[r].u);
        });
    };
    const int64_t chunks1 = I / CHUNK, chunks2 = H / CHUNK, active = by.active.size();
    shrink(LORA_W1, first, products1, rank1, x, true, H, 2 * I);
    Pool::shared().run(active * chunks1, [&](int64_t piece) {
        const int64_t e = by.active[piece / chunks1], n0 = piece % chunks1 * CHUNK, end = by.first[e + 1];
        const bf16 *bias_gate = b1 + e * 2 * I + n0, *bias_up = bias_gate + I;
        float gates[MOST_ROWS * CHUNK], ups[MOST_ROWS * CHUNK];
        for (int64_t m = by.first[e]; m < end; m += MOST_ROWS) {
            const int64_t count = std::min(MOST_ROWS, end - m);
            w.first(&x_of[m], count, e, n0, gates, ups);
            for (int64_t r = 0; r < count; r++) {
                float *g = gates + r * CHUNK, *v = ups + r * CHUNK;
                const LoraRow& row = first[m + r];
                for (int64_t n = 0; row.rank && n < CHUNK; n += 16) {
                    f_store(g + n, lora_expand(f_load(g + n), row.b + n0 + n, row.u, row.rank, 2 * I));
                    f_store(v + n, lora_expand(f_load(v + n), row.b + I + n0 + n, row.u, row.rank, 2 * I));
                }
                bf16* line = plain + (m + r) * I + n0;
                clamped_swiglu(g, v, bias_gate, bias_up, limit, line);
#ifdef __AVX512BF16__
                std::memcpy(hidden_of[m + r] + n0, line, CHUNK * sizeof(bf16));
#else
                store_group(line, n0 / CHUNK, I, format, hidden_of[m + r]);
#endif
            }
        }
    });
    shrink(LORA_W2, second, products2, rank2, plain, false, I, H);
    Pool::shared().run(active * chunks2, [&](int64_t piece) {
        const int64_t e = by.active[piece / chunks2], n0 = piece % chunks2 * CHUNK, end = by.first[e + 1];
        float sums[MOST_ROWS * CHUNK], *partials = kept_scratch<float, 1>(PARTIALS);
        for (int64_t m = by.first[e]; m < end; m += MOST_ROWS) {
            const int64_t count = std::min(MOST_ROWS, end - m);
            products((const X* const*)&hidden_of[m], count, w.second.from(e * H + n0), CHUNK, sums, CHUNK, partials);
            for (int64_t r = 0; r < count; r++) {
                const LoraRow& row = second[m + r];
                for (int64_t n = 0; row.rank && n < CHUNK; n += 16)
                    f_store(sums + r * CHUNK + n,
                            lora_expand(f_load(sums + r * CHUNK + n), row.b + n0 + n, row.u, row.rank, H));
                for (int64_t n = 0; n < CHUNK; n++)
                    parts[by.rows[m + r] * H + n0 + n] = sums[r * CHUNK + n] + to_float(b2[e * H + n0 + n]);
            }
        }
    });
    led.run_minor(pieces_of(T), by_rows(T, [=](int64_t t) { add_experts(t, weights, parts, residual, out, k, H); }));
}

// As moe() of moe.h.
extern "C" void lora_moe(const LoraModule* table, const int64_t* slots, const bf16* x, const int64_t* experts,
                         const float* weights, const void* w1, const uint8_t* s1, const bf16* b1, const void* w2,
                         const uint8_t* s2, const bf16* b2, const bf16* residual, bf16* out, float* parts, float limit,
                         int64_t T, int64_t k, int64_t E, int64_t H, int64_t I, const void* ups, Layout layout) {
    lora_moe(Lora{table, slots}, x, experts, weights, w1, s1, b1, w2, s2, b2, residual, out, parts, limit, T, k, E, H, I, ups,
             layout);
}
