// Where the matrices of a layer's experts lie, and the products with their first one.

#pragma once

#include "products.h"

static const int64_t CHUNK = 32;  // columns of a piece; I and H are multiples of it

// HALVES: the rows of w1 are I gates, then I ups, of bfloat16 or, with scales, MXFP4. ALTERNATING: gate, up, gate, up, of MXFP4.
// GGUF: w1 has the gates, another matrix the ups; the blocks have the scales.
enum class Layout : int64_t { HALVES, ALTERNATING, GGUF };

// The matrices of all experts of a layer.
struct Experts {
    Matrix gate, up, second;
    int64_t rows;  // of `gate` from an expert to the next
    bool alternate;

    Experts(const void* w1, const uint8_t* s1, const void* ups, const void* w2, const uint8_t* s2, Layout layout, int64_t H, int64_t I)
        : alternate(layout == Layout::ALTERNATING) {
        const Format format = layout == Layout::GGUF ? Format::GGUF : s1 ? Format::MXFP4 : Format::BF16;
        gate = {w1, s1, H, format};
        up = layout == Layout::GGUF ? Matrix{ups, nullptr, H, format} : gate.from(I);
        second = {w2, s2, I, format};
        rows = layout == Layout::GGUF ? I : 2 * I;
    }

    // gates, ups [count, CHUNK] = x times the rows n0 .. of expert e
    void first(const X* const* x, int64_t count, int64_t e, int64_t n0, float* gates, float* ups) const {
        float* partials = kept_scratch<float, 1>(PARTIALS);
        if (!alternate) {
            products(x, count, gate.from(e * rows + n0), CHUNK, gates, CHUNK, partials);
            return products(x, count, up.from(e * rows + n0), CHUNK, ups, CHUNK, partials);
        }
        float both[MOST_ROWS * 2 * CHUNK];
        products(x, count, gate.from(e * rows + 2 * n0), 2 * CHUNK, both, 2 * CHUNK, partials);
        for (int64_t n = 0; n < count * CHUNK; n++) {
            gates[n] = both[2 * n];
            ups[n] = both[2 * n + 1];
        }
    }
};
