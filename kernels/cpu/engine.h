// What the parts of the native CPU engine share: plain data, no classes, no library headers.
//
// Layouts. Features come in panels of `panel` = two vectors: element (point p, feature f) of a tile lies at
// [f / panel][p][f % panel]. A layer's weights are packed twice, omega folded in: `forward` [out panels][in][panel] and
// `backward` [in panels][out][panel]; gradients have the layout of `backward`. Columns that only fill a panel are zero.
#pragma once
#include <stdint.h>

struct SfLayer {
    int64_t in, out;
    int64_t in_panels, out_panels;
    float *forward, *backward;
    float *bias;                      // [out panels][panel]
    float weight_reach, bias_reach;   // |z| <= weight_reach * max |input| + bias_reach
};

struct SfGradient {
    float *weight;  // [in panels][out][panel]; null: not wanted
    float *bias;    // [out panels][panel]
};

// One network with the points and the targets it is compared with. Sine layers of the trunk are shared by all branches;
// a branch is sine layers of its own and a linear head.
struct SfTask {
    const SfLayer *layers;  // trunk, then branch after branch
    int64_t num_trunk, num_branches, branch_layers;
    int64_t lowest;         // first layer (trunk, then one branch) that needs a gradient; their number where none does
    const float *points;    // [P, dims]
    int64_t dims;
    const float *values;    // (signal, point, channel) by these strides
    int64_t value_strides[3];
    const float *point_weights;  // (signal, point) by these strides; null: all 1
    int64_t point_weight_strides[2];
    const float *scale;     // [N]; a signal's residuals times this are the gradient of the loss
    int64_t channels;
    float *dpoints;         // [P, dims], added to; null: not wanted
    float *predictions;     // (signal, point, channel) contiguous, instead of residuals; null: not wanted
    int64_t num_points;     // of a signal in `predictions`
};

// Memory of one thread for one task.
struct SfScratch {
    float *input;           // [panels of dims][tile][panel], zero where dims fill no panel
    float **sine, **slope;  // per layer of trunk and of one branch: [panels][tile][panel]; slope holds cos, then dz
    float *output;          // predictions of one branch's head, then their gradient
    float *joined;          // gradient of the trunk's features, summed over branches
    float *dinput;          // gradient of a tile's points
    SfGradient *gradients;  // per layer of the task, added to
    double *losses;         // [N] sums of squares, added to
};

struct SfAdam {
    float step_size;            // learning rate / (1 - beta1^t)
    float beta1, beta2, eps;
    float rest1, rest2;         // 1 - beta1, 1 - beta2
    float correction;           // sqrt(1 - beta2^t)
    float omega;                // chain rule: gradients are those of omega * parameter
};

struct SfKernels {
    const char *name;
    int64_t panel;      // features
    int64_t block;      // points that a product keeps in registers; tiles are multiples of it
    int64_t best_tile;  // points
    void (*sweep)(const SfTask *, const SfScratch *, int64_t first, int64_t last, int64_t tile);
    void (*sincos)(const float *x, float *sine, float *cosine, int64_t count);
    void (*adam)(float *parameter, float *exp_avg, float *exp_avg_sq, const float *gradient, int64_t count,
                 const SfAdam *);
    // A layer's packed weights from `weight`, which has the layout of `backward`; returns the largest of them.
    float (*fold)(SfLayer *, const float *weight, float omega);
};

extern "C" {
extern const SfKernels sf_kernels_portable;
#if defined(__x86_64__)
extern const SfKernels sf_kernels_avx2, sf_kernels_avx512;
#endif
}
