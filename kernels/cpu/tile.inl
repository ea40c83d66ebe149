// A sweep of one network over a range of points, tile by tile, for the instruction set of the including file.
// A tile of at most ~100 points goes all the way: sine layers forward, residual, backward chain, weight gradients.
// Whatever it needs besides the weights stays in the first two caches.

namespace {

#include "vector.inl"

constexpr int PANEL = 2 * LANES;     // features
constexpr int BLOCK = SF_BLOCK;      // points whose products with a panel of weights stay in registers
constexpr int OUTER = SF_OUTER;      // outputs whose outer products with a panel of inputs stay in registers
constexpr int NARROW = 4;            // features up to which a layer's inputs or outputs are few: no panels of them

SF_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Vectors of panel `index` that hold some of `features`.
SF_INLINE bool half_empty(int64_t features, int64_t index) { return features - index * PANEL <= LANES; }

// sums[r][j] += sum_k a[r][k] b[k][j]: `a` in panels of `depth` features, `stride` apart; `b` [depth][PANEL].
template <int VECTORS>
SF_INLINE void product(const float *a, int64_t stride, const float *b, int64_t depth, vec (&sums)[BLOCK][VECTORS]) {
    for (int64_t done = 0; done < depth; done += PANEL, a += stride) {
        const int64_t steps = least(PANEL, depth - done);
        for (int64_t k = 0; k < steps; ++k, b += PANEL) {
            __builtin_prefetch(b + 8 * PANEL);
            if (VECTORS == 2) __builtin_prefetch(b + 8 * PANEL + LANES);
            vec w[VECTORS];
            SF_UNROLL
            for (int j = 0; j < VECTORS; ++j) w[j] = load(b + j * LANES);
            SF_UNROLL
            for (int r = 0; r < BLOCK; ++r) {
                const float x = a[r * PANEL + k];
                SF_UNROLL
                for (int j = 0; j < VECTORS; ++j) sums[r][j] += x * w[j];
            }
        }
    }
}

enum Kind { LINEAR, SINE, SINE_AND_SLOPE };

template <Kind KIND, bool BOUNDED, int VECTORS>
void forward_panel(const SfLayer &layer, int64_t panel, const float *x, int64_t tile, int64_t rows, float *out,
                   float *slope) {
    const float *weight = layer.forward + panel * layer.in * PANEL;
    for (int64_t row = 0; row < rows; row += BLOCK) {
        vec z[BLOCK][VECTORS];
        SF_UNROLL
        for (int j = 0; j < VECTORS; ++j) {
            const vec bias = load(layer.bias + panel * PANEL + j * LANES);
            SF_UNROLL
            for (int r = 0; r < BLOCK; ++r) z[r][j] = bias;
        }
        product<VECTORS>(x + row * PANEL, tile * PANEL, weight, layer.in, z);
        SF_UNROLL
        for (int r = 0; r < BLOCK; ++r)
            SF_UNROLL
            for (int j = 0; j < VECTORS; ++j) {
                const int64_t at = (panel * tile + row + r) * PANEL + j * LANES;
                if (KIND == LINEAR) {
                    store(out + at, z[r][j]);
                    continue;
                }
                vec sine, cosine;
                if (BOUNDED)
                    sincos_bounded(z[r][j], sine, cosine);
                else
                    sincos_any(z[r][j], sine, cosine);
                store(out + at, sine);
                if (KIND == SINE_AND_SLOPE) store(slope + at, cosine);
            }
    }
}

template <Kind KIND, bool BOUNDED>
void forward(const SfLayer &layer, const float *x, int64_t tile, int64_t rows, float *out, float *slope) {
    for (int64_t panel = 0; panel < layer.out_panels; ++panel)
        if (half_empty(layer.out, panel))
            forward_panel<KIND, BOUNDED, 1>(layer, panel, x, tile, rows, out, slope);
        else
            forward_panel<KIND, BOUNDED, 2>(layer, panel, x, tile, rows, out, slope);
}

// out = sin(x W^T + b); with a slope also its cosine. `largest` bounds |x|.
void sine_layer(const SfLayer &layer, const float *x, float largest, int64_t tile, int64_t rows, float *out,
                float *slope) {
    const bool bounded = layer.weight_reach * largest + layer.bias_reach <= SINE_LIMIT;  // false for NaN
    if (slope)
        bounded ? forward<SINE_AND_SLOPE, true>(layer, x, tile, rows, out, slope)
                : forward<SINE_AND_SLOPE, false>(layer, x, tile, rows, out, slope);
    else
        bounded ? forward<SINE, true>(layer, x, tile, rows, out, slope)
                : forward<SINE, false>(layer, x, tile, rows, out, slope);
}

template <int COUNT>
struct Floats {
    typedef float type __attribute__((vector_size(4 * COUNT)));
};

// The sum of a vector's lanes, half by half.
template <int COUNT>
SF_INLINE float sum_of(typename Floats<COUNT>::type x) {
    if constexpr (COUNT == 4) {
        return (x[0] + x[2]) + (x[1] + x[3]);
    } else {
        typename Floats<COUNT / 2>::type low, high;
        __builtin_memcpy(&low, &x, sizeof low);
        __builtin_memcpy(&high, reinterpret_cast<const char *>(&x) + sizeof low, sizeof high);
        return sum_of<COUNT / 2>(low + high);
    }
}

// A linear layer with at most NARROW outputs, by dot products: in panels it would compute mostly zeros.
void narrow_linear(const SfLayer &layer, const float *x, int64_t tile, int64_t rows, float *out) {
    for (int64_t n = 0; n < layer.out; ++n)
        for (int64_t row = 0; row < rows; ++row) {
            vec total = {};
            for (int64_t panel = 0; panel < layer.in_panels; ++panel) {
                const float *h = x + (panel * tile + row) * PANEL;
                const float *w = layer.backward + (panel * layer.out + n) * PANEL;
                total += load(h) * load(w);
                if (!half_empty(layer.in, panel)) total += load(h + LANES) * load(w + LANES);
            }
            out[row * PANEL + n] = layer.bias[n] + sum_of<LANES>(total);
        }
}

enum Join { MULTIPLY, PUT, ADD };

// The product dz W meets what is there: cosines (giving the next dz, whose column sums are a bias gradient), or sums.
template <Join JOIN, int VECTORS>
void backward_panel(const SfLayer &layer, int64_t panel, const float *dz, int64_t tile, int64_t rows, float *out,
                    float *dbias) {
    const float *weight = layer.backward + panel * layer.out * PANEL;
    vec totals[VECTORS] = {};
    for (int64_t row = 0; row < rows; row += BLOCK) {
        vec dx[BLOCK][VECTORS] = {};
        product<VECTORS>(dz + row * PANEL, tile * PANEL, weight, layer.out, dx);
        SF_UNROLL
        for (int r = 0; r < BLOCK; ++r)
            SF_UNROLL
            for (int j = 0; j < VECTORS; ++j) {
                float *at = out + (panel * tile + row + r) * PANEL + j * LANES;
                vec v = dx[r][j];
                if (JOIN == MULTIPLY) v *= load(at);
                if (JOIN == ADD) v += load(at);
                store(at, v);
                if (JOIN == MULTIPLY) totals[j] += v;
            }
    }
    if (JOIN == MULTIPLY && dbias)
        for (int j = 0; j < VECTORS; ++j) {
            float *at = dbias + panel * PANEL + j * LANES;
            store(at, load(at) + totals[j]);
        }
}

template <Join JOIN>
void backward(const SfLayer &layer, const float *dz, int64_t tile, int64_t rows, float *out, float *dbias) {
    for (int64_t panel = 0; panel < layer.in_panels; ++panel)
        if (half_empty(layer.in, panel))
            backward_panel<JOIN, 1>(layer, panel, dz, tile, rows, out, dbias);
        else
            backward_panel<JOIN, 2>(layer, panel, dz, tile, rows, out, dbias);
}

// slope *= joined, its column sums to dbias: what MULTIPLY does, where the product was summed over branches first.
void multiply_joined(int64_t features, const float *joined, int64_t tile, int64_t rows, float *slope, float *dbias) {
    for (int64_t panel = 0; panel * PANEL < features; ++panel)
        for (int j = 0; j < (half_empty(features, panel) ? 1 : 2); ++j) {
            vec total = {};
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t at = (panel * tile + row) * PANEL + j * LANES;
                const vec v = load(slope + at) * load(joined + at);
                store(slope + at, v);
                total += v;
            }
            if (dbias) {
                float *at = dbias + panel * PANEL + j * LANES;
                store(at, load(at) + total);
            }
        }
}

