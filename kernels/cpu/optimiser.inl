// Between two sweeps of a whole fit: Adam, and the packed weights anew. Included by tile.inl.

SF_INLINE vec square_root(vec x) {
    vec out;
    for (int lane = 0; lane < LANES; ++lane) out[lane] = __builtin_sqrtf(x[lane]);
    return out;
}

// Adam (Kingma and Ba 2015, algorithm 1) on `count` parameters, a multiple of LANES.
void adam(float *parameter, float *exp_avg, float *exp_avg_sq, const float *gradient, int64_t count,
          const SfAdam *settings) {
    const SfAdam a = *settings;
    for (int64_t i = 0; i < count; i += LANES) {
        const vec g = load(gradient + i) * a.omega;
        const vec m = load(exp_avg + i) * a.beta1 + g * a.rest1;
        const vec v = load(exp_avg_sq + i) * a.beta2 + g * g * a.rest2;
        store(exp_avg + i, m);
        store(exp_avg_sq + i, v);
        const vec step = a.step_size * m / (square_root(v) / a.correction + a.eps);
        // With eps = 0, 0 / 0 must not spoil what only fills a panel.
        store(parameter + i, load(parameter + i) - (m == 0.0f ? vec{} : step));
    }
}

float fold(SfLayer *layer, const float *weight, float omega) {
    const int64_t in = layer->in, out = layer->out;
    vec largest = {};
    for (int64_t i = 0; i < layer->in_panels * out * PANEL; i += LANES) {
        const vec w = load(weight + i) * omega;
        store(layer->backward + i, w);
        const vec magnitude = w < 0.0f ? -w : w;
        largest = magnitude > largest ? magnitude : largest;
    }
    for (int64_t panel = 0; panel < layer->out_panels; ++panel)
        for (int64_t k = 0; k < in; ++k) {
            const int64_t outputs = least(PANEL, out - panel * PANEL);
            const float *from = layer->backward + (k / PANEL * out + panel * PANEL) * PANEL + k % PANEL;
            float *to = layer->forward + (panel * in + k) * PANEL;
            for (int64_t n = 0; n < outputs; ++n) to[n] = from[n * PANEL];
        }
    float most = 0;
    for (int lane = 0; lane < LANES; ++lane) most = largest[lane] > most ? largest[lane] : most;
    return most;
}
