/* Causal attention within the sequences of a row in float; see attention.c for the formulas and for what a sequence is.

   Nothing is computed for keys that a tile of queries does not see. Probabilities of a sequence: (query head, own query,
   key), keys padded to a multiple of 16. A sequence that shares keys follows the one that has them, with none between
   that shares nothing: such runs of sequences have no key in common, and may be computed apart. */

#include <math.h>
#include <stdlib.h>

#include "lanes.h"
#include "team.h"

#ifdef LANES

enum { WIDTH = 16 };

typedef struct {
    int64_t first, common, own, length;
} sequence;

/* States of one head: position t at `at + t * next`. */
typedef struct {
    const float *at;
    int64_t next;
} states;

/* Queries and keys of `size` numbers, values and outputs of `size_v`; outputs (T, heads, size_v). */
typedef struct {
    const float *q, *k, *v, *dout;
    float *p, *out, *dq, *dk, *dv;
    int64_t q_head, q_next, k_head, k_next, v_head, v_next;
    const sequence *all;
    int64_t count, heads, groups, size, size_v, window;
    float scale;
    int *status;
} operands;

static int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* Position of a sequence's i-th key. */
static int64_t place(const sequence *s, int64_t i) { return i < s->common ? s->first + i : s->own + i - s->common; }

/* Elements of a sequence's probabilities of one head. */
static int64_t kept(const sequence *s) { return (s->length - s->common) * padded(s->length); }

static int64_t kept_before(const operands *d, int64_t sequences) {
    int64_t sum = 0;
    for (int64_t i = 0; i < sequences; i++) sum += d->heads * kept(d->all + i);
    return sum;
}

/* `vectors` of columns of out (rows, .) {=, +=} A B. */
TILE product_tile(const float *const *a, int64_t next_a, const float *b, int64_t next_b, int64_t steps, float *out,
                  int64_t next_out, int add, int vectors, int rows) {
    vec sum[ROWS * VECTORS];
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            sum[i * VECTORS + v] = add ? load(out + i * next_out + v * LANES) : (vec){0};
    multiplied(sum, a, next_a, b, next_b, steps, rows, vectors);
    UNROLL for (int i = 0; i < rows; i++)
        UNROLL for (int v = 0; v < vectors; v++) store(out + i * next_out + v * LANES, sum[i * VECTORS + v]);
}

/* out (rows, columns) {=, +=} A B for up to 6 rows, columns a multiple of 16: row i of A at a[i] + j next_a, B (steps,
   columns) in rows of next_b. */
static void product(const float *const *a, int64_t next_a, const float *b, int64_t next_b, int64_t steps, float *out,
                    int64_t next_out, int64_t columns, int add, int64_t rows) {
    int64_t c = 0;
    for (; c + COLUMNS <= columns; c += COLUMNS)
        WITH_ROWS(rows, product_tile, a, next_a, b + c, next_b, steps, out + c, next_out, add, VECTORS);
    for (; c < columns; c += LANES)
        WITH_ROWS(rows, product_tile, a, next_a, b + c, next_b, steps, out + c, next_out, add, 1);
}

/* Keys or values of a sequence side by side in columns: (size, N), N the padded length. */
static void in_columns(states x, const sequence *s, int64_t size, float *out) {
    int64_t N = padded(s->length);
    for (int64_t i = 0; i < N; i += WIDTH)
        for (int64_t j = 0; j < size; j++)
            for (int64_t k = i; k < i + WIDTH; k++)
                out[j * N + k] = k < s->length ? x.at[place(s, k) * x.next + j] : 0;
}

/* Row by row: from the i-th on, zeros behind the last. */
static void in_rows(states x, const sequence *s, int64_t from, int64_t to, int64_t size, float *out) {
    for (int64_t i = from; i < to; i++, out += size)
        if (i < s->length)
            memcpy(out, x.at + place(s, i) * x.next, size * sizeof *out);
        else
            memset(out, 0, size * sizeof *out);
}

static void queries(states x, const sequence *s, int64_t i, int64_t count, const float **rows) {
    for (int64_t k = 0; k < count; k++) rows[k] = x.at + place(s, i + k) * x.next;
}

/* Keys of a tile's rows that are written, where queries see n of N: all that a tile of keys may read. */
static int64_t written(int64_t n, int64_t N) { return min(n + WIDTH, N); }

/* Scores of the query at place i to probabilities, of n keys. */
static void softmax(float *restrict x, float *restrict p, int64_t i, int64_t n, int64_t window, float scale) {
    int64_t from = window > 0 && i >= window ? i - window + 1 : 0;
    float most = -INFINITY, sum = 0;
    for (int64_t k = from; k <= i; k++) x[k] *= scale;
#pragma omp simd reduction(max : most)
    for (int64_t k = from; k <= i; k++) most = x[k] > most ? x[k] : most;
    for (int64_t k = 0; k < from; k++) p[k] = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = from; k <= i; k++) sum += p[k] = exponential(x[k] - most);
    float share = 1 / sum;
    for (int64_t k = from; k <= i; k++) p[k] *= share;
    for (int64_t k = i + 1; k < n; k++) p[k] = 0;
}

