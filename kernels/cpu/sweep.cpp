// One training step: losses of N signals and the gradients of their weighted sum, behind extern "C".
#include <algorithm>

#include "memory.h"

extern "C" {

// Networks: layers [0, num_shared) are plain [out, in], the rest stacked [N, out, in]. All arrays are contiguous but
// values and point_weights, which have strides in elements. Null gradients are not wanted.
struct SfSweep {
    int64_t num_points, num_signals, channels, num_layers, num_shared;
    const int64_t *widths;         // [num_layers + 1]: inputs, then outputs of each layer
    const float *const *weights;
    const float *const *biases;
    const float *omegas;           // [num_layers]; the head's is 1
    const float *points;
    const float *values;
    int64_t value_strides[3];      // signal, point, channel
    const float *point_weights;    // or null
    int64_t point_weight_strides[2];
    const float *scale;            // [N]: 2 signal_weight / (total weight * channels)
    float *const *dweights;        // [num_layers] of pointers, shaped as the weights; overwritten
    float *const *dbiases;
    float *dpoints;                // added to
    double *losses;                // [N] sums of squares; overwritten
    int64_t tile;                  // points at once; 0 chooses
    int64_t threads;
    const char *kernels;           // "avx512", "avx2" or "portable"
};
}

namespace {

// Work of one pass below which another thread costs more than it saves: half a millisecond.
constexpr double FLOPS_PER_THREAD = 5e7;

bool wanted(const SfSweep &s, int64_t layer) { return s.dweights[layer] || s.dbiases[layer]; }

// A layer's gradient out of the threads' partial sums, always added up in the same order.
void reduce(const SfLayer &layer, int64_t panel, const std::vector<SfGradient *> &parts, std::size_t index,
            float omega, float *dweight, float *dbias, int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
        if (dweight)
            for (int64_t k = 0; k < layer.in; ++k) {
                const int64_t at = (k / panel * layer.out + n) * panel + k % panel;
                float sum = 0;
                for (SfGradient *part : parts) sum += part[index].weight[at];
                dweight[n * layer.in + k] = omega * sum;
            }
        if (dbias) {
            float sum = 0;
            for (SfGradient *part : parts) sum += part[index].bias[n];
            dbias[n] = omega * sum;
        }
    }
}

