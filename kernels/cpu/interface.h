// What crosses extern "C": plain structs of pointers and sizes, seen by kernels/cpu/__init__.py through ctypes.
// Pointers are to float32 unless they say otherwise; sizes are int64; no exception leaves a function.
#pragma once
#include <stdint.h>

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
    float *predictions;            // [N, P, C]: only these are wanted, and values, scale and losses may be null; or null
    int64_t tile;                  // points at once; 0 chooses
    int64_t threads;
    const char *kernels;           // "avx512", "avx2" or "portable"
};

// Why a network stopped; 0: it has not.
enum SfReason { SF_RUNNING = 0, SF_TARGET = 1, SF_BUDGET = 2, SF_NON_FINITE = 3, SF_DIVERGED = 4 };

// N independent networks of one shape. Parameters and states are arrays of pointers [2 * num_layers]: weight and bias of
// each layer, stacked [N, out, in] and [N, out], contiguous, updated in place.
struct SfFit {
    int64_t num_points, channels, num_layers;
    const int64_t *widths;        // [num_layers + 1]
    const float *omegas;          // [num_layers]; the head's is 1
    const float *points;          // [P, in]
    const float *values;          // [N, P, C]
    float *const *parameters;
    float *const *exp_avg;
    float *const *exp_avg_sq;
    int64_t frozen;               // the first layers that keep their weights

    int64_t num_rows;             // the queue: which networks run in this call, each once
    const int64_t *rows;
    int64_t until;                // step whose loss this call measures last, in a network that has not stopped
    int64_t budget;               // step at which a network stops; at least `until`
    const float *learning_rates;  // [budget]
    double beta1, beta2, eps;
    const double *target_mse;     // [N]; a network stops at a check with an error at most this; negative: none
    int64_t check_every;
    double guard;                 // an error above this times the best one at a check is a spike; 0: no guard

    int64_t *step;                // [N] in and out: steps done
    int64_t *adam_step;           // [N] in and out: steps since the optimiser's state was zero
    float *scale;                 // [N] in and out: of the learning rate
    double *best_mse;             // [N] in and out: at the best check so far
    float *const *best;           // parameters there; arrays of null without a guard
    int64_t *rollbacks;           // [N] in and out

    float *mse;                   // [N, budget + 1] out: before step t; written from `step` on
    int64_t *measured;            // [N] out: entries of `mse` that belong to the fit
    int64_t *reason;              // [N] out
    double *seconds;              // [N] out: since the call began
    int64_t threads;
    const char *kernels;
};

// Both: 0: done; 1: these kernels are not here; 2: no memory. At least one signal and one channel.
int sf_sweep(const SfSweep *sweep);
int sf_fit(const SfFit *fit);

// Version of all this, 0 for a caller whose structs have other sizes; Python refuses a library of another version.
int sf_interface(int64_t sweep, int64_t fit);

// From now on run on the threads of this libgomp's GOMP_parallel; null: on threads started for each call.
void sf_use_pool(void *parallel);

// Whether this CPU and this build have the kernels of that name.
int sf_has_kernels(const char *name);

// sin and cos of `count` floats, for tests of the engine's own approximation. 0, or 1 as above.
int sf_sincos(const char *name, const float *x, float *sine, float *cosine, int64_t count);
}
