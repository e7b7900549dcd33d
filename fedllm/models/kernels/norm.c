/* Root-mean-square norms of rows: y = w h, h = x r rounded, r = (mean(x^2) + eps)^(-1/2), and their gradient. */

#include <math.h>

#include "bf16.h"

/* x, y (rows, n), w (n), r (rows). */
int fedllm_norm(const bf16 *restrict x, const bf16 *restrict w, bf16 *restrict y, float *restrict r, int64_t rows,
                int64_t n, float eps) {
    for (int64_t row = 0; row < rows; row++, x += n, y += n) {
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) squares += wide(x[i]) * wide(x[i]);
        float scale = r[row] = 1 / sqrtf(squares / n + eps);
        for (int64_t i = 0; i < n; i++) y[i] = narrow(wide(w[i]) * rounded(wide(x[i]) * scale));
    }
    return 0;
}

/* dx = plus + r w dy - x r^3 mean(x w dy); plus may be null. */
int fedllm_norm_backward(const bf16 *restrict dy, const bf16 *restrict x, const bf16 *restrict w, const float *r,
                      const bf16 *restrict plus, bf16 *restrict dx, int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++, x += n, dy += n, dx += n) {
        float inner = 0, scale = r[row];
#pragma omp simd reduction(+ : inner)
        for (int64_t i = 0; i < n; i++) inner += wide(x[i]) * wide(w[i]) * wide(dy[i]);
        inner *= scale * scale * scale / n;
        if (!plus) {
            for (int64_t i = 0; i < n; i++) dx[i] = narrow(scale * wide(w[i]) * wide(dy[i]) - inner * wide(x[i]));
            continue;
        }
        for (int64_t i = 0; i < n; i++)
            dx[i] = narrow(wide(plus[i]) + scale * wide(w[i]) * wide(dy[i]) - inner * wide(x[i]));
        plus += n;
    }
    return 0;
}