// COUNT rows of dW, one panel of inputs: sums over points of dz[., n] x[., k].
template <int COUNT, int VECTORS>
void outer(const float *dz, const float *x, int64_t rows, float *dweight) {
    // From zero, not from the running total: short sums lose fewer digits.
    vec sums[COUNT][VECTORS] = {};
    for (int64_t row = 0; row < rows; ++row, dz += PANEL, x += PANEL) {
        vec h[VECTORS];
        SF_UNROLL
        for (int j = 0; j < VECTORS; ++j) h[j] = load(x + j * LANES);
        SF_UNROLL
        for (int n = 0; n < COUNT; ++n)
            SF_UNROLL
            for (int j = 0; j < VECTORS; ++j) sums[n][j] += dz[n] * h[j];
    }
    SF_UNROLL
    for (int n = 0; n < COUNT; ++n)
        SF_UNROLL
        for (int j = 0; j < VECTORS; ++j) {
            float *at = dweight + n * PANEL + j * LANES;
            store(at, load(at) + sums[n][j]);
        }
}

template <int VECTORS, int COUNT = OUTER>
SF_INLINE void outer_of(int64_t count, const float *dz, const float *x, int64_t rows, float *dweight) {
    if (count == COUNT)
        outer<COUNT, VECTORS>(dz, x, rows, dweight);
    else if constexpr (COUNT > 1)
        outer_of<VECTORS, COUNT - 1>(count, dz, x, rows, dweight);
}

