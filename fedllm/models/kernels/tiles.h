/* Vectors of 32 numbers of 16 bits, where the processor multiplies such and adds up in float (x86 with AVX512-BF16):
   _mm512_dpbf16_ps(sum, x, y) adds x[2i] y[2i] + x[2i + 1] y[2i + 1] to sum[i]. */

#ifndef FEDLLM_TILES_H
#define FEDLLM_TILES_H

#include "bf16.h"

#if defined(__AVX512BF16__) && !defined(FLOAT32)
#define TILES

#include <immintrin.h>

/* Whatever has these is computed in registers: the numbers of its rows are known to the compiler. */
#define TILE static inline __attribute__((always_inline)) void
#define UNROLL _Pragma("GCC unroll 32")

static inline __mmask32 mask_of(int64_t n) { return n >= 32 ? ~0u : (1u << n) - 1; }
static inline __m512bh words(const bf16 *x, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, x); }

/* 16 numbers, as float. */
static inline __m512 widened(const bf16 *x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

static inline __m512 all(float x) { return _mm512_set1_ps(x); }

/* Of the smallest masks of 16 numbers, that of n. */
static inline __mmask16 half_of(int64_t n) { return n > 0 ? (__mmask16)mask_of(min(n, 16)) : 0; }

/* e^x, its relative error below 1e-6 and for large x 1e-7 x; at most 2^126. A NaN stays one: of two numbers the second is
   given if one is. e^x = 2^n 2^r, t = x / ln 2 = n + r, n = round(t): Taylor's polynomial of degree 6. */
static inline __m512 exponentials(__m512 x) {
    __m512 t = _mm512_max_ps(all(-200), _mm512_min_ps(all(126), _mm512_mul_ps(x, all(1.44269504f))));
    __m512 n = _mm512_roundscale_ps(t, 0), r = _mm512_sub_ps(t, n), p = all(1.540353e-4f);
    p = _mm512_fmadd_ps(p, r, all(1.3333558e-3f));
    p = _mm512_fmadd_ps(p, r, all(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, r, all(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, r, all(0.24022651f));
    p = _mm512_fmadd_ps(p, r, all(0.69314718f));
    p = _mm512_fmadd_ps(p, r, all(1));
    return _mm512_scalef_ps(p, n);
}

/* For a permutation of two vectors: the first 16 numbers of both, in turns. */
static inline __m512i side_by_side(void) {
    return _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8,
                            39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
}

/* 2 or 4 numbers, in all places. */
static inline __m512bh pair(const bf16 *x) {
    int32_t both;
    memcpy(&both, x, sizeof both);
    return (__m512bh)_mm512_set1_epi32(both);
}

static inline __m512bh four(const bf16 *x) {
    int64_t all;
    memcpy(&all, x, sizeof all);
    return (__m512bh)_mm512_set1_epi64(all);
}

#endif
#endif
