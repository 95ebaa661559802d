// All layers of a step in one call: the kernels of native.cpp in the order of engine/model/gpt_oss.py, so that a step of a
// small model is not spent on calling them one by one.

#pragma once

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

static const int64_t MOST_TOGETHER = 8;  // rows of a step that each thread goes through by itself
static const int64_t HEAD = 64;          // D of native.cpp

struct Step {
    const LayerPointers* layers;
    const PlanPointers* plans;
    const bf16* x;  // [T, H]
    const float *cos, *sin;  // [T, D / 2]
    float eps, scale, limit;
    int64_t L, T, H, heads, groups, E, k, I;
    const LoraModule* adapters;  // [L, S, LORA_MODULES], and slots [T]: null without adapters
    const int64_t* adapter_slots;
    int64_t S;

    int64_t width() const { return (heads + 2 * groups) * HEAD; }
};

// out [T, H] = residual + the experts of x [T, H], chosen by the router's logits [T, E].
template <typename Workers>
static void routed_experts(Workers& workers, const Step& s, const LayerPointers& layer, const Lora& lora, const bf16* x,
                           const bf16* logits, const bf16* residual, bf16* out) {
    const int64_t T = s.T, E = s.E, k = s.k;
    float *wide = kept_scratch<float, 12>(T * E), *weights = kept_scratch<float, 13>(T * k);
    int64_t* experts = kept_scratch<int64_t, 14>(T * k);
    float* parts = workers.template shared<float, 1>(T * k * s.H);
    for (int64_t i = 0; i < T * E; i++) wide[i] = to_float(logits[i]);
    route(wide, experts, weights, T, E, k);
    if (s.adapter_slots)
        lora_moe(lora, x, experts, weights, layer.w1, layer.s1, layer.b1, layer.w2, layer.s2, layer.b2, residual, out, parts,
                 s.limit, T, k, E, s.H, s.I, layer.ups, layer.layout);
    else
        moe(workers, x, experts, weights, layer.w1, layer.s1, layer.b1, layer.w2, layer.s2, layer.b2, residual, out, parts,
            s.limit, T, k, E, s.H, s.I, layer.ups, layer.layout);
}

// out [T, H] = one layer of x [T, H]; they may be the same.
template <typename Workers>
static void decoder_layer(Workers& workers, const Step& s, int64_t n, const bf16* x, bf16* out) {
    const LayerPointers& layer = s.layers[n];
    const PlanPointers& plan = s.plans[layer.plan];
    const int64_t T = s.T, H = s.H, E = s.E, heads = s.heads, groups = s.groups, width = s.width(), K = heads * HEAD;
    const int64_t qkv_widths[] = {K, groups * HEAD, groups * HEAD};
    const Lora lora{s.adapters + n * s.S * LORA_MODULES, s.adapter_slots};
    bf16* normed = kept_scratch<bf16, 11>(T * H);
    bf16 *qkv = workers.template shared<bf16, 2>(T * width), *rotated = workers.template shared<bf16, 3>(T * width);
    bf16 *seen = workers.template shared<bf16, 4>(T * K), *attended = workers.template shared<bf16, 5>(T * H);
    bf16* logits = workers.template shared<bf16, 6>(T * E);
    rms_norm(workers, x, layer.attention_norm, normed, s.eps, T, H);
    linear(workers, normed, layer.qkv, layer.qkv_scales, layer.qkv_bias, nullptr, qkv, 0, T, width, H);
    if (s.adapter_slots) lora_linear(lora, normed, qkv, LORA_Q, 3, qkv_widths, T, H);
    rope_and_store(workers, qkv, rotated, s.cos, s.sin, plan.mapping, layer.key_cache, layer.value_cache, T, heads, groups, HEAD);
    attention(workers, rotated, layer.key_cache, layer.value_cache, layer.sinks, seen, plan.slots, plan.base, plan.first,
              plan.last, s.scale, T, heads, groups);
    linear(workers, seen, layer.out, layer.out_scales, layer.out_bias, x, attended, 0, T, H, K);
    if (s.adapter_slots) lora_linear(lora, seen, attended, LORA_OUT, 1, &H, T, K);
    rms_norm(workers, attended, layer.mlp_norm, normed, s.eps, T, H);
    linear(workers, normed, layer.router, nullptr, layer.router_bias, nullptr, logits, 0, T, E, H);
    if (s.adapter_slots) lora_linear(lora, normed, logits, LORA_ROUTER, 1, &E, T, H);
    routed_experts(workers, s, layer, lora, normed, logits, attended, out);
}