// One network (a trunk with branches) on all points, on `threads` threads.
// `shared` counts the layers that all its signals share; `signal` is its first signal, `signals` their number.
void run(const SfSweep &s, const SfKernels &kernels, int64_t shared, int64_t signal, int64_t signals,
         int64_t threads) {
    const int64_t depth = s.num_layers;
    const bool wide_head = shared >= depth - 1 && signals > 1;  // linear heads on shared features: one wide product
    const int64_t trunk = wide_head || signals == 1 ? depth - 1 : shared;
    const int64_t branches = wide_head ? 1 : signals, branch_layers = depth - trunk;

    struct Source {
        int64_t layer, offset_weight, offset_bias;
    };
    Arena arena;
    std::vector<SfLayer> layers;
    std::vector<Source> sources;
    for (int64_t branch = 0; branch < branches; ++branch)
        for (int64_t i = branch ? trunk : 0; i < depth; ++i) {
            const int64_t in = s.widths[i], heads = i == depth - 1 && wide_head ? signals : 1;
            const int64_t row = i < s.num_shared ? 0 : signal + branch, out = s.widths[i + 1];
            layers.push_back(allocate_layer(arena, kernels, in, out * heads));
            sources.push_back({i, row * out * in, row * out});
            pack_layer(kernels, layers.back(), s.weights[i] + sources.back().offset_weight,
                       s.biases[i] + sources.back().offset_bias, s.omegas[i]);
        }

    SfTask task = {};
    task.layers = layers.data();
    task.num_trunk = trunk;
    task.num_branches = branches;
    task.branch_layers = branch_layers;
    task.lowest = depth;
    for (int64_t i = depth - 1; i >= 0; --i)
        if (wanted(s, i)) task.lowest = i;
    if (s.dpoints) task.lowest = 0;
    task.points = s.points;
    task.dims = s.widths[0];
    task.values = s.values + signal * s.value_strides[0];
    std::memcpy(task.value_strides, s.value_strides, sizeof task.value_strides);
    if (s.point_weights) task.point_weights = s.point_weights + signal * s.point_weight_strides[0];
    std::memcpy(task.point_weight_strides, s.point_weight_strides, sizeof task.point_weight_strides);
    task.scale = s.scale + signal;
    task.channels = s.channels;
    task.dpoints = s.dpoints;

    // Every thread has whole blocks, so that none but the last fills a tile with zeros.
    const int64_t blocks = ceil_div(s.num_points, kernels.block);
    threads = std::max<int64_t>(1, std::min(threads, blocks));
    const int64_t tile = tile_rows(kernels, ceil_div(s.num_points, threads), s.tile);
    std::vector<std::vector<SfGradient>> gradients(threads);
    std::vector<std::vector<double>> losses(threads);
    std::vector<SfScratch> scratches(threads);
    for (int64_t t = 0; t < threads; ++t) {
        scratches[t] = allocate_scratch(arena, kernels, task, tile);
        for (std::size_t i = 0; i < layers.size(); ++i)
            gradients[t].push_back(allocate_gradient(arena, kernels, layers[i], s.dweights[sources[i].layer],
                                                     s.dbiases[sources[i].layer]));
        losses[t].assign(signals, 0.0);
        scratches[t].gradients = gradients[t].data();
        scratches[t].losses = losses[t].data();
    }
    in_parallel(threads, [&](int64_t t) {
        const int64_t first = std::min(s.num_points, blocks * t / threads * kernels.block);
        const int64_t last = std::min(s.num_points, blocks * (t + 1) / threads * kernels.block);
        kernels.sweep(&task, &scratches[t], first, last, tile);
    });

    std::vector<SfGradient *> parts;
    for (std::vector<SfGradient> &part : gradients) parts.push_back(part.data());
    auto reduce_rows = [&](int64_t t, int64_t of) {
        for (std::size_t i = 0; i < layers.size(); ++i) {
            const Source &source = sources[i];
            float *dweight = s.dweights[source.layer], *dbias = s.dbiases[source.layer];
            reduce(layers[i], kernels.panel, parts, i, s.omegas[source.layer],
                   dweight ? dweight + source.offset_weight : nullptr, dbias ? dbias + source.offset_bias : nullptr,
                   layers[i].out * t / of, layers[i].out * (t + 1) / of);
        }
    };
    const int64_t helpers = threads > 4 ? threads : 1;  // below, starting threads costs more than they save
    in_parallel(helpers, [&](int64_t t) { reduce_rows(t, helpers); });
    for (int64_t n = 0; n < signals; ++n) {
        s.losses[signal + n] = 0;
        for (const std::vector<double> &part : losses) s.losses[signal + n] += part[n];
    }
}

}  // namespace

extern "C" {


// 0: done; 1: these kernels are not here; 2: no memory or no thread.
int sf_sweep(const SfSweep *sweep) {
    const SfSweep &s = *sweep;
    const SfKernels *kernels = find_kernels(s.kernels);
    if (!kernels) return 1;
    double flops = 0;
    for (int64_t i = 0; i < s.num_layers; ++i)
        flops += 6.0 * s.widths[i] * s.widths[i + 1] * (i < s.num_shared ? 1 : s.num_signals) * s.num_points;
    const int64_t threads = std::max<int64_t>(
        1, std::min<int64_t>(s.threads, static_cast<int64_t>(std::min(flops / FLOPS_PER_THREAD, 1e6))));
    try {
        if (s.num_shared > 0 || s.num_signals == 1) {
            run(s, *kernels, s.num_shared, 0, s.num_signals, threads);
        } else if (s.num_signals >= threads && !s.dpoints) {
            in_parallel(threads, [&](int64_t t) {
                for (int64_t n = s.num_signals * t / threads; n < s.num_signals * (t + 1) / threads; ++n)
                    run(s, *kernels, 0, n, 1, 1);
            });
        } else {
            for (int64_t n = 0; n < s.num_signals; ++n) run(s, *kernels, 0, n, 1, threads);
        }
    } catch (...) {
        return 2;
    }
    return 0;
}

// Version of what crosses extern "C".
int sf_interface() { return 1; }

// Whether this CPU and this build have the kernels of that name.
int sf_has_kernels(const char *name) { return find_kernels(name) != nullptr; }

// sin and cos of `count` floats, for tests of the engine's own approximation. 0, or 1 as above.
int sf_sincos(const char *name, const float *x, float *sine, float *cosine, int64_t count) {
    const SfKernels *kernels = find_kernels(name);
    if (!kernels) return 1;
    kernels->sincos(x, sine, cosine, count);
    return 0;
}
}
