/* Rotary embeddings: each position's numbers turned in pairs (x_i, x_{i + n/2}), by angles whose cosine and sine are c, s.

       y1 = x1 c1 - x2 s1    y2 = x2 c2 + x1 s2        dx1 = dy1 c1 + dy2 s2    dx2 = dy2 c2 - dy1 s1 */

#include "bf16.h"

/* x (positions, heads, n) with strides of a position and a head, c, s (positions, n), y (positions, heads, n) in one piece.
   Products are rounded, as PyTorch's are. */
int fedllm_rotary(const bf16 *x, int64_t next, int64_t head, const bf16 *c, const bf16 *s, bf16 *y, int64_t positions,
                  int64_t heads, int64_t n) {
    int64_t half = n / 2;
    for (int64_t t = 0; t < positions; t++, c += n, s += n)
        for (int64_t h = 0; h < heads; h++, y += n) {
            const bf16 *restrict one = x + t * next + h * head, *restrict two = one + half;
            bf16 *restrict to = y, *restrict to_two = y + half;
            for (int64_t i = 0; i < half; i++) {
                float a = wide(one[i]), b = wide(two[i]);
                to[i] = narrow(rounded(a * wide(c[i])) - rounded(b * wide(s[i])));
                to_two[i] = narrow(rounded(b * wide(c[half + i])) + rounded(a * wide(s[half + i])));
            }
        }
    return 0;
}

int fedllm_rotary_slope(const bf16 *dy, int64_t next, int64_t head, const bf16 *c, const bf16 *s, bf16 *dx,
                        int64_t positions, int64_t heads, int64_t n) {
    int64_t half = n / 2;
    for (int64_t t = 0; t < positions; t++, c += n, s += n)
        for (int64_t h = 0; h < heads; h++, dx += n) {
            const bf16 *restrict one = dy + t * next + h * head, *restrict two = one + half;
            bf16 *restrict to = dx, *restrict to_two = dx + half;
            for (int64_t i = 0; i < half; i++) {
                float a = wide(one[i]), b = wide(two[i]);
                to[i] = narrow(a * wide(c[i]) + b * wide(s[half + i]));
                to_two[i] = narrow(b * wide(c[half + i]) - a * wide(s[i]));
            }
        }
    return 0;
}
