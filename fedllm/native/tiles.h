/* Vectors of 32 numbers of 16 bits, where the processor multiplies such and adds up in float (x86 with AVX512-BF16):
   _mm512_dpbf16_ps(sum, x, y) adds x[2i] y[2i] + x[2i + 1] y[2i + 1] to sum[i]. */

#ifndef FEDLLM_TILES_H
#define FEDLLM_TILES_H

#include "bf16.h"

#ifdef __AVX512BF16__
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