/* dS of a query from its dP and P, over n keys; zeros up to N. */
static void gradient(const float *restrict dp, const float *restrict p, float *restrict ds, int64_t n, int64_t N,
                     float scale) {
    float inner = 0;
#pragma omp simd reduction(+ : inner)
    for (int64_t k = 0; k < n; k++) inner += p[k] * dp[k];
    for (int64_t k = 0; k < n; k++) ds[k] = scale * p[k] * (dp[k] - inner);
    for (int64_t k = n; k < N; k++) ds[k] = 0;
}

/* One head's queries of a sequence; `p`: their probabilities. `work`: 6 (N + size_v) floats. */
static void forward(const operands *d, const sequence *s, states q, const float *keys, const float *values, float *p,
                    float *out, float *work) {
    int64_t N = padded(s->length), next = d->heads * d->size_v;
    float *found = work + ROWS * N;
    for (int64_t i = s->common; i < s->length; i += ROWS, p += ROWS * N) {
        int64_t count = min(ROWS, s->length - i), n = padded(i + count);
        const float *rows[ROWS];
        queries(q, s, i, count, rows);
        product(rows, 1, keys, N, d->size, work, N, n, 0, count);
        for (int64_t k = 0; k < count; k++) softmax(work + k * N, p + k * N, i + k, written(n, N), d->window, d->scale);
        for (int64_t k = 0; k < count; k++) rows[k] = p + k * N;
        product(rows, 1, values, d->size_v, i + count, found, d->size_v, d->size_v, 0, count);
        for (int64_t k = 0; k < count; k++)
            memcpy(out + place(s, i + k) * next, found + k * d->size_v, d->size_v * sizeof *out);
    }
}

/* A sequence, of one group of heads. */
static void forward_item(void *given, int64_t item) {
    const operands *d = given;
    int64_t g = item % d->groups, per = d->heads / d->groups, at = item / d->groups;
    const sequence *s = d->all + at;
    int64_t N = padded(s->length);
    float *keys = malloc((N + ROWS) * (d->size + d->size_v + ROWS) * sizeof *keys + ROWS * N * sizeof *keys);
    if (!keys) {
        *d->status = OUT_OF_MEMORY;
        return;
    }
    float *values = keys + N * d->size, *work = values + N * d->size_v, *p = d->p + kept_before(d, at);
    in_columns((states){d->k + g * d->k_head, d->k_next}, s, d->size, keys);
    in_rows((states){d->v + g * d->v_head, d->v_next}, s, 0, N, d->size_v, values);
    for (int64_t h = g * per; h < (g + 1) * per; h++)
        forward(d, s, (states){d->q + h * d->q_head, d->q_next}, keys, values, p + h * kept(s), d->out + h * d->size_v,
                work);
    free(keys);
}

/* Room for the gradients of one head and of one sequence's keys and values. */
typedef struct {
    float *values, *keys, *ds, *q, *dout, *found, *dk, *dv;
} room;

/* dQ of one head's queries, and what they add to dk (N, size) and dv (N, size_v). */
static void backward(const operands *d, const sequence *s, states q, states dout, const float *p, float *dq,
                     const room *r) {
    int64_t N = padded(s->length), own = s->length - s->common, next = d->heads * d->size;
    for (int64_t i = s->common; i < s->length; i += ROWS) {
        int64_t count = min(ROWS, s->length - i), n = padded(i + count), at = (i - s->common) * N;
        const float *rows[ROWS];
        queries(dout, s, i, count, rows);
        product(rows, 1, r->values, N, d->size_v, r->found, N, n, 0, count);
        for (int64_t k = 0; k < count; k++)
            gradient(r->found + k * N, p + at + k * N, r->ds + at + k * N, n, written(n, N), d->scale);
        for (int64_t k = 0; k < count; k++) rows[k] = r->ds + at + k * N;
        product(rows, 1, r->keys, d->size, i + count, r->found, d->size, d->size, 0, count);
        for (int64_t k = 0; k < count; k++)
            memcpy(dq + place(s, i + k) * next, r->found + k * d->size, d->size * sizeof *dq);
    }
    in_rows(q, s, s->common, s->length, d->size, r->q);
    in_rows(dout, s, s->common, s->length, d->size_v, r->dout);
    for (int64_t i = 0; i < s->length; i += ROWS) { /* keys that queries from the i-th on see */
        int64_t from = i > s->common ? (i - s->common) / ROWS * ROWS : 0, count = min(ROWS, s->length - i);
        const float *ds[ROWS], *ps[ROWS];
        for (int64_t k = 0; k < count; k++) ds[k] = r->ds + from * N + i + k, ps[k] = p + from * N + i + k;
        product(ds, N, r->q + from * d->size, d->size, own - from, r->dk + i * d->size, d->size, d->size, 1, count);
        product(ps, N, r->dout + from * d->size_v, d->size_v, own - from, r->dv + i * d->size_v, d->size_v, d->size_v,
                1, count);
    }
}

