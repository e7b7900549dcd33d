/* y = silu(g) u, silu(g) = g s rounded, s = 1 / (1 + e^-g)        dg = dy u s (1 + g (1 - s)), du = dy silu(g). */

#include "bf16.h"

static inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

int fedllm_gated(const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] = narrow(rounded(wide(g[i]) * sigmoid(wide(g[i]))) * wide(u[i]));
    return 0;
}

int fedllm_gated_slope(const bf16 *restrict dy, const bf16 *restrict g, const bf16 *restrict u, bf16 *restrict dg,
                       bf16 *restrict du, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        float x = wide(g[i]), s = sigmoid(x), slope = wide(dy[i]);
        du[i] = narrow(slope * rounded(x * s));
        dg[i] = narrow(slope * wide(u[i]) * (s * (1 + x * (1 - s))));
    }
    return 0;
}