// dW of a layer with INPUTS <= NARROW inputs: vectors run along the outputs.
template <int INPUTS, int VECTORS>
void narrow_panel(const float *dz, const float *x, int64_t rows, int64_t outputs, float *dweight) {
    vec sums[INPUTS][VECTORS] = {};
    for (int64_t row = 0; row < rows; ++row)
        SF_UNROLL
        for (int j = 0; j < VECTORS; ++j) {
            const vec d = load(dz + row * PANEL + j * LANES);
            SF_UNROLL
            for (int k = 0; k < INPUTS; ++k) sums[k][j] += x[row * PANEL + k] * d;
        }
    for (int k = 0; k < INPUTS; ++k)
        for (int64_t n = 0; n < outputs; ++n) dweight[n * PANEL + k] += sums[k][n / LANES][n % LANES];
}

template <int INPUTS>
void narrow_gradient(const SfLayer &layer, const float *dz, const float *x, int64_t tile, int64_t rows,
                     float *dweight) {
    for (int64_t panel = 0; panel < layer.out_panels; ++panel) {
        const float *d = dz + panel * tile * PANEL;
        const int64_t outputs = least(PANEL, layer.out - panel * PANEL);
        if (half_empty(layer.out, panel))
            narrow_panel<INPUTS, 1>(d, x, rows, outputs, dweight + panel * PANEL * PANEL);
        else
            narrow_panel<INPUTS, 2>(d, x, rows, outputs, dweight + panel * PANEL * PANEL);
    }
}

