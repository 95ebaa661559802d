// Logits to a token, one row at a time: what engine/worker/sampler.py describes, in one pass over the vocabulary for greedy
// rows and two for others.
//
// Shapes: R rows, V vocabulary.

#pragma once

#include "pool.h"
#include "simd.h"

#include <algorithm>
#include <limits>
#include <vector>

static const int64_t DRAW_BLOCK = 128;

// Philox4x32-10 (Salmon et al. 2011) of a seed and a position -> [0, 1), 53 bits.
static inline double philox_uniform(int64_t seed, int64_t position) {
    uint32_t c0 = uint32_t(position), c1 = uint32_t(uint64_t(position) >> 32), c2 = 0, c3 = 0;
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(uint64_t(seed) >> 32);
    for (int round = 0; round < 10; round++) {
        const uint64_t p0 = uint64_t(c0) * 0xD2511F53u, p1 = uint64_t(c2) * 0xCD9E8D57u;
        c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
        c1 = uint32_t(p1);
        c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
        c3 = uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    const uint64_t bits = ((uint64_t(c0) << 21) | (c1 >> 11)) & ((uint64_t(1) << 53) - 1);
    return double(bits) / double(uint64_t(1) << 53);
}

static void apply_mask(float* logits, const int32_t* mask, int64_t V) {  // a set bit allows its token
    for (int64_t word = 0; word * 32 < V; word++) {
        if (mask[word] == -1) continue;
        const int64_t end = std::min<int64_t>(32, V - word * 32);
        for (int64_t bit = 0; bit < end; bit++)
            if (!(uint32_t(mask[word]) >> bit & 1)) logits[word * 32 + bit] = -INFINITY;
    }
}

static float row_peak(const float* logits, int64_t V) {  // NaN if there is one
    F top = f_set(-INFINITY);
    uint32_t nan = 0;
    int64_t i = 0;
    for (; i + 16 <= V; i += 16) {
        top = f_max(top, f_load(logits + i));
        for (int j = 0; j < 16; j++) {
            uint32_t bits;
            std::memcpy(&bits, logits + i + j, 4);
            nan |= (bits & 0x7FFFFFFFu) > 0x7F800000u;
        }
    }
    float peak = f_top(top);
    for (; i < V; i++) {
        nan |= logits[i] != logits[i];
        peak = std::max(peak, logits[i]);
    }
    return nan ? std::numeric_limits<float>::quiet_NaN() : peak;
}

// Index of the weight whose share of the running sum holds `target`; never one without weight. `before`: the sum ahead of it.
template <typename T>
static int64_t invert(const T* weights, int64_t count, double target, double* before) {
    double sum = 0;
    int64_t last = 0;
    *before = 0;
    for (int64_t i = 0; i < count; i++) {
        if (weights[i] <= 0) continue;
        last = i;
        *before = sum;
        sum += weights[i];
        if (sum > target) break;
    }
    return last;
}

// exp((logits - peak) / temperature) of one block, 0 for what is not allowed; beyond the row's end too.
static void block_weights(const float* logits, int64_t left, float peak, float temperature, float* out) {
    float line[DRAW_BLOCK];
    if (left < DRAW_BLOCK) {
        std::fill(line, line + DRAW_BLOCK, -INFINITY);
        std::copy(logits, logits + left, line);
        logits = line;
    }
    for (int64_t i = 0; i < DRAW_BLOCK; i += 16) {
        const F x = f_load(logits + i);
        f_store(out + i, f_where_finite(x, f_exp(f_div(f_sub(x, f_set(peak)), f_set(temperature)))));
    }
}

struct Cut {  // top-k (0: off), top-p, min-p
    int64_t k;
    double p;
    float min_p;
};

// The draw among what top-k, top-p and min-p leave, likeliest first, equal ones in order of their ids. `total`: the sum of all
// weights.
static int64_t draw_cut(const float* logits, int64_t V, float peak, float temperature, Cut cut, double total, double uniform) {
    typedef std::pair<float, int64_t> Candidate;  // (logit, id)
    std::vector<Candidate> found;
    const int64_t k = cut.k > 0 ? std::min(cut.k, V) : 0;
    auto weight = [&](float x) { return std::exp(double((x - peak) / temperature)); };
    for (float depth : {4.0f, 8.0f, 16.0f, 32.0f, INFINITY}) {  // enough candidates are usually near the peak
        const float least = std::isinf(depth) ? -std::numeric_limits<float>::max() : peak - depth * temperature;
        found.clear();
        for (int64_t i = 0; i < V; i++)
            if (logits[i] >= least) found.emplace_back(logits[i], i);
        double mass = 0;
        for (const Candidate& c : found) mass += weight(c.first);
        if (std::isinf(depth) || (k ? int64_t(found.size()) >= k
                                    : (cut.min_p > 0 && std::exp(-double(depth)) < 0.99 * cut.min_p) ||
                                          (cut.p < 1 && mass > (cut.p + 1e-6) * total)))
            break;
    }
    std::sort(found.begin(), found.end(), [](const Candidate& a, const Candidate& b) {
        return a.first > b.first || (a.first == b.first && a.second < b.second);
    });
    if (k && int64_t(found.size()) > k) found.resize(k);
    std::vector<double> kept;
    double mass = k ? 0 : total, ahead = 0;
    if (k)
        for (const Candidate& c : found) mass += weight(c.first);  // top-p is a share of what top-k left
    for (const Candidate& c : found) {
        const double w = weight(c.first);
        if (!kept.empty() && ((cut.p < 1 && ahead >= cut.p * mass) || w < double(cut.min_p))) break;
        kept.push_back(w);
        ahead += w;
    }
    double before;
    return found[invert(kept.data(), int64_t(kept.size()), uniform * ahead, &before)].second;
}

// logits [R, V], masked in place -> tokens, and the largest allowed logit of each row.
// whole [4, R]: the row's mask in `masks` (int32, `words` a row; -1: none), seed, position, top-k;
// real [3, R]: temperature (0 is greedy), top-p, min-p.
extern "C" void pick(float* logits, const int32_t* masks, int64_t words, const int64_t* whole, const double* real,
                     int64_t* tokens, float* peaks, int64_t R, int64_t V) {
    const int64_t *mask_of = whole, *seeds = whole + R, *positions = whole + 2 * R, *top_k = whole + 3 * R;
    const double *temperatures = real, *top_p = real + R, *min_p = real + 2 * R;
    Pool::shared().run(R, [=](int64_t r) {
        float* row = logits + r * V;
        if (mask_of[r] >= 0) apply_mask(row, masks + mask_of[r] * words, V);
        const float peak = peaks[r] = row_peak(row, V), temperature = float(temperatures[r]);
        tokens[r] = 0;
        if (!std::isfinite(peak)) return;
        if (temperatures[r] == 0) {
            tokens[r] = std::find(row, row + V, peak) - row;
            return;
        }
        const int64_t blocks = (V + DRAW_BLOCK - 1) / DRAW_BLOCK;
        std::vector<float> sums(blocks);
        float weights[DRAW_BLOCK];
        double total = 0, before;
        for (int64_t b = 0; b < blocks; b++) {
            block_weights(row + b * DRAW_BLOCK, V - b * DRAW_BLOCK, peak, temperature, weights);
            F sum = f_set(0);
            for (int64_t i = 0; i < DRAW_BLOCK; i += 16) sum = f_add(sum, f_load(weights + i));
            sums[b] = f_sum(sum);
            total += sums[b];
        }
        const double uniform = philox_uniform(seeds[r], positions[r]);
        if (top_k[r] > 0 || top_p[r] < 1 || min_p[r] > 0) {
            tokens[r] = draw_cut(row, V, peak, temperature, {top_k[r], top_p[r], float(min_p[r])}, total, uniform);
            return;
        }
        const int64_t block = invert(sums.data(), blocks, uniform * total, &before);
        block_weights(row + block * DRAW_BLOCK, V - block * DRAW_BLOCK, peak, temperature, weights);
        double inside;
        tokens[r] = block * DRAW_BLOCK + invert(weights, DRAW_BLOCK, uniform * total - before, &inside);
    });
}
