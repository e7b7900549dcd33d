/* Numbers of 16 bits (bfloat16) to float and back, and the exponential, written so that a compiler makes vector code.
   All functions of the library give 0, or what went wrong.

   `num` is the type of a model's numbers: float where FLOAT32 is defined, as in files that end in _float.c. */

#ifndef FEDLLM_BF16_H
#define FEDLLM_BF16_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

enum { OUT_OF_MEMORY = 1, OUT_OF_RANGE = 2 };

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

static inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline float wide(bf16 x) { return float_of((uint32_t)x << 16); }

/* To the nearest, ties to even; a NaN stays one. */
static inline bf16 narrow(float x) {
    uint32_t bits = bits_of(x), rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (bf16)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

static inline float rounded(float x) { return wide(narrow(x)); }

#ifdef FLOAT32
typedef float num;
#define KERNEL(name) name##_float
static inline float wide_num(num x) { return x; }
static inline num narrow_num(float x) { return x; }
static inline float rounded_num(float x) { return x; }
#else
typedef bf16 num;
#define KERNEL(name) name
static inline float wide_num(num x) { return wide(x); }
static inline num narrow_num(float x) { return narrow(x); }
static inline float rounded_num(float x) { return rounded(x); }
#endif

/* e^x within 2 units in the last place; 0 below -87, where floats lose precision; a NaN stays one.
   e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2: Taylor's polynomial of degree 7. */
static inline float exponential(float x) {
    float clipped = x > 88.0f ? 88.0f : (x < -87.0f ? -87.0f : x);
    float shifted = clipped * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: its last bits are the nearest integer */
    float n = shifted - 12582912.0f;
    float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    float power = float_of((bits_of(shifted) << 23) + 0x3f800000u); /* 2^n */
    return x < -87.0f ? 0.0f : p * power;
}

#endif