void weight_gradient(const SfLayer &layer, const float *dz, const float *x, int64_t tile, int64_t rows,
                     float *dweight) {
    switch (layer.in) {
        case 1: return narrow_gradient<1>(layer, dz, x, tile, rows, dweight);
        case 2: return narrow_gradient<2>(layer, dz, x, tile, rows, dweight);
        case 3: return narrow_gradient<3>(layer, dz, x, tile, rows, dweight);
        case NARROW: return narrow_gradient<NARROW>(layer, dz, x, tile, rows, dweight);
    }
    for (int64_t panel = 0; panel < layer.out_panels; ++panel) {
        const int64_t outputs = least(PANEL, layer.out - panel * PANEL);
        const int64_t groups = (outputs + OUTER - 1) / OUTER;
        for (int64_t in_panel = 0; in_panel < layer.in_panels; ++in_panel)
            for (int64_t group = 0; group < groups; ++group) {
                const int64_t first = outputs * group / groups, count = outputs * (group + 1) / groups - first;
                const float *d = dz + panel * tile * PANEL + first, *h = x + in_panel * tile * PANEL;
                float *to = dweight + (in_panel * layer.out + panel * PANEL + first) * PANEL;
                if (half_empty(layer.in, in_panel))
                    outer_of<1>(count, d, h, rows, to);
                else
                    outer_of<2>(count, d, h, rows, to);
            }
    }
}

// Predictions become the gradient of the loss; squares and column sums are added up. Filling rows become zero.
void residual(const SfTask &task, const SfLayer &head, int64_t signal, int64_t first, int64_t tile, int64_t rows,
              int64_t filled, float *output, float *dbias, double *losses) {
    const int64_t *strides = task.value_strides;
    for (int64_t column = 0; column < head.out; ++column) {
        const int64_t s = signal + column / task.channels, channel = column % task.channels;
        const float *value = task.values + s * strides[0] + first * strides[1] + channel * strides[2];
        const float *weight = task.point_weights ? task.point_weights + s * task.point_weight_strides[0] +
                                                       first * task.point_weight_strides[1]
                                                 : nullptr;
        float *at = output + column / PANEL * tile * PANEL + column % PANEL;
        const float scale = task.scale[s];
        double squares = 0;
        float total = 0;
        for (int64_t row = 0; row < rows; ++row) {
            const float w = weight ? weight[row * task.point_weight_strides[1]] : 1.0f;
            const float difference = at[row * PANEL] - value[row * strides[1]];
            squares += (double)(w * difference * difference);
            const float d = w * difference * scale;
            at[row * PANEL] = d;
            total += d;
        }
        for (int64_t row = rows; row < filled; ++row) at[row * PANEL] = 0.0f;
        losses[s] += squares;
        if (dbias) dbias[column] += total;
    }
}

// Predictions of points [first, first + rows) to where the caller wants them.
void keep_predictions(const SfTask &task, const SfLayer &head, int64_t signal, int64_t first, int64_t tile,
                      int64_t rows, const float *output) {
    for (int64_t column = 0; column < head.out; ++column) {
        const int64_t s = signal + column / task.channels, channel = column % task.channels;
        const float *from = output + column / PANEL * tile * PANEL + column % PANEL;
        float *to = task.predictions + (s * task.num_points + first) * task.channels + channel;
        for (int64_t row = 0; row < rows; ++row) to[row * task.channels] = from[row * PANEL];
    }
}

// Coordinates into panels; returns the largest magnitude (NaN is left out: it makes its own way).
float place_points(const float *points, int64_t dims, int64_t tile, int64_t rows, int64_t filled, float *input) {
    float largest = 0;
    for (int64_t row = 0; row < filled; ++row)
        for (int64_t k = 0; k < dims; ++k) {
            const float x = row < rows ? points[row * dims + k] : 0.0f;
            input[(k / PANEL * tile + row) * PANEL + k % PANEL] = x;
            const float magnitude = __builtin_fabsf(x);
            largest = magnitude > largest ? magnitude : largest;
        }
    return largest;
}

