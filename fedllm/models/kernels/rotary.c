/* Rotary embeddings: each position's numbers turned in pairs (x_i, x_{i + n/2}), by angles with cosine c and sine s.

       y1 = x1 c1 - x2 s1    y2 = x2 c2 + x1 s2        dx1 = dy1 c1 + dy2 s2    dx2 = dy2 c2 - dy1 s1

   Forward, products are rounded, as PyTorch's are. */

#include "bf16.h"
#include "team.h"

enum { LEAST = 16 }; /* positions of a part */

/* x (positions, heads, n) with strides of a position and a head, c, s (positions, n), y (positions, heads, n) in one
   piece. */
typedef struct {
    const num *x, *c, *s;
    num *y;
    int64_t next, head, positions, heads, n, parts;
} turn;

static inline __attribute__((always_inline)) void turned(const turn *d, int64_t part, int back) {
    int64_t n = d->n, half = n / 2;
    for (int64_t t = begin(d->positions, part, d->parts); t < begin(d->positions, part + 1, d->parts); t++)
        for (int64_t h = 0; h < d->heads; h++) {
            const num *one = d->x + t * d->next + h * d->head, *two = one + half, *c = d->c + t * n, *s = d->s + t * n;
            num *first = d->y + (t * d->heads + h) * n, *second = first + half;
#pragma omp simd
            for (int64_t i = 0; i < half; i++) {
                float a = wide_num(one[i]), b = wide_num(two[i]), s1 = wide_num(s[i]), s2 = wide_num(s[half + i]);
                float along = a * wide_num(c[i]), along_two = b * wide_num(c[half + i]);
                first[i] = narrow_num(back ? along + b * s2 : rounded_num(along) - rounded_num(b * s1));
                second[i] = narrow_num(back ? along_two - a * s1 : rounded_num(along_two) + rounded_num(a * s2));
            }
        }
}

static void forward(void *job, int64_t part) { turned(job, part, 0); }

static void backward(void *job, int64_t part) { turned(job, part, 1); }

int KERNEL(fedllm_rotary)(const num *x, int64_t next, int64_t head, const num *c, const num *s, num *y,
                          int64_t positions, int64_t heads, int64_t n) {
    turn d = {x, c, s, y, next, head, positions, heads, n, parts_of(positions, LEAST)};
    in_parallel(forward, &d, d.parts);
    return 0;
}

int KERNEL(fedllm_rotary_backward)(const num *dy, int64_t next, int64_t head, const num *c, const num *s, num *dx,
                                   int64_t positions, int64_t heads, int64_t n) {
    turn d = {dy, c, s, dx, next, head, positions, heads, n, parts_of(positions, LEAST)};
    in_parallel(backward, &d, d.parts);
    return 0;
}
