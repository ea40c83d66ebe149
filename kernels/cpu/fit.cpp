// Whole fits of small networks inside a core's caches: k optimiser steps of one network at a time, one per thread.
// The contract is docs/native.md, "fit_small".
#include <algorithm>
#include <chrono>
#include <cmath>

#include "interface.h"
#include "memory.h"

namespace {

// A layer's parameters in the layout of `backward`, with their optimiser state; the bias in panels.
struct State {
    float *weight[4], *bias[4];  // value, exp_avg, exp_avg_sq, last value with a finite loss
    int64_t weight_size, bias_size;
};
enum { VALUE, EXP_AVG, EXP_AVG_SQ, LAST };

class Worker {
   public:
    Worker(const SfFit &fit, const SfKernels &kernels)
        : f_(fit), kernels_(kernels), depth_(fit.num_layers), panel_(kernels.panel) {
        for (int64_t i = 0; i < depth_; ++i) {
            layers_.push_back(allocate_layer(arena_, kernels, f_.widths[i], f_.widths[i + 1]));
            const bool trained = i >= f_.frozen;
            gradients_.push_back(allocate_gradient(arena_, kernels, layers_[i], trained, trained));
            State state = {};
            state.weight_size = layers_[i].in_panels * layers_[i].out * panel_;
            state.bias_size = layers_[i].out_panels * panel_;
            for (int k = 0; k < 4; ++k) {
                state.weight[k] = arena_.floats(state.weight_size);
                state.bias[k] = arena_.floats(state.bias_size);
            }
            states_.push_back(state);
        }
        task_.layers = layers_.data();
        task_.num_trunk = depth_ - 1;
        task_.num_branches = task_.branch_layers = 1;
        task_.points = f_.points;
        task_.dims = f_.widths[0];
        task_.value_strides[1] = f_.channels;
        task_.value_strides[2] = 1;
        task_.channels = f_.channels;
        task_.scale = &residual_scale_;
        residual_scale_ = static_cast<float>(2.0 / (static_cast<double>(f_.num_points) * f_.channels));
        tile_ = tile_rows(kernels, f_.num_points, 0);
        task_.lowest = f_.frozen;
        scratch_ = allocate_scratch(arena_, kernels, task_, tile_);
        scratch_.gradients = gradients_.data();
        scratch_.losses = &squares_;
    }

    // From where network `row` is to its next stop.
    void run(int64_t row) {
        load(f_.parameters, row, VALUE);
        load(f_.exp_avg, row, EXP_AVG);
        load(f_.exp_avg_sq, row, EXP_AVG_SQ);
        keep_last();
        task_.values = f_.values + row * f_.num_points * f_.channels;
        float *curve = f_.mse + row * (f_.budget + 1);
        int64_t reason = SF_RUNNING, step = f_.step[row];
        for (;; ++step) {
            const bool last = step >= f_.budget, check = step % f_.check_every == 0 || last;
            const bool leave = step >= f_.until && !last;
            const double mse = measure(!last && !leave);
            const bool finite = std::isfinite(mse);
            curve[step] = static_cast<float>(mse);
            f_.measured[row] = step + 1;
            if (f_.guard <= 0 && !finite) {
                reason = SF_NON_FINITE;
                f_.measured[row] = step;
                break;
            }
            if (leave) break;  // what else follows from this error is the next call's business
            if (f_.guard > 0) {
                if (check && (!finite || mse > f_.guard * f_.best_mse[row])) {
                    if (f_.rollbacks[row] || last) {
                        reason = SF_DIVERGED;
                        break;
                    }
                    roll_back(row);
                    continue;
                }
                if (check && mse <= f_.best_mse[row]) {
                    f_.best_mse[row] = mse;
                    store(f_.best, row, VALUE);
                }
            }
            if (check && mse <= f_.target_mse[row]) {
                reason = SF_TARGET;
                break;
            }
            if (last) {
                reason = SF_BUDGET;
                break;
            }
            if (f_.guard <= 0) keep_last();
            update(row, f_.learning_rates[step]);
        }
        if (reason == SF_DIVERGED)
            load(f_.best, row, VALUE);
        else if (reason == SF_NON_FINITE)
            return_to_last();
        store(f_.parameters, row, VALUE);
        store(f_.exp_avg, row, EXP_AVG);
        store(f_.exp_avg_sq, row, EXP_AVG_SQ);
        f_.step[row] = step;
        f_.reason[row] = reason;
    }

   private:
    // Loss of the present weights; with `backward` also its gradients.
    double measure(bool backward) {
        for (int64_t i = 0; i < depth_; ++i) {
            SfLayer &layer = layers_[i];
            const State &state = states_[i];
            const float omega = f_.omegas[i];
            const float largest = kernels_.fold(&layer, state.weight[VALUE], omega);
            layer.weight_reach = largest * static_cast<float>(layer.in);
            layer.bias_reach = 0;
            for (int64_t n = 0; n < state.bias_size; ++n) {
                layer.bias[n] = omega * state.bias[VALUE][n];
                layer.bias_reach = std::max(layer.bias_reach, std::fabs(layer.bias[n]));
            }
            if (gradients_[i].weight) {
                std::memset(gradients_[i].weight, 0, sizeof(float) * state.weight_size);
                std::memset(gradients_[i].bias, 0, sizeof(float) * state.bias_size);
            }
        }
        squares_ = 0;
        task_.lowest = backward ? f_.frozen : depth_;
        kernels_.sweep(&task_, &scratch_, 0, f_.num_points, tile_);
        // As the other engines: the mean in double precision, then rounded to float.
        return static_cast<float>(squares_ / (static_cast<double>(f_.num_points) * f_.channels));
    }

