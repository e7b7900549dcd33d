/* y = silu(g) u, silu(g) = g s rounded, s = 1 / (1 + e^-g)        dg = dy u s (1 + g (1 - s)), du = dy silu(g). */

#include "tiles.h"

#ifdef TILES

enum { WIDTH = 16 };

/* To 16 bits, and back. */
static inline __m512 as_16(__m512 x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)), 16));
}

static inline void put(bf16 *y, __mmask16 mask, __m512 x) {
    _mm256_mask_storeu_epi16(y, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

/* Divided by a first guess of 14 bits and one step of Newton's. */
static inline __m512 sigmoid(__m512 x) {
    __m512 d = _mm512_add_ps(exponentials(_mm512_sub_ps(all(0), x)), all(1)), guess = _mm512_rcp14_ps(d);
    return _mm512_mul_ps(guess, _mm512_fnmadd_ps(d, guess, all(2)));
}

int fedllm_gated(const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 x = widened(g + i, mask);
        put(y + i, mask, _mm512_mul_ps(as_16(_mm512_mul_ps(x, sigmoid(x))), widened(u + i, mask)));
    }
    return 0;
}

int fedllm_gated_backward(const bf16 *restrict dy, const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict dg,
                       bf16 *restrict du, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 x = widened(g + i, mask), s = sigmoid(x), gradient = widened(dy + i, mask);
        put(du + i, mask, _mm512_mul_ps(gradient, as_16(_mm512_mul_ps(x, s))));
        __m512 of_silu = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(all(1), s), all(1)));
        put(dg + i, mask, _mm512_mul_ps(_mm512_mul_ps(gradient, widened(u + i, mask)), of_silu));
    }
    return 0;
}

#else

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

int fedllm_gated(const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = narrow(rounded(wide(g[i]) * sigmoid(wide(g[i]))) * wide(u[i]));
    return 0;
}

int fedllm_gated_backward(const bf16 *restrict dy, const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict dg,
                       bf16 *restrict du, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = wide(g[i]), s = sigmoid(x), gradient = wide(dy[i]);
        du[i] = narrow(gradient * rounded(x * s));
        dg[i] = narrow(gradient * wide(u[i]) * (s * (1 + x * (1 - s))));
    }
    return 0;
}

#endif
