// One training step: losses of N signals and the gradients of their weighted sum, behind extern "C".
#include <algorithm>

#include "interface.h"
#include "memory.h"

namespace {

// Work of one pass below which another thread costs more than it saves: some 50 microseconds with a pool at hand, half a
// millisecond where a thread has to be started.
double flops_per_thread() { return sf_pool ? 5e6 : 5e7; }

bool wanted(const SfSweep &s, int64_t layer) { return s.dweights[layer] || s.dbiases[layer]; }

// Rows [first, last) of a layer's gradient out of the threads' partial sums, always added up in the same order.
void reduce(const SfLayer &layer, int64_t panel, const std::vector<std::vector<SfGradient>> &parts, std::size_t index,
            float omega, float *dweight, float *dbias, int64_t first, int64_t last) {
    if (dweight)
        for (int64_t n = first; n < last; ++n)
            for (int64_t column = 0; column < layer.in; column += panel) {
                const int64_t at = (column / panel * layer.out + n) * panel;
                float *row = dweight + n * layer.in + column;
                const int64_t count = std::min(panel, layer.in - column);
                for (int64_t k = 0; k < count; ++k) row[k] = parts[0][index].weight[at + k];
                for (std::size_t t = 1; t < parts.size(); ++t)
                    for (int64_t k = 0; k < count; ++k) row[k] += parts[t][index].weight[at + k];
                for (int64_t k = 0; k < count; ++k) row[k] *= omega;
            }
    if (dbias)
        for (int64_t n = first; n < last; ++n) {
            float sum = 0;
            for (const std::vector<SfGradient> &part : parts) sum += part[index].bias[n];
            dbias[n] = omega * sum;
        }
}

// Sweeps of networks of one shape, one after another, in the same memory. A network is a trunk of shared layers with a
// branch per signal; a single signal, and linear heads on shared features, are one chain.
class Pass {
   public:
    // `signals` belong to a network; `threads` share its points.
    Pass(const SfSweep &sweep, const SfKernels &kernels, int64_t signals, int64_t threads)
        : s_(sweep), kernels_(kernels), signals_(signals) {
        const int64_t depth = s_.num_layers;
        const bool wide_head = signals > 1 && s_.num_shared >= depth - 1;
        const int64_t trunk = wide_head || signals == 1 ? depth - 1 : s_.num_shared;
        const int64_t branches = wide_head ? 1 : signals;
        for (int64_t branch = 0; branch < branches; ++branch)
            for (int64_t i = branch ? trunk : 0; i < depth; ++i) {
                const int64_t heads = i == depth - 1 && wide_head ? signals : 1;
                layers_.push_back(allocate_layer(arena_, kernels, s_.widths[i], s_.widths[i + 1] * heads));
                sources_.push_back({i, branch});
            }
        task_.layers = layers_.data();
        task_.num_trunk = trunk;
        task_.num_branches = branches;
        task_.branch_layers = depth - trunk;
        task_.lowest = depth;
        for (int64_t i = depth - 1; i >= 0; --i)
            if (wanted(s_, i)) task_.lowest = i;
        if (s_.dpoints) task_.lowest = 0;
        task_.points = s_.points;
        task_.dims = s_.widths[0];
        std::memcpy(task_.value_strides, s_.value_strides, sizeof task_.value_strides);
        std::memcpy(task_.point_weight_strides, s_.point_weight_strides, sizeof task_.point_weight_strides);
        task_.channels = s_.channels;
        task_.num_points = s_.num_points;
        task_.dpoints = s_.dpoints;

        // Every thread has whole blocks, so that none but the last fills a tile with zeros.
        blocks_ = ceil_div(s_.num_points, kernels.block);
        threads_ = std::max<int64_t>(1, std::min(threads, blocks_));
        tile_ = tile_rows(kernels, ceil_div(s_.num_points, threads_), s_.tile);
        gradients_.resize(threads_);
        losses_.resize(threads_);
        for (int64_t t = 0; t < threads_; ++t) {
            scratches_.push_back(allocate_scratch(arena_, kernels, task_, tile_));
            for (std::size_t i = 0; i < layers_.size(); ++i)
                gradients_[t].push_back(allocate_gradient(arena_, kernels, layers_[i], s_.dweights[sources_[i].layer],
                                                          s_.dbiases[sources_[i].layer]));
            losses_[t].resize(signals);
            scratches_[t].gradients = gradients_[t].data();
            scratches_[t].losses = losses_[t].data();
        }
    }