    void update(int64_t row, float learning_rate) {
        const double t = static_cast<double>(++f_.adam_step[row]);
        SfAdam adam = {};
        adam.step_size = static_cast<float>(learning_rate * f_.scale[row] / (1 - std::pow(f_.beta1, t)));
        adam.beta1 = static_cast<float>(f_.beta1);
        adam.beta2 = static_cast<float>(f_.beta2);
        // In double precision: 1 - float(0.999) is off by 1e-5.
        adam.rest1 = static_cast<float>(1 - f_.beta1);
        adam.rest2 = static_cast<float>(1 - f_.beta2);
        adam.eps = static_cast<float>(f_.eps);
        adam.correction = static_cast<float>(std::sqrt(1 - std::pow(f_.beta2, t)));
        for (int64_t i = f_.frozen; i < depth_; ++i) {
            const State &s = states_[i];
            adam.omega = f_.omegas[i];
            kernels_.adam(s.weight[VALUE], s.weight[EXP_AVG], s.weight[EXP_AVG_SQ], gradients_[i].weight,
                          s.weight_size, &adam);
            kernels_.adam(s.bias[VALUE], s.bias[EXP_AVG], s.bias[EXP_AVG_SQ], gradients_[i].bias, s.bias_size, &adam);
        }
    }

    // Back to the best weights with a fresh optimiser and half the learning rate, once.
    void roll_back(int64_t row) {
        load(f_.best, row, VALUE);
        clear(EXP_AVG);
        clear(EXP_AVG_SQ);
        f_.adam_step[row] = 0;
        f_.scale[row] *= 0.5f;
        ++f_.rollbacks[row];
    }

    void clear(int which) {
        for (const State &s : states_) {
            std::memset(s.weight[which], 0, sizeof(float) * s.weight_size);
            std::memset(s.bias[which], 0, sizeof(float) * s.bias_size);
        }
    }

    void keep_last() { copy(LAST, VALUE); }
    void return_to_last() { copy(VALUE, LAST); }

    void copy(int to, int from) {
        for (int64_t i = f_.frozen; i < depth_; ++i) {
            const State &s = states_[i];
            std::memcpy(s.weight[to], s.weight[from], sizeof(float) * s.weight_size);
            std::memcpy(s.bias[to], s.bias[from], sizeof(float) * s.bias_size);
        }
    }

    template <class Move>
    void each(float *const *tensors, int64_t row, int which, Move move) {
        for (int64_t i = 0; i < depth_; ++i) {
            const SfLayer &layer = layers_[i];
            float *weight = tensors[2 * i] + row * layer.out * layer.in, *bias = tensors[2 * i + 1] + row * layer.out;
            for (int64_t n = 0; n < layer.out; ++n) {
                for (int64_t k = 0; k < layer.in; ++k)
                    move(states_[i].weight[which][(k / panel_ * layer.out + n) * panel_ + k % panel_],
                         weight[n * layer.in + k]);
                move(states_[i].bias[which][n], bias[n]);
            }
        }
    }

    void load(float *const *from, int64_t row, int which) {
        // What fills the panels too: a network before this one may have left NaN there.
        clear(which);
        each(from, row, which, [](float &mine, float &theirs) { mine = theirs; });
    }

    void store(float *const *to, int64_t row, int which) {
        each(to, row, which, [](float &mine, float &theirs) { theirs = mine; });
    }

    const SfFit &f_;
    const SfKernels &kernels_;
    const int64_t depth_, panel_;
    Arena arena_;
    std::vector<SfLayer> layers_;
    std::vector<SfGradient> gradients_;
    std::vector<State> states_;
    SfTask task_ = {};
    SfScratch scratch_ = {};
    int64_t tile_ = 0;
    float residual_scale_ = 0;
    double squares_ = 0;
};

}  // namespace

extern "C" {

int sf_fit(const SfFit *fit) {
    const SfKernels *kernels = find_kernels(fit->kernels);
    if (!kernels) return 1;
    const auto begin = std::chrono::steady_clock::now();
    std::atomic<int64_t> next{0};
    try {
        const int64_t threads = std::max<int64_t>(1, std::min(fit->threads, fit->num_rows));
        in_parallel(threads, [&](int64_t) {
            Worker worker(*fit, *kernels);
            for (int64_t i = next++; i < fit->num_rows; i = next++) {
                worker.run(fit->rows[i]);
                const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
                fit->seconds[fit->rows[i]] = passed.count();
            }
        });
    } catch (...) {
        return 2;
    }
    return 0;
}
}
