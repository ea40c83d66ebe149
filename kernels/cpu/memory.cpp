// Layers and buffers in the layouts of engine.h.
#include "memory.h"

#include <cmath>

const SfKernels *find_kernels(const char *name) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!std::strcmp(name, "avx512") && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma"))
        return &sf_kernels_avx512;
    if (!std::strcmp(name, "avx2") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &sf_kernels_avx2;
#endif
    return std::strcmp(name, "portable") ? nullptr : &sf_kernels_portable;
}

int64_t tile_rows(const SfKernels &kernels, int64_t points, int64_t most) {
    if (most <= 0) most = kernels.best_tile;
    if (points <= 0) return kernels.block;
    const int64_t rows = ceil_div(points, ceil_div(points, most));
    return ceil_div(rows, kernels.block) * kernels.block;
}

SfLayer allocate_layer(Arena &arena, const SfKernels &kernels, int64_t in, int64_t out) {
    SfLayer layer = {};
    layer.in = in;
    layer.out = out;
    layer.in_panels = ceil_div(in, kernels.panel);
    layer.out_panels = ceil_div(out, kernels.panel);
    layer.forward = arena.floats(layer.out_panels * in * kernels.panel);
    layer.backward = arena.floats(layer.in_panels * out * kernels.panel);
    layer.bias = arena.floats(layer.out_panels * kernels.panel);
    return layer;
}

void pack_layer(const SfKernels &kernels, SfLayer &layer, const float *weight, const float *bias, float omega) {
    const int64_t panel = kernels.panel, in = layer.in, out = layer.out;
    layer.weight_reach = layer.bias_reach = 0;
    for (int64_t n = 0; n < out; ++n) {
        const float *row = weight + n * in;
        float *forward = layer.forward + n / panel * in * panel + n % panel;
        float reach = 0;
        for (int64_t first = 0; first < in; first += panel) {
            float *backward = layer.backward + (first / panel * out + n) * panel;
            for (int64_t k = 0; k < std::min(panel, in - first); ++k) {
                const float w = omega * row[first + k];
                forward[(first + k) * panel] = w;
                backward[k] = w;
                reach += std::fabs(w);
            }
        }
        layer.bias[n] = omega * bias[n];
        // Written so that NaN is kept: a layer with NaN is not bounded.
        if (!(reach <= layer.weight_reach)) layer.weight_reach = reach;
        if (!(std::fabs(layer.bias[n]) <= layer.bias_reach)) layer.bias_reach = std::fabs(layer.bias[n]);
    }
}

SfGradient allocate_gradient(Arena &arena, const SfKernels &kernels, const SfLayer &layer, bool weight,
                             bool bias) {
    return {weight ? arena.floats(layer.in_panels * layer.out * kernels.panel) : nullptr,
            bias ? arena.floats(layer.out_panels * kernels.panel) : nullptr};
}

SfScratch allocate_scratch(Arena &arena, const SfKernels &kernels, const SfTask &task, int64_t tile) {
    SfScratch scratch = {};
    const int64_t depth = task.num_trunk + task.branch_layers, row = tile * kernels.panel;
    scratch.input = arena.floats(ceil_div(task.dims, kernels.panel) * row);
    scratch.sine = arena.pointers(depth);
    scratch.slope = arena.pointers(depth);
    for (int64_t i = 0; i + 1 < depth; ++i) {
        scratch.sine[i] = arena.floats(task.layers[i].out_panels * row);
        if (i >= task.lowest) scratch.slope[i] = arena.floats(task.layers[i].out_panels * row);
    }
    scratch.output = arena.floats(task.layers[depth - 1].out_panels * row);
    if (task.num_branches > 1 && task.num_trunk > 0)
        scratch.joined = arena.floats(task.layers[task.num_trunk - 1].out_panels * row);
    if (task.dpoints) scratch.dinput = arena.floats(task.layers[0].in_panels * row);
    return scratch;
}
