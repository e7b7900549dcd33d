/* Vectors of floats in a compiler's own notation, as wide as the processor's, and tiles of sums that stay in registers. */

#ifndef FEDLLM_LANES_H
#define FEDLLM_LANES_H

#include "bf16.h"

#if defined(__AVX512F__)
#define LANES 16
#define VECTORS 4
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#define VECTORS 2
#elif defined(__ARM_NEON)
#define LANES 4
#define VECTORS 4
#endif

#ifdef LANES

enum { ROWS = 6, COLUMNS = LANES * VECTORS }; /* of a tile: ROWS * VECTORS vectors of sums */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define TILE static inline __attribute__((always_inline)) void
#define UNROLL _Pragma("GCC unroll 32")

static inline vec all(float x) { return x - (vec){0}; }
static inline vec load(const float *x) { return *(const vec *)x; }
static inline void store(float *x, vec v) { *(vec *)x = v; }

static inline vec load_some(const float *x, int64_t n) {
    if (n >= LANES) return load(x);
    vec v = {0};
    if (n > 0) memcpy(&v, x, n * sizeof *x);
    return v;
}

static inline void store_some(float *x, vec v, int64_t n) {
    if (n >= LANES)
        store(x, v);
    else if (n > 0)
        memcpy(x, &v, n * sizeof *x);
}

static inline float total(vec v) { /* in one order */
    float part[LANES];
    store(part, v);
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) part[i] += part[i + width];
    return part[0];
}

/* sum (rows, vectors) += A B: row i of A at a[i] + j next_a, row j of B at b + j next_b, for `steps` j. */
TILE multiplied(vec *sum, const float *const *a, int64_t next_a, const float *b, int64_t next_b, int64_t steps,
                int rows, int vectors) {
    for (int64_t j = 0; j < steps; j++, b += next_b) {
        vec factor[VECTORS];
        UNROLL for (int v = 0; v < vectors; v++) factor[v] = load(b + v * LANES);
        UNROLL for (int i = 0; i < rows; i++) {
            vec one = all(a[i][j * next_a]);
            UNROLL for (int v = 0; v < vectors; v++) sum[i * VECTORS + v] += one * factor[v];
        }
    }
}

/* Calls f(..., rows) with a number of rows that the compiler knows, from 1 to 6. */
#define WITH_ROWS(rows, f, ...)                 \
    switch (rows) {                             \
    case 1: f(__VA_ARGS__, 1); break;           \
    case 2: f(__VA_ARGS__, 2); break;           \
    case 3: f(__VA_ARGS__, 3); break;           \
    case 4: f(__VA_ARGS__, 4); break;           \
    case 5: f(__VA_ARGS__, 5); break;           \
    default: f(__VA_ARGS__, 6);                 \
    }

#endif
#endif
