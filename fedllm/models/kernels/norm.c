/* Root-mean-square norms of rows: y = w h, h = x r rounded, r = (mean(x^2) + eps)^(-1/2), and their gradient. */

#include <math.h>

#include "bf16.h"
#include "team.h"

enum { LEAST = 16 }; /* rows of a part */

/* x, y, dy, plus, dx (rows, n), w (n), r (rows). */
typedef struct {
    const num *x, *w, *dy, *plus;
    num *y, *dx;
    float *r;
    int64_t rows, n, parts;
    float eps;
} norm;

static void forward(void *given, int64_t part) {
    const norm *d = given;
    int64_t n = d->n;
    for (int64_t row = begin(d->rows, part, d->parts); row < begin(d->rows, part + 1, d->parts); row++) {
        const num *restrict x = d->x + row * n, *restrict w = d->w;
        num *restrict y = d->y + row * n;
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) squares += wide_num(x[i]) * wide_num(x[i]);
        float scale = d->r[row] = 1 / sqrtf(squares / n + d->eps);
        for (int64_t i = 0; i < n; i++) y[i] = narrow_num(wide_num(w[i]) * rounded_num(wide_num(x[i]) * scale));
    }
}

int KERNEL(fedllm_norm)(const num *x, const num *w, num *y, float *r, int64_t rows, int64_t n, float eps) {
    norm d = {.x = x, .w = w, .y = y, .r = r, .rows = rows, .n = n, .parts = parts_of(rows, LEAST), .eps = eps};
    in_parallel(forward, &d, d.parts);
    return 0;
}

/* dx = plus + r w dy - x r^3 mean(x w dy); plus may be null. */
static void backward(void *given, int64_t part) {
    const norm *d = given;
    int64_t n = d->n;
    for (int64_t row = begin(d->rows, part, d->parts); row < begin(d->rows, part + 1, d->parts); row++) {
        const num *restrict x = d->x + row * n, *restrict w = d->w, *restrict dy = d->dy + row * n;
        num *restrict dx = d->dx + row * n;
        float inner = 0, scale = d->r[row];
#pragma omp simd reduction(+ : inner)
        for (int64_t i = 0; i < n; i++) inner += wide_num(x[i]) * wide_num(w[i]) * wide_num(dy[i]);
        inner *= scale * scale * scale / n;
        if (!d->plus) {
            for (int64_t i = 0; i < n; i++) dx[i] = narrow_num(scale * wide_num(w[i]) * wide_num(dy[i]) - inner * wide_num(x[i]));
            continue;
        }
        const num *restrict plus = d->plus + row * n;
        for (int64_t i = 0; i < n; i++)
            dx[i] = narrow_num(wide_num(plus[i]) + scale * wide_num(w[i]) * wide_num(dy[i]) - inner * wide_num(x[i]));
    }
}

int KERNEL(fedllm_norm_backward)(const num *dy, const num *x, const num *w, const float *r, const num *plus, num *dx,
                                 int64_t rows, int64_t n) {
    norm d = {x, w, dy, plus, .dx = dx, .r = (float *)r, .rows = rows, .n = n, .parts = parts_of(rows, LEAST)};
    in_parallel(backward, &d, d.parts);
    return 0;
}
