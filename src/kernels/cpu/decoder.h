// All layers of a step in one call: the kernels of native.cpp in the order of engine/model/gpt_oss.py, so that a step of a
// small model is not spent on calling them one by one.

#pragma once

#include <memory>

struct LayerPointers {  // a row of CpuLayerStack's table; scales are null where the matrix is bfloat16
    const bf16* attention_norm;
    const void* qkv;
    const float* qkv_scales;
    const bf16 *qkv_bias, *sinks;
    const void* out;
    const float* out_scales;
    const bf16 *out_bias, *mlp_norm, *router, *router_bias;
    const void* w1;
    const uint8_t* s1;
    const bf16* b1;
    const void* w2;
    const uint8_t* s2;
    const bf16* b2;
    const void* ups;
    bf16 *key_cache, *value_cache;
    int64_t plan;
    Layout layout;
};

struct PlanPointers {  // of a layer type: where new tokens are stored, and what they see (attention above)
    const int64_t *mapping, *slots, *base, *first, *last;
};

template <typename T>
static std::unique_ptr<T[]> scratch(int64_t count) {
    return std::unique_ptr<T[]>(new T[count]);
}

// x [T, H] is changed in place; cos, sin [T, D / 2]. adapters [L, S, LORA_MODULES], slots [T]: null without adapters.
extern "C" void decoder(const LayerPointers* layers, const PlanPointers* plans, bf16* x, const float* cos, const float* sin,
                        float eps, float scale, float limit, int64_t L, int64_t T, int64_t H, int64_t heads, int64_t groups,
                        int64_t E, int64_t k, int64_t I, const LoraModule* adapters, const int64_t* slots, int64_t S) {
    const int64_t D = 64, width = (heads + 2 * groups) * D, qkv_widths[] = {heads * D, groups * D, groups * D};
    auto normed = scratch<bf16>(T * H), qkv = scratch<bf16>(T * width), seen = scratch<bf16>(T * heads * D);
    auto logits = scratch<bf16>(T * E);
    auto wide = scratch<float>(T * E), weights = scratch<float>(T * k), parts = scratch<float>(T * k * H);
    auto experts = scratch<int64_t>(T * k);
    for (int64_t n = 0; n < L; n++) {
        const LayerPointers& layer = layers[n];
        const PlanPointers& plan = plans[layer.plan];
        const Lora lora{adapters + n * S * LORA_MODULES, slots};
        rms_norm(x, layer.attention_norm, normed.get(), eps, T, H);
        linear(normed.get(), layer.qkv, layer.qkv_scales, layer.qkv_bias, nullptr, qkv.get(), 0, T, width, H);
        if (slots) lora_linear(lora, normed.get(), qkv.get(), LORA_Q, 3, qkv_widths, T, H);
        rope_and_store(qkv.get(), cos, sin, plan.mapping, layer.key_cache, layer.value_cache, T, heads, groups, D);
        attention(qkv.get(), layer.key_cache, layer.value_cache, layer.sinks, seen.get(), plan.slots, plan.base, plan.first,
                  plan.last, scale, T, heads, groups);
        linear(seen.get(), layer.out, layer.out_scales, layer.out_bias, x, x, 0, T, H, heads * D);
        if (slots) lora_linear(lora, seen.get(), x, LORA_OUT, 1, &H, T, heads * D);
        rms_norm(x, layer.mlp_norm, normed.get(), eps, T, H);
        linear(normed.get(), layer.router, nullptr, layer.router_bias, nullptr, logits.get(), 0, T, E, H);
        if (slots) lora_linear(lora, normed.get(), logits.get(), LORA_ROUTER, 1, &E, T, H);
        for (int64_t i = 0; i < T * E; i++) wide[i] = to_float(logits[i]);
        route(wide.get(), experts.get(), weights.get(), T, E, k);
        if (slots)
            lora_moe(lora, normed.get(), experts.get(), weights.get(), layer.w1, layer.s1, layer.b1, layer.w2, layer.s2,
                     layer.b2, x, x, parts.get(), limit, T, k, E, H, I, layer.ups, layer.layout);
        else
            moe(normed.get(), experts.get(), weights.get(), layer.w1, layer.s1, layer.b1, layer.w2, layer.s2, layer.b2, x, x,
                parts.get(), limit, T, k, E, H, I, layer.ups, layer.layout);
    }
}
