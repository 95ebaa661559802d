// Mixture of experts: the router's choice, and the chosen experts' products. Shapes as in native.cpp.

#pragma once

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

// The rows of x by expert: rows first[e] .. first[e + 1] - 1 of `rows` go through expert e.
struct ByExpert {
    std::vector<int64_t> first, rows, active;

    ByExpert(const int64_t* experts, int64_t count, int64_t E) : first(E + 1, 0), rows(count) {
        for (int64_t i = 0; i < count; i++) first[experts[i] + 1]++;
        for (int64_t e = 0; e < E; e++) first[e + 1] += first[e];
        std::vector<int64_t> next(first.begin(), first.end() - 1);
        for (int64_t i = 0; i < count; i++) rows[next[experts[i]]++] = i;
        for (int64_t e = 0; e < E; e++)
            if (first[e + 1] > first[e]) active.push_back(e);
    }
};

// 32 columns n0 .. of the hidden rows of expert e.
static void hidden_chunk(const X* const* x, X* const* hidden, int64_t rows, const Experts& w, int64_t e, const bf16* bias_gate,
                         const bf16* bias_up, float limit, int64_t n0, int64_t I) {
    float gates[MOST_ROWS * CHUNK], ups[MOST_ROWS * CHUNK];
    for (int64_t m = 0; m < rows; m += MOST_ROWS) {
        const int64_t count = std::min(MOST_ROWS, rows - m);
        w.first(x + m, count, e, n0, gates, ups);
        for (int64_t r = 0; r < count; r++) {
#ifdef __AVX512BF16__
            clamped_swiglu(gates + r * CHUNK, ups + r * CHUNK, bias_gate, bias_up, limit, hidden[m + r] + n0);
#else
            bf16 line[CHUNK];
            clamped_swiglu(gates + r * CHUNK, ups + r * CHUNK, bias_gate, bias_up, limit, line);
            store_group(line, n0 / CHUNK, I, w.second.format, hidden[m + r]);
#endif
        }
    }
}

// Row t of out [T, H] = residual[t] + sum_j weights[t, j] * parts[t, j].
static inline void add_experts(int64_t t, const float* weights, const float* parts, const bf16* residual, bf16* out, int64_t k,
                               int64_t H) {
    for (int64_t h = 0; h < H; h++) {
        float sum = to_float(residual[t * H + h]);
        for (int64_t j = 0; j < k; j++) sum += weights[t * k + j] * parts[(t * k + j) * H + h];
        out[t * H + h] = to_bf16(sum);
    }
}

// out[t] = residual[t] + sum_j weight[t, j] * (w2 . swiglu(w1 . x[t] + b1) + b2); b1: I gates, then I ups.
// w1, s1, w2, s2, ups: see Layout. parts [T k, H] is scratch.
template <typename Workers>
static void moe(Workers& workers, const bf16* x, const int64_t* experts, const float* weights, const void* w1, const uint8_t* s1,
                const bf16* b1, const void* w2, const uint8_t* s2, const bf16* b2, const bf16* residual, bf16* out, float* parts,
                float limit, int64_t T, int64_t k, int64_t E, int64_t H, int64_t I, const void* ups, Layout layout) {
    const ByExpert by(experts, T * k, E);
    const Experts w(w1, s1, ups, w2, s2, layout, H, I);
    const Format format = w.second.format;
    const X* const* tokens = rows_of_x<2>(workers, x, T, H, format);
    const int64_t width = x_columns(I, format);
    X* hidden = workers.template shared<X, 0>(T * k * width);
    std::vector<const X*> x_of(T * k);
    std::vector<X*> hidden_of(T * k);
    for (int64_t r = 0; r < T * k; r++) {
        x_of[r] = tokens[by.rows[r] / k];
        hidden_of[r] = hidden + r * width;
    }
    const int64_t chunks1 = I / CHUNK, chunks2 = H / CHUNK, active = by.active.size();
    workers.run(active * chunks1, [&](int64_t piece) {
        const int64_t e = by.active[piece / chunks1], n0 = piece % chunks1 * CHUNK, begin = by.first[e];
        hidden_chunk(&x_of[begin], &hidden_of[begin], by.first[e + 1] - begin, w, e, b1 + e * 2 * I + n0,
                     b1 + e * 2 * I + I + n0, limit, n0, I);
    });
    workers.run(active * chunks2, [&](int64_t piece) {
        const int64_t e = by.active[piece / chunks2], n0 = piece % chunks2 * CHUNK, end = by.first[e + 1];
        float sums[MOST_ROWS * CHUNK], *partials = kept_scratch<float, 1>(PARTIALS);
        for (int64_t m = by.first[e]; m < end; m += MOST_ROWS) {
            const int64_t count = std::min(MOST_ROWS, end - m);
            products((const X* const*)&hidden_of[m], count, w.second.from(e * H + n0), CHUNK, sums, CHUNK, partials);
            for (int64_t r = 0; r < count; r++)
                for (int64_t n = 0; n < CHUNK; n++)
                    parts[by.rows[m + r] * H + n0 + n] = sums[r * CHUNK + n] + to_float(b2[e * H + n0 + n]);
        }
    });
    workers.run_minor(pieces_of(T), by_rows(T, [=](int64_t t) { add_experts(t, weights, parts, residual, out, k, H); }));
}

extern "C" void moe(const bf16* x, const int64_t* experts, const float* weights, const void* w1, const uint8_t* s1,
                    const bf16* b1, const void* w2, const uint8_t* s2, const bf16* b2, const bf16* residual, bf16* out,
                    float* parts, float limit, int64_t T, int64_t k, int64_t E, int64_t H, int64_t I, const void* ups,
                    Layout layout) {
    Led led;
    moe(led, x, experts, weights, w1, s1, b1, w2, s2, b2, residual, out, parts, limit, T, k, E, H, I, ups, layout);
}
