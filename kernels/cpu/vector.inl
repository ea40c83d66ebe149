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
// With a fused multiply-add n * fl(pi) is subtracted exactly, and the count n of half turns is right below 2^22.
constexpr float SINE_LIMIT = 1e6f;
#else
constexpr float SINE_LIMIT = 1e4f;
#endif

// sin and cos of |x| <= SINE_LIMIT: x = n pi + r, minimax polynomials of r in [-pi/2, pi/2] (degrees 9 and 10, by
// Remez exchange), both times (-1)^n. Absolute error below 1.5e-7. NaN and infinity give NaN.
SF_INLINE void sincos_bounded(vec x, vec &sine, vec &cosine) {
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, whose last bit is n's parity
    const vec shifted = x * 0.31830987334251404f + shift;
    const vec n = shifted - shift;
#if SF_HAS_FMA
    vec r = x - n * 3.1415927410125732f;
    r = r + n * 8.742277657347586e-08f;
#else
    // The first two constants are short, so that their products with n are exact.
    vec r = x - n * 3.140625f;
    r = r - n * 0.0009675025939941406f;
    r = r - n * 1.5099580252808664e-07f;
#endif
    ivec sign;
    __builtin_memcpy(&sign, &shifted, sizeof sign);
    sign = sign << 31;
    const vec s = r * r;
    vec p = s * 2.600054585855105e-06f - 0.00019806614727713168f;
    p = p * s + 0.008333017118275166f;
    p = p * s - 0.16666656732559204f;
    p = p * s * r + r;
    vec q = s * -2.6077103143506974e-07f + 2.4761886379565112e-05f;
    q = q * s - 0.00138884037733078f;
    q = q * s + 0.04166664183139801f;
    q = q * s - 0.5f;
    q = q * s + 1.0f;
    ivec bits;
    __builtin_memcpy(&bits, &p, sizeof bits);
    bits ^= sign;
    __builtin_memcpy(&sine, &bits, sizeof bits);
    __builtin_memcpy(&bits, &q, sizeof bits);
    bits ^= sign;
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