    // The network whose first signal is `signal`.
    void run(int64_t signal) {
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            const Place place = find(i, signal);
            pack_layer(kernels_, layers_[i], s_.weights[place.layer] + place.weight, s_.biases[place.layer] + place.bias,
                       s_.omegas[place.layer]);
        }
        if (s_.predictions)
            task_.predictions = s_.predictions + signal * s_.num_points * s_.channels;
        else
            task_.values = s_.values + signal * s_.value_strides[0];
        if (s_.point_weights) task_.point_weights = s_.point_weights + signal * s_.point_weight_strides[0];
        if (s_.scale) task_.scale = s_.scale + signal;
        in_parallel(threads_, [&](int64_t t) {
            clear(t);
            const int64_t first = std::min(s_.num_points, blocks_ * t / threads_ * kernels_.block);
            const int64_t last = std::min(s_.num_points, blocks_ * (t + 1) / threads_ * kernels_.block);
            kernels_.sweep(&task_, &scratches_[t], first, last, tile_);
        });
        if (s_.predictions) return;
        const int64_t helpers = threads_ > 4 || sf_pool ? threads_ : 1;  // starting threads may cost more than it saves
        in_parallel(helpers, [&](int64_t t) {
            for (std::size_t i = 0; i < layers_.size(); ++i) {
                const Place place = find(i, signal);
                float *dweight = s_.dweights[place.layer], *dbias = s_.dbiases[place.layer];
                reduce(layers_[i], kernels_.panel, gradients_, i, s_.omegas[place.layer],
                       dweight ? dweight + place.weight : nullptr, dbias ? dbias + place.bias : nullptr,
                       layers_[i].out * t / helpers, layers_[i].out * (t + 1) / helpers);
            }
        });
        for (int64_t n = 0; n < signals_; ++n) {
            s_.losses[signal + n] = 0;
            for (const std::vector<double> &part : losses_) s_.losses[signal + n] += part[n];
        }
    }

   private:
    struct Source {
        int64_t layer, branch;
    };
    struct Place {
        int64_t layer, weight, bias;  // which of the caller's tensors, and where in it
    };

    Place find(std::size_t index, int64_t signal) const {
        const auto [layer, branch] = sources_[index];
        const int64_t row = layer < s_.num_shared ? 0 : signal + branch, out = s_.widths[layer + 1];
        return {layer, row * out * s_.widths[layer], row * out};
    }

    void clear(int64_t t) {
        for (std::size_t i = 0; i < layers_.size(); ++i) {
            const SfLayer &layer = layers_[i];
            const SfGradient &gradient = gradients_[t][i];
            const int64_t panel = kernels_.panel;
            if (gradient.weight)
                std::memset(gradient.weight, 0, sizeof(float) * layer.in_panels * layer.out * panel);
            if (gradient.bias) std::memset(gradient.bias, 0, sizeof(float) * layer.out_panels * panel);
        }
        std::fill(losses_[t].begin(), losses_[t].end(), 0.0);
    }

    const SfSweep &s_;
    const SfKernels &kernels_;
    const int64_t signals_;
    Arena arena_;
    std::vector<SfLayer> layers_;
    std::vector<Source> sources_;
    SfTask task_ = {};
    int64_t blocks_ = 0, threads_ = 0, tile_ = 0;
    std::vector<std::vector<SfGradient>> gradients_;  // per thread and layer
    std::vector<std::vector<double>> losses_;
    std::vector<SfScratch> scratches_;
};

}  // namespace

extern "C" {

int sf_sweep(const SfSweep *sweep) {
    const SfSweep &s = *sweep;
    const SfKernels *kernels = find_kernels(s.kernels);
    if (!kernels) return 1;
    const double passes = s.predictions ? 1 : 3;
    double flops = 0;
    for (int64_t i = 0; i < s.num_layers; ++i)
        flops += 2 * passes * s.widths[i] * s.widths[i + 1] * (i < s.num_shared ? 1 : s.num_signals) * s.num_points;
    const int64_t threads = std::max<int64_t>(
        1, std::min<int64_t>(s.threads, static_cast<int64_t>(std::min(flops / flops_per_thread(), 1e6))));
    try {
        if (s.num_shared > 0 || s.num_signals == 1) {
            Pass(s, *kernels, s.num_signals, threads).run(0);
        } else if (s.num_signals >= threads && !s.dpoints) {
            std::atomic<int64_t> next{0};
            in_parallel(threads, [&](int64_t) {
                Pass pass(s, *kernels, 1, 1);
                for (int64_t n = next++; n < s.num_signals; n = next++) pass.run(n);
            });
        } else {
            Pass pass(s, *kernels, 1, threads);
            for (int64_t n = 0; n < s.num_signals; ++n) pass.run(n);
        }
    } catch (...) {
        return 2;
    }
    return 0;
}

int sf_interface(int64_t sweep, int64_t fit) { return sweep == sizeof(SfSweep) && fit == sizeof(SfFit) ? 3 : 0; }

void sf_use_pool(void *parallel) { sf_pool = reinterpret_cast<SfPool>(parallel); }

int sf_has_kernels(const char *name) { return find_kernels(name) != nullptr; }

int sf_sincos(const char *name, const float *x, float *sine, float *cosine, int64_t count) {
    const SfKernels *kernels = find_kernels(name);
    if (!kernels) return 1;
    kernels->sincos(x, sine, cosine, count);
    return 0;
}
}