/* Adds rows of a sequence's keys or values where they lie in `out` (T, groups, size): several sequences may have them. */
static void added(const float *restrict x, const sequence *s, float *restrict out, int64_t next, int64_t size,
                  int again) {
    for (int64_t i = 0; i < s->length; i++, x += size) {
        float *sum = out + place(s, i) * next;
        if (again && i < s->common)
            for (int64_t j = 0; j < size; j++) sum[j] += x[j];
        else
            memcpy(sum, x, size * sizeof *x);
    }
}

/* A run of sequences that share keys, of one group of heads. */
static void backward_item(void *given, int64_t item) {
    const operands *d = given;
    int64_t g = item % d->groups, per = d->heads / d->groups, run = item / d->groups, at = 0;
    for (; run; run--)
        for (at++; d->all[at].common;) at++;
    int64_t end = at + 1, N = padded(d->all[at].length), size = d->size, size_v = d->size_v, both = size + size_v;
    for (; end < d->count && d->all[end].common; end++) N = max(N, padded(d->all[end].length));
    int64_t wide = max(N, max(size, size_v));
    float *floats = malloc((N * N + 3 * N * both + ROWS * wide) * sizeof *floats);
    if (!floats) {
        *d->status = OUT_OF_MEMORY;
        return;
    }
    room r = {.values = floats, .keys = floats + N * size_v, .ds = floats + N * both};
    r.q = r.ds + N * N, r.dout = r.q + N * size, r.dk = r.dout + N * size_v, r.dv = r.dk + N * size;
    r.found = r.dv + N * size_v;
    const float *p = d->p + kept_before(d, at);
    for (const sequence *s = d->all + at; s < d->all + end; p += d->heads * kept(s), s++) {
        in_rows((states){d->k + g * d->k_head, d->k_next}, s, 0, padded(s->length), size, r.keys);
        in_columns((states){d->v + g * d->v_head, d->v_next}, s, size_v, r.values);
        memset(r.dk, 0, N * both * sizeof *r.dk);
        for (int64_t h = g * per; h < (g + 1) * per; h++)
            backward(d, s, (states){d->q + h * d->q_head, d->q_next}, (states){d->dout + h * size_v, d->heads * size_v},
                     p + h * kept(s), d->dq + h * size, &r);
        added(r.dk, s, d->dk + g * size, d->groups * size, size, s > d->all + at);
        added(r.dv, s, d->dv + g * size_v, d->groups * size_v, size_v, s > d->all + at);
    }
    free(floats);
}

/* q (heads, T, size), k, v (groups, T, .): strides of a head and of a position follow each. p: all probabilities. */
int fedllm_attention_float(const float *q, int64_t q_head, int64_t q_next, const float *k, int64_t k_head,
                           int64_t k_next, const float *v, int64_t v_head, int64_t v_next, float *p, float *out,
                           const sequence *all, int64_t count, int64_t heads, int64_t groups, int64_t size,
                           int64_t size_v, int64_t window, float scale) {
    int status = 0;
    operands d = {.q = q, .k = k, .v = v, .p = p, .out = out, .q_head = q_head, .q_next = q_next, .k_head = k_head,
                  .k_next = k_next, .v_head = v_head, .v_next = v_next, .all = all, .count = count, .heads = heads,
                  .groups = groups, .size = size, .size_v = size_v, .window = window, .scale = scale,
                  .status = &status};
    in_parallel(forward_item, &d, count * groups);
    return status;
}

/* dout (T, heads, size_v), dq (T, heads, size), dk (T, groups, size) and dv (T, groups, size_v) lie in one piece. */
int fedllm_attention_backward_float(const float *q, int64_t q_head, int64_t q_next, const float *k, int64_t k_head,
                                    int64_t k_next, const float *v, int64_t v_head, int64_t v_next, const float *p,
                                    const float *dout, float *dq, float *dk, float *dv, const sequence *all,
                                    int64_t count, int64_t tokens, int64_t heads, int64_t groups, int64_t size,
                                    int64_t size_v, int64_t window, float scale) {
    (void)tokens;
    int status = 0;
    int64_t runs = 0;
    for (int64_t i = 0; i < count; i++) runs += !all[i].common;
    operands d = {q, k, v, dout, (float *)p, NULL, dq, dk, dv, q_head, q_next, k_head, k_next, v_head, v_next,
                  all, count, heads, groups, size, size_v, window, scale, &status};
    in_parallel(backward_item, &d, runs * groups);
    return status;
}

#endif