void sweep(const SfTask *task, const SfScratch *scratch, int64_t first, int64_t last, int64_t tile) {
    const SfTask &t = *task;
    const SfScratch &s = *scratch;
    const int64_t trunk = t.num_trunk, depth = trunk + t.branch_layers;
    const float largest_sine = 1.0001f;
    for (int64_t start = first; start < last; start += tile) {
        const int64_t rows = least(tile, last - start), filled = (rows + BLOCK - 1) / BLOCK * BLOCK;
        const float largest = place_points(t.points + start * t.dims, t.dims, tile, rows, filled, s.input);
        auto forward_sine = [&](int64_t i, const SfLayer &layer) {
            sine_layer(layer, i ? s.sine[i - 1] : s.input, i ? largest_sine : largest, tile, filled, s.sine[i],
                       i >= t.lowest ? s.slope[i] : nullptr);
        };
        for (int64_t i = 0; i < trunk; ++i) forward_sine(i, t.layers[i]);
        for (int64_t branch = 0; branch < t.num_branches; ++branch) {
            // By their place in the whole network, so that layers[i] is layer i of this branch for i >= trunk.
            const SfLayer *layers = t.layers + branch * t.branch_layers;
            SfGradient *gradients = s.gradients + branch * t.branch_layers;
            const SfLayer &head = layers[depth - 1];
            for (int64_t i = trunk; i + 1 < depth; ++i) forward_sine(i, layers[i]);
            const float *features = depth > 1 ? s.sine[depth - 2] : s.input;
            if (head.out <= NARROW)
                narrow_linear(head, features, tile, filled, s.output);
            else
                forward<LINEAR, true>(head, features, tile, filled, s.output, nullptr);
            const int64_t signal = branch * (head.out / t.channels);
            if (t.predictions) {
                keep_predictions(t, head, signal, start, tile, rows, s.output);
                continue;
            }
            residual(t, head, signal, start, tile, rows, filled, s.output, gradients[depth - 1].bias, s.losses);
            for (int64_t i = depth - 1; i >= trunk && i >= t.lowest; --i) {
                const float *dz = i == depth - 1 ? s.output : s.slope[i];
                if (gradients[i].weight)
                    weight_gradient(layers[i], dz, i ? s.sine[i - 1] : s.input, tile, rows, gradients[i].weight);
                if (i == 0) {
                    if (t.dpoints) backward<PUT>(layers[0], dz, tile, filled, s.dinput, nullptr);
                } else if (i > t.lowest) {
                    if (i > trunk)
                        backward<MULTIPLY>(layers[i], dz, tile, filled, s.slope[i - 1], gradients[i - 1].bias);
                    else if (t.num_branches == 1)
                        backward<MULTIPLY>(layers[i], dz, tile, filled, s.slope[i - 1], s.gradients[i - 1].bias);
                    else if (branch == 0)
                        backward<PUT>(layers[i], dz, tile, filled, s.joined, nullptr);
                    else
                        backward<ADD>(layers[i], dz, tile, filled, s.joined, nullptr);
                }
            }
        }
        if (trunk > 0 && trunk - 1 >= t.lowest && t.num_branches > 1)
            multiply_joined(t.layers[trunk - 1].out, s.joined, tile, filled, s.slope[trunk - 1],
                            s.gradients[trunk - 1].bias);
        for (int64_t i = trunk - 1; i >= t.lowest; --i) {
            if (s.gradients[i].weight)
                weight_gradient(t.layers[i], s.slope[i], i ? s.sine[i - 1] : s.input, tile, rows,
                                s.gradients[i].weight);
            if (i > t.lowest)
                backward<MULTIPLY>(t.layers[i], s.slope[i], tile, filled, s.slope[i - 1], s.gradients[i - 1].bias);
            else if (i == 0 && t.dpoints)
                backward<PUT>(t.layers[0], s.slope[0], tile, filled, s.dinput, nullptr);
        }
        if (t.dpoints)
            for (int64_t row = 0; row < rows; ++row)
                for (int64_t k = 0; k < t.dims; ++k)
                    t.dpoints[(start + row) * t.dims + k] += s.dinput[(k / PANEL * tile + row) * PANEL + k % PANEL];
    }
}

void sincos(const float *x, float *sine, float *cosine, int64_t count) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t lanes = least(LANES, count - i);
        vec in = {}, s, c;
        __builtin_memcpy(&in, x + i, 4 * lanes);
        sincos_any(in, s, c);
        __builtin_memcpy(sine + i, &s, 4 * lanes);
        __builtin_memcpy(cosine + i, &c, 4 * lanes);
    }
}

#include "optimiser.inl"

}  // namespace

extern "C" const SfKernels SF_TABLE = {SF_NAME, PANEL, BLOCK, SF_TILE, sweep, sincos, adam, fold};
