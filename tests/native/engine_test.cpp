// The native engine without Python, for sanitizers: odd sizes, odd memory and bad numbers against a plain loop in double.
// `make test-sanitized` builds and runs it. Prints one line per level and ends with 0, or says what differs.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../kernels/cpu/interface.h"

namespace {

using Floats = std::vector<float>;
using Doubles = std::vector<double>;

std::mt19937 generator(0);

float uniform(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

[[noreturn]] void fail(const std::string &what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::exit(1);
}

struct Shape {
    int64_t points, inputs, width, layers, channels, signals, shared;
    int64_t threads = 1, tile = 0, offset = 0, frozen = 0;
    bool with_points = false, with_weights = false;

    std::string name() const {
        std::string out;
        for (int64_t n : {points, inputs, width, layers, channels, signals, shared, threads, tile, offset, frozen})
            out += std::to_string(n) + " ";
        return out;
    }
};

// Floats that begin `offset` floats after an aligned address, with nothing behind them.
struct Odd {
    Floats memory;
    int64_t offset;
    Odd(int64_t count, int64_t offset_) : memory(static_cast<std::size_t>(count + offset_)), offset(offset_) {}
    float *data() { return memory.data() + offset; }
    int64_t size() const { return static_cast<int64_t>(memory.size()) - offset; }
};

struct Problem {
    Shape shape;
    std::vector<int64_t> widths;
    std::vector<Odd> weights, biases, dweights, dbiases;
    Floats omegas, scale;
    Odd points, values, point_weights, dpoints;
    Doubles losses;

    explicit Problem(const Shape &s)
        : shape(s), points(s.points * s.inputs, s.offset), values(s.signals * s.points * s.channels, s.offset),
          point_weights(s.signals * s.points, s.offset), dpoints(s.points * s.inputs, s.offset), losses(s.signals) {
        widths.push_back(s.inputs);
        for (int64_t i = 0; i < s.layers; ++i) widths.push_back(i + 1 < s.layers ? s.width : s.channels);
        for (int64_t i = 0; i < s.layers; ++i) {
            const int64_t copies = i < s.shared ? 1 : s.signals, in = widths[i], out = widths[i + 1];
            for (std::vector<Odd> *group : {&weights, &dweights}) group->emplace_back(copies * out * in, s.offset);
            for (std::vector<Odd> *group : {&biases, &dbiases}) group->emplace_back(copies * out, s.offset);
            for (int64_t k = 0; k < weights[i].size(); ++k)
                weights[i].data()[k] = uniform(-1, 1) / std::sqrt(static_cast<float>(in));
            for (int64_t k = 0; k < biases[i].size(); ++k) biases[i].data()[k] = uniform(-1, 1);
            omegas.push_back(i + 1 < s.layers ? 1.5f + 0.5f * static_cast<float>(i % 3) : 1.0f);
        }
        for (int64_t k = 0; k < points.size(); ++k) points.data()[k] = uniform(-1, 1);
        for (int64_t k = 0; k < values.size(); ++k) values.data()[k] = uniform(0, 1);
        for (int64_t k = 0; k < point_weights.size(); ++k) point_weights.data()[k] = uniform(0, 1);
        for (int64_t n = 0; n < s.signals; ++n) scale.push_back(uniform(0.5f, 2) / static_cast<float>(s.points + 1));
    }

    // With `predictions`, those alone: what a sweep for the losses needs besides is not there.
    int run(const char *level, float *predictions = nullptr) {
        std::vector<const float *> w, b;
        std::vector<float *> dw, db;
        for (int64_t i = 0; i < shape.layers; ++i) {
            w.push_back(weights[i].data());
            b.push_back(biases[i].data());
            dw.push_back(i < shape.frozen ? nullptr : dweights[i].data());
            db.push_back(i < shape.frozen ? nullptr : dbiases[i].data());
        }
        // Outputs hold something else before: they are overwritten, but for the points' gradient, which is added to.
        for (std::vector<Odd> *group : {&dweights, &dbiases})
            for (Odd &tensor : *group) std::fill(tensor.memory.begin(), tensor.memory.end(), NAN);
        std::fill(losses.begin(), losses.end(), NAN);
        std::fill(dpoints.memory.begin(), dpoints.memory.end(), 0.25f);
        SfSweep sweep = {};
        sweep.num_points = shape.points;
        sweep.num_signals = shape.signals;
        sweep.channels = shape.channels;
        sweep.num_layers = shape.layers;
        sweep.num_shared = shape.shared;
        sweep.widths = widths.data();
        sweep.weights = w.data();
        sweep.biases = b.data();
        sweep.omegas = omegas.data();
        sweep.points = points.data();
        sweep.values = values.data();
        sweep.value_strides[0] = shape.points * shape.channels;
        sweep.value_strides[1] = shape.channels;
        sweep.value_strides[2] = 1;
        if (shape.with_weights) sweep.point_weights = point_weights.data();
        sweep.point_weight_strides[0] = shape.points;
        sweep.point_weight_strides[1] = 1;
        sweep.scale = scale.data();
        sweep.dweights = dw.data();
        sweep.dbiases = db.data();
        if (shape.with_points) sweep.dpoints = dpoints.data();
        sweep.losses = losses.data();
        sweep.tile = shape.tile;
        sweep.threads = shape.threads;
        sweep.kernels = level;
        std::vector<float *> none(shape.layers, nullptr);
        if (predictions) {
            sweep.dweights = sweep.dbiases = none.data();
            sweep.dpoints = nullptr;
            sweep.values = sweep.point_weights = sweep.scale = nullptr;
            sweep.losses = nullptr;
            sweep.predictions = predictions;
        }
        return sf_sweep(&sweep);
    }

    // The same by the definition, one point at a time.
    void truth(Doubles &loss, std::vector<Doubles> &dw, std::vector<Doubles> &db, Doubles &dx, Doubles &predictions) {
        const Shape &s = shape;
        loss.assign(s.signals, 0);
        dx.assign(dpoints.size(), 0.25);
        for (int64_t i = 0; i < s.layers; ++i) {
            dw.emplace_back(weights[i].size(), 0.0);
            db.emplace_back(biases[i].size(), 0.0);
        }
        for (int64_t n = 0; n < s.signals; ++n)
            for (int64_t p = 0; p < s.points; ++p) {
                std::vector<Doubles> x{Doubles(points.data() + p * s.inputs, points.data() + (p + 1) * s.inputs)}, z;
                for (int64_t i = 0; i < s.layers; ++i) {
                    const int64_t in = widths[i], out = widths[i + 1], row = i < s.shared ? 0 : n;
                    const float *w = weights[i].data() + row * out * in, *b = biases[i].data() + row * out;
                    Doubles next(out), sum(out);
                    for (int64_t o = 0; o < out; ++o) {
                        sum[o] = b[o];
                        for (int64_t k = 0; k < in; ++k) sum[o] += static_cast<double>(w[o * in + k]) * x[i][k];
                        sum[o] *= omegas[i];
                        next[o] = i + 1 < s.layers ? std::sin(sum[o]) : sum[o];
                    }
                    z.push_back(sum);
                    x.push_back(next);
                }
                const double weight = s.with_weights ? point_weights.data()[n * s.points + p] : 1.0;
                Doubles d(s.channels);
                for (int64_t c = 0; c < s.channels; ++c) {
                    predictions.push_back(x.back()[c]);
                    d[c] = x.back()[c] - values.data()[(n * s.points + p) * s.channels + c];
                    loss[n] += weight * d[c] * d[c];
                    d[c] *= weight * scale[n];
                }
                for (int64_t i = s.layers - 1; i >= 0; --i) {
                    const int64_t in = widths[i], out = widths[i + 1], row = i < s.shared ? 0 : n;
                    Doubles before(in, 0.0);
                    for (int64_t o = 0; o < out; ++o) {
                        const double dz = d[o] * omegas[i] * (i + 1 < s.layers ? std::cos(z[i][o]) : 1.0);
                        db[i][row * out + o] += dz;
                        for (int64_t k = 0; k < in; ++k) {
                            dw[i][(row * out + o) * in + k] += dz * x[i][k];
                            before[k] += dz * weights[i].data()[(row * out + o) * in + k];
                        }
                    }
                    d = before;
                }
                for (int64_t k = 0; k < s.inputs; ++k) dx[p * s.inputs + k] += d[k];
            }
    }
};

template <class Got>
void compare(const Got *got, const Doubles &want, const std::string &what) {
    double error = 0, norm = 0;
    for (std::size_t i = 0; i < want.size(); ++i) {
        error += (got[i] - want[i]) * (got[i] - want[i]);
        norm += want[i] * want[i];
    }
    if (!(std::sqrt(error) <= 1e-4 * std::sqrt(norm) + 1e-7)) fail(what + ": off by " + std::to_string(std::sqrt(error)));
}

void check(const char *level, const Shape &shape) {
    Problem problem(shape);
    if (problem.run(level)) fail(std::string(level) + " does not run");
    Doubles loss, dx, predictions;
    std::vector<Doubles> dw, db;
    problem.truth(loss, dw, db, dx, predictions);
    const std::string where = std::string(level) + ", shape " + shape.name();
    compare(problem.losses.data(), loss, where + "losses");
    for (int64_t i = shape.frozen; i < shape.layers; ++i) {
        compare(problem.dweights[i].data(), dw[i], where + "weight " + std::to_string(i));
        compare(problem.dbiases[i].data(), db[i], where + "bias " + std::to_string(i));
    }
    if (shape.with_points) compare(problem.dpoints.data(), dx, where + "points");
    Odd found(static_cast<int64_t>(predictions.size()), shape.offset);
    std::fill(found.memory.begin(), found.memory.end(), NAN);
    if (problem.run(level, found.data())) fail(std::string(level) + " predicts nothing");
    compare(found.data(), predictions, where + "predictions");
}

void check_bad_numbers(const char *level, float poison) {
    for (int where = 0; where < 4; ++where) {
        Problem problem(Shape{30, 2, 33, 3, 2, 1, 3});
        Odd *targets[] = {&problem.points, &problem.values, &problem.weights[1], &problem.biases[0]};
        targets[where]->data()[7] = poison;
        if (problem.run(level)) fail("bad numbers do not run");
        if (std::isfinite(problem.losses[0])) fail("a bad number got lost");
    }
    const float large[] = {1e5f, -3e7f, 1e20f, 3e38f, std::numeric_limits<float>::denorm_min(), poison, -0.0f};
    float sine[7], cosine[7];
    sf_sincos(level, large, sine, cosine, 7);
    for (int i = 0; i < 5; ++i)
        if (std::fabs(sine[i] - std::sin(static_cast<double>(large[i]))) > 2e-7) fail("sine of a large number");
}

// Networks fitted in one call, and in many calls with another queue and more threads, must have the same bits.
void check_fits(const char *level, int64_t width, double guard, float rate) {
    constexpr int64_t num = 5, steps = 12;
    const Shape shape{50, 2, width, 3, 2, num, 0};
    const Problem start(shape);
    auto fit = [&](std::vector<int64_t> stops, std::vector<int64_t> rows, int64_t threads, int64_t frozen) {
        Problem p(start);
        std::vector<Floats> m, v, best;
        std::vector<float *> parameters, ms, vs, bests;
        for (int64_t i = 0; i < shape.layers; ++i)
            for (Odd *tensor : {&p.weights[i], &p.biases[i]}) {
                parameters.push_back(tensor->data());
                for (std::vector<Floats> *group : {&m, &v}) group->emplace_back(tensor->size(), 0.0f);
                best.emplace_back(tensor->data(), tensor->data() + tensor->size());
            }
        for (std::size_t i = 0; i < m.size(); ++i) {
            ms.push_back(m[i].data());
            vs.push_back(v[i].data());
            bests.push_back(best[i].data());
        }
        const Floats rates(steps, rate);
        Floats scale(num, 1.0f), mse(num * (steps + 1));
        Doubles target(num, -1.0), best_mse(num, std::numeric_limits<double>::infinity()), seconds(num);
        std::vector<int64_t> step(num), adam(num), rollbacks(num), measured(num), reason(num);
        SfFit f = {};
        f.num_points = shape.points;
        f.channels = shape.channels;
        f.num_layers = shape.layers;
        f.widths = p.widths.data();
        f.omegas = p.omegas.data();
        f.points = p.points.data();
        f.values = p.values.data();
        f.parameters = parameters.data();
        f.exp_avg = ms.data();
        f.exp_avg_sq = vs.data();
        f.frozen = frozen;
        f.budget = steps;
        f.learning_rates = rates.data();
        f.beta1 = 0.9;
        f.beta2 = 0.999;
        f.eps = 1e-8;
        f.target_mse = target.data();
        f.check_every = 2;
        f.guard = guard;
        f.step = step.data();
        f.adam_step = adam.data();
        f.scale = scale.data();
        f.best_mse = best_mse.data();
        f.best = bests.data();
        f.rollbacks = rollbacks.data();
        f.mse = mse.data();
        f.measured = measured.data();
        f.reason = reason.data();
        f.seconds = seconds.data();
        f.threads = threads;
        f.kernels = level;
        for (int64_t stop : stops) {
            std::vector<int64_t> queue;
            for (int64_t row : rows)
                if (reason[row] == SF_RUNNING) queue.push_back(row);
            f.num_rows = static_cast<int64_t>(queue.size());
            f.rows = queue.data();
            f.until = stop;
            if (sf_fit(&f)) fail("a fit does not run");
        }
        for (int64_t n = 0; n < num; ++n)
            if (reason[n] == SF_RUNNING) fail("a fit did not end");
        std::vector<Floats> out;
        for (int64_t i = 0; i < shape.layers; ++i)
            for (Odd *tensor : {&p.weights[i], &p.biases[i]})
                out.emplace_back(tensor->data(), tensor->data() + tensor->size());
        for (const Floats &tensor : out)
            for (float x : tensor)
                if (!std::isfinite(x)) fail("a fit ended with weights that are not finite");
        return out;
    };
    const auto whole = fit({steps}, {0, 1, 2, 3, 4}, 1, 0);
    if (fit({0, 1, 5, steps}, {3, 0, 4, 2, 1}, 3, 0) != whole) fail("a fit depends on its calls, queue or threads");
    const auto frozen = fit({steps}, {0, 1, 2, 3, 4}, 2, 2);
    Problem untouched(start);
    for (int64_t i = 0; i < 2; ++i)
        if (!std::equal(frozen[2 * i].begin(), frozen[2 * i].end(), untouched.weights[i].data()))
            fail("a frozen layer moved");
}

}  // namespace

int main() {
    for (const char *level : {"avx512", "avx2", "portable"}) {
        if (!sf_has_kernels(level)) {
            std::printf("%s: not run, this CPU or build lacks it\n", level);
            continue;
        }
        int64_t cases = 0;
        auto run = [&](Shape shape) {
            check(level, shape);
            ++cases;
        };
        for (int64_t width : {1, 3, 17, 33, 100}) {
            for (int64_t points : {0, 1, 5, 13, 14, 15, 97, 98, 99, 201})
                run({points, 2, width, 3, 1, 1, 3});
            for (int64_t signals : {1, 2, 3})
                for (int64_t shared : {0, 1, 2, 3})  // of four layers: networks apart, deep decoders, linear heads
                    for (bool weighted : {false, true}) {
                        Shape shape{60, 2, width, 4, 3, signals, shared};
                        shape.with_points = shape.with_weights = weighted;
                        shape.offset = weighted;
                        run(shape);
                    }
        }
        for (int64_t inputs : {1, 2, 3, 4, 5, 40}) run({50, inputs, 20, 3, 2, 1, 3});
        for (int64_t channels : {1, 4, 5, 7, 70}) run({50, 2, 20, 3, channels, 2, 2});
        for (int64_t layers : {1, 2, 3, 6, 9}) run({50, 2, 20, layers, 2, 1, layers});
        for (int64_t shared : {0, 2, 3, 5})
            for (int64_t frozen : {1, 2, 4, 5}) run({50, 2, 20, 5, 2, 2, std::min<int64_t>(shared, 4), 2, 0, 0, frozen});
        for (int64_t tile : {1, 7, 50, 10000}) run({333, 2, 20, 3, 1, 1, 3, 1, tile});
        for (int64_t threads : {2, 3, 5, 16}) {
            run({20000, 2, 33, 3, 1, 1, 3, threads});
            run({4000, 2, 33, 3, 1, 7, 0, threads});
        }
        for (float poison : {NAN, INFINITY, -INFINITY}) check_bad_numbers(level, poison);
        for (int64_t width : {1, 3, 17, 33, 100})
            for (double guard : {0.0, 1.1})
                for (float rate : {1e-3f, 0.5f, 1e30f}) check_fits(level, width, guard, rate);
        std::printf("%s: %lld shapes and 30 fits agree\n", level, static_cast<long long>(cases));
    }
    return 0;
}
