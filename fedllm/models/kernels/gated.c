/* y = silu(g) u, silu(g) = g s rounded, s = 1 / (1 + e^-g)        dg = dy u s (1 + g (1 - s)), du = dy silu(g). */

#include <stddef.h>

#include "team.h"
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

static void product_of(const num *restrict g, const num *restrict u, num *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 x = widened(g + i, mask);
        put(y + i, mask, _mm512_mul_ps(as_16(_mm512_mul_ps(x, sigmoid(x))), widened(u + i, mask)));
    }
}

static void gradients_of(const num *restrict dy, const num *restrict g, const num *restrict u, num *restrict dg,
                         num *restrict du, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 x = widened(g + i, mask), s = sigmoid(x), gradient = widened(dy + i, mask);
        put(du + i, mask, _mm512_mul_ps(gradient, as_16(_mm512_mul_ps(x, s))));
        __m512 of_silu = _mm512_mul_ps(s, _mm512_fmadd_ps(x, _mm512_sub_ps(all(1), s), all(1)));
        put(dg + i, mask, _mm512_mul_ps(_mm512_mul_ps(gradient, widened(u + i, mask)), of_silu));
    }
}

#else

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

static void product_of(const num *restrict g, const num *restrict u, num *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = narrow_num(rounded_num(wide_num(g[i]) * sigmoid(wide_num(g[i]))) * wide_num(u[i]));
}

static void gradients_of(const num *restrict dy, const num *restrict g, const num *restrict u, num *restrict dg,
                         num *restrict du, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = wide_num(g[i]), s = sigmoid(x), gradient = wide_num(dy[i]);
        du[i] = narrow_num(gradient * rounded_num(x * s));
        dg[i] = narrow_num(gradient * wide_num(u[i]) * (s * (1 + x * (1 - s))));
    }
}

#endif

enum { LEAST = 4096 }; /* numbers of a part, which begins at a multiple of 64 */

typedef struct {
    const num *dy, *g, *u;
    num *y, *dg, *du;
    int64_t n, parts;
} gate;

static int64_t edge(const gate *d, int64_t part) {
    return part == d->parts ? d->n : begin(d->n, part, d->parts) / 64 * 64;
}

static void forward(void *given, int64_t part) {
    const gate *d = given;
    int64_t at = edge(d, part);
    product_of(d->g + at, d->u + at, d->y + at, edge(d, part + 1) - at);
}

static void backward(void *given, int64_t part) {
    const gate *d = given;
    int64_t at = edge(d, part);
    gradients_of(d->dy + at, d->g + at, d->u + at, d->dg + at, d->du + at, edge(d, part + 1) - at);
}

int KERNEL(fedllm_gated)(const num *g, const num *u, num *y, int64_t n) {
    gate d = {.g = g, .u = u, .y = y, .n = n, .parts = parts_of(n, LEAST)};
    in_parallel(forward, &d, d.parts);
    return 0;
}

int KERNEL(fedllm_gated_backward)(const num *dy, const num *g, const num *u, num *dg, num *du, int64_t n) {
    gate d = {dy, g, u, NULL, dg, du, n, parts_of(n, LEAST)};
    in_parallel(backward, &d, d.parts);
    return 0;
}
