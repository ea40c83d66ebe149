// Vectors of SF_LANES floats in the compiler's own vector language, and sine and cosine on them.
// Included inside an anonymous namespace, once per instruction set.

typedef float vec __attribute__((vector_size(4 * SF_LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * SF_LANES)));

constexpr int LANES = SF_LANES;

SF_INLINE vec load(const float *p) {
    vec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

SF_INLINE void store(float *p, vec v) { __builtin_memcpy(p, &v, sizeof v); }

SF_INLINE vec splat(float x) { return vec{} + x; }

#if SF_HAS_FMA
// With a fused multiply-add (-ffp-contract=fast) n * fl(pi/2) is subtracted exactly; the count n of quarter turns is right below 2^22.
constexpr float SINE_LIMIT = 1e6f;
#else
constexpr float SINE_LIMIT = 1e4f;
#endif

// sin and cos of |x| <= SINE_LIMIT: x = n pi/2 + r, minimax polynomials of r in [-pi/4, pi/4] (degrees 7 and 8, by
// Remez exchange), swapped and signed by n. Absolute error below 1e-7. NaN and infinity give NaN.
SF_INLINE void sincos_bounded(vec x, vec &sine, vec &cosine) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held by the last bits
    const vec shifted = x * 0.6366197466850281f + shift;
    const vec n = shifted - shift;
#if SF_HAS_FMA
    vec r = x - n * 1.5707963705062866f;
    r = r + n * 4.371138828673793e-08f;
#else
    // The first two constants are short, so that their products with n are exact.
    vec r = x - n * 1.5703125f;
    r = r - n * 0.0004837512969970703f;
    r = r - n * 7.549790126404332e-08f;
#endif
    const vec t = r * r;
    vec p = t * -0.000194956359337084f + 0.00833197869360447f;
    p = p * t - 0.16666650772094727f;
    p = p * t * r + r;
    vec q = t * 2.443845005473122e-05f - 0.001388736767694354f;
    q = q * t + 0.04166664555668831f;
    q = q * (t * t) + (1.0f - t * 0.5f);

    ivec count;
    __builtin_memcpy(&count, &shifted, sizeof count);
    const ivec odd = (count & 1) != 0;
    const vec s = odd ? q : p, c = odd ? p : q;
    ivec bits;
    __builtin_memcpy(&bits, &s, sizeof bits);
    bits ^= (count & 2) << 30;
    __builtin_memcpy(&sine, &bits, sizeof bits);
    __builtin_memcpy(&bits, &c, sizeof bits);
    bits ^= ((count + 1) & 2) << 30;
    __builtin_memcpy(&cosine, &bits, sizeof bits);
}

// The same for any argument: lanes beyond the limit one by one, in double precision.
SF_NOINLINE void sincos_any(vec x, vec &sine, vec &cosine) {
    sincos_bounded(x, sine, cosine);
    for (int lane = 0; lane < LANES; ++lane)
        if (__builtin_fabsf(x[lane]) > SINE_LIMIT) {
            sine[lane] = (float)__builtin_sin((double)x[lane]);
            cosine[lane] = (float)__builtin_cos((double)x[lane]);
        }
}
