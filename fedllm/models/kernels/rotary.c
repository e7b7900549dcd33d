/* Rotary embeddings: each position's numbers turned in pairs (x_i, x_{i + n/2}), by angles with cosine c and sine s.

       y1 = x1 c1 - x2 s1    y2 = x2 c2 + x1 s2        dx1 = dy1 c1 + dy2 s2    dx2 = dy2 c2 - dy1 s1

   Forward, products are rounded, as PyTorch's are. */

#include "bf16.h"

/* x (positions, heads, n) with strides of a position and a head, c, s (positions, n), y (positions, heads, n) in one
   piece. */
static inline __attribute__((always_inline)) int turned(const bf16 *x, int64_t next, int64_t head, const bf16 *c,
                                                        const bf16 *s, bf16 *y, int64_t positions, int64_t heads,
                                                        int64_t n, int back) {
    int64_t half = n / 2;
    for (int64_t t = 0; t < positions; t++, c += n, s += n)
        for (int64_t h = 0; h < heads; h++, y += n) {
            const bf16 *one = x + t * next + h * head, *two = one + half;
            bf16 *first = y, *second = y + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = wide(one[i]), b = wide(two[i]), s1 = wide(s[i]), s2 = wide(s[half + i]);
                float along = a * wide(c[i]), along_two = b * wide(c[half + i]);
                first[i] = narrow(back ? along + b * s2 : rounded(along) - rounded(b * s1));
                second[i] = narrow(back ? along_two - a * s1 : rounded(along_two) + rounded(a * s2));
            }
        }
    return 0;
}

int fedllm_rotary(const bf16 *x, int64_t next, int64_t head, const bf16 *c, const bf16 *s, bf16 *y, int64_t positions,
                  int64_t heads, int64_t n) {
    return turned(x, next, head, c, s, y, positions, heads, n, 0);
}

int fedllm_rotary_backward(const bf16 *dy, int64_t next, int64_t head, const bf16 *c, const bf16 *s, bf16 *dx,
                        int64_t positions, int64_t heads, int64_t n) {
    return turned(dy, next, head, c, s, dx, positions, heads, n, 1);
}