// Returns what the layers make of s.x [T, H]: memory of this thread.
template <typename Workers>
static const bf16* all_layers(Workers& workers, const Step& s) {
    bf16* x = kept_scratch<bf16, 15>(s.T * s.H);
    for (int64_t n = 0; n < s.L && !workers.is_over(); n++) decoder_layer(workers, s, n, n ? x : s.x, x);
    return x;
}

// A copy of a step's inputs, for threads that may read them when the caller has gone on.
struct StepCopy {
    std::vector<int64_t> numbers;
    std::vector<PlanPointers> plans;
    std::vector<bf16> x;
    std::vector<float> angles;

    StepCopy(Step& s) : x(s.x, s.x + s.T * s.H), angles(s.cos, s.cos + s.T * HEAD / 2) {
        angles.insert(angles.end(), s.sin, s.sin + s.T * HEAD / 2);
        s.x = x.data(), s.cos = angles.data(), s.sin = s.cos + s.T * HEAD / 2;
        int64_t count = 0;
        for (int64_t n = 0; n < s.L; n++) count = std::max(count, s.layers[n].plan + 1);
        std::vector<size_t> begins;
        for (int64_t n = 0; n < count; n++) append(s.plans[n], s.T, begins);
        for (int64_t n = 0; n < count; n++) {
            const size_t* at = &begins[5 * n];
            const int64_t* data = numbers.data();
            plans.push_back({data + at[0], data + at[1], data + at[2], data + at[3], data + at[4]});
        }
        s.plans = plans.data();
    }

    void append(const PlanPointers& plan, int64_t T, std::vector<size_t>& begins) {
        int64_t slots = 0;
        for (int64_t t = 0; t < T; t++) slots = std::max(slots, plan.base[t] + plan.last[t] + 1);
        const std::pair<const int64_t*, int64_t> arrays[] = {
            {plan.mapping, T}, {plan.slots, slots}, {plan.base, T}, {plan.first, T}, {plan.last, T}};
        for (const auto& [data, size] : arrays) {
            begins.push_back(numbers.size());
            numbers.insert(numbers.end(), data, data + size);
        }
    }
};

// Bytes of `shared` memory, and of phases, that all_layers takes at most.
static std::pair<int64_t, int64_t> bytes_of(const Step& s) {
    const int64_t pairs = s.T * s.k, width = s.width();
    const int64_t columns = std::max({x_columns(s.I, Format::BF16), x_columns(s.I, Format::MXFP4), x_columns(s.I, Format::GGUF)});
    const int64_t hidden = columns * sizeof(X), part = s.H * sizeof(float);
    const int64_t row = (2 * width + s.heads * HEAD + s.H + s.E) * sizeof(bf16);
    const int64_t memory = s.T * row + pairs * (hidden + part) + 7 * 64;
    const int64_t blocks = (width + s.H + s.E) / 16 + 3 + s.T * s.groups + std::min(s.E, pairs) * (s.I + s.H) / CHUNK;
    return {s.L * memory, s.L * (blocks + 7 * Phase::bytes(64))};
}

// Returns false, and computes nothing, where the threads are not free for it.
static bool decode_together(const Step& step, bf16* x) {
    const auto [memory, phases] = bytes_of(step);
    return Sections::all().run(omp_get_max_threads(), memory, phases, [&](Section&) {
        auto own = std::make_shared<Step>(step);
        auto copy = std::make_shared<StepCopy>(*own);
        const std::thread::id caller = std::this_thread::get_id();
        return [own, copy, caller, x](Team& team) {
            const bf16* found = all_layers(team, *own);
            if (std::this_thread::get_id() == caller) std::memcpy(x, found, own->T * own->H * sizeof(bf16));
        };
    });
}

// x [T, H] is changed in place; cos, sin [T, D / 2]. adapters [L, S, LORA_MODULES], slots [T]: null without adapters.
extern "C" void decoder(const LayerPointers* layers, const PlanPointers* plans, bf16* x, const float* cos, const float* sin,
                        float eps, float scale, float limit, int64_t L, int64_t T, int64_t H, int64_t heads, int64_t groups,
                        int64_t E, int64_t k, int64_t I, const LoraModule* adapters, const int64_t* slots, int64_t S) {
    const Step step{layers, plans, x, cos, sin, eps, scale, limit, L, T, H, heads, groups, E, k, I, adapters, slots, S};
    if (!slots && T <= MOST_TOGETHER && omp_get_max_threads() > 1 && decode_together(step, x)) return;
    Led led;
    std::memcpy(x, all_layers(led, step), T * H * sizeof(bf16));
}
