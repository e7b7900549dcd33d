/* Causal attention within the sequences of a row, each query head of a group with its group's keys and values.

       P = softmax(s Q K^T)   O = P V
       dP = dO V^T   dS = s P (dP - sum(P dP))   dQ = dS K   dK = dS^T Q   dV = P^T dO

   A sequence is four numbers: where its first `common` keys lie, which it shares with the sequence that has them as
   queries, too; `common`; where its own queries and keys lie, which follow; and its length. Nothing is computed for
   keys that a tile of 8 queries does not see. Probabilities of a sequence: (query head, own query, key), keys padded.

   Products are sums over pairs of numbers: one factor lies two rows side by side, (rows / 2, columns, 2). */

#include <math.h>
#include <stdlib.h>

#include "team.h"
#include "tiles.h"

#ifdef TILES

enum { ROWS = 8, WIDTH = 16 };

typedef struct {
    int64_t first, common, own, length;
} sequence;

/* States of one head: position t at `at + t * next`. */
typedef struct {
    const bf16 *at;
    int64_t next;
} states;

static int64_t padded(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

/* Position of a sequence's i-th key. */
static int64_t place(const sequence *s, int64_t i) { return i < s->common ? s->first + i : s->own + i - s->common; }

/* `vectors` of 16 columns of out (8, .) {=, +=} A B, see below. */
TILE product_tile(const bf16 *const *a, int64_t next_a, const bf16 *b, int64_t next_b, int64_t steps, float *out,
                  int64_t next_out, int vectors, int add) {
    __m512 sum[2 * ROWS];
    UNROLL for (int i = 0; i < ROWS * vectors; i++)
        sum[i] = add ? _mm512_loadu_ps(out + i / vectors * next_out + i % vectors * WIDTH) : _mm512_setzero_ps();
    for (int64_t j = 0; j < steps; j++, b += next_b) {
        __m512bh one = words(b, ~0u), two = words(b + 2 * WIDTH * (vectors - 1), ~0u);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512bh both = pair(a[i] + j * next_a);
            sum[i * vectors] = _mm512_dpbf16_ps(sum[i * vectors], one, both);
            if (vectors > 1) sum[i * vectors + 1] = _mm512_dpbf16_ps(sum[i * vectors + 1], two, both);
        }
    }
    UNROLL for (int i = 0; i < ROWS * vectors; i++)
        _mm512_storeu_ps(out + i / vectors * next_out + i % vectors * WIDTH, sum[i]);
}

/* out (8, columns) {=, +=} A B: row i of A in pairs at a[i] + j next_a, B (steps, columns, 2) in rows of next_b. */
TILE product(const bf16 *const *a, int64_t next_a, const bf16 *b, int64_t next_b, int64_t steps, float *out,
             int64_t next_out, int64_t columns, int add) {
    int64_t c = 0;
    for (; c + 2 * WIDTH <= columns; c += 2 * WIDTH)
        product_tile(a, next_a, b + 2 * c, next_b, steps, out + c, next_out, 2, add);
    if (c < columns) product_tile(a, next_a, b + 2 * c, next_b, steps, out + c, next_out, 1, add);
}

static inline void narrowed(__m512 x, bf16 *y) { _mm256_storeu_si256((__m256i *)y, (__m256i)_mm512_cvtneps_pbh(x)); }

static void row_narrowed(const float *restrict x, bf16 *restrict y, int64_t n) {
    for (int64_t i = 0; i < n; i += WIDTH) narrowed(_mm512_loadu_ps(x + i), y + i);
}

/* Keys or values of a sequence side by side in columns: (size / 2, N, 2), N the padded length. */
static void in_columns(states x, const sequence *s, int64_t size, bf16 *out) {
    int64_t N = padded(s->length);
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < size; j += 2) {
            bf16 *to = out + j * N + 2 * i;
            if (i < s->length)
                memcpy(to, x.at + place(s, i) * x.next + j, 2 * sizeof *to);
            else
                memset(to, 0, 2 * sizeof *to);
        }
}

static inline __m512i half_row(const bf16 *x) {
    return x ? _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)x)) : _mm512_setzero_si512();
}

/* Rows two by two: (rows / 2, size, 2); a row that is missing is zeros. */
static void two_by_two(const bf16 *one, const bf16 *two, bf16 *out, int64_t size) {
    __m512i pairs = side_by_side();
    for (int64_t i = 0; i < size; i += WIDTH) {
        __m512i left = half_row(one ? one + i : NULL), right = half_row(two ? two + i : NULL);
        _mm512_storeu_si512(out + 2 * i, _mm512_permutex2var_epi16(left, pairs, right));
    }
}

static const bf16 *row_of(states x, const sequence *s, int64_t i) {
    return i < s->length ? x.at + place(s, i) * x.next : NULL;
}

static void in_rows(states x, const sequence *s, int64_t from, int64_t to, int64_t size, bf16 *out) {
    for (int64_t i = from; i < to; i += 2, out += 2 * size)
        two_by_two(row_of(x, s, i), row_of(x, s, i + 1), out, size);
}

/* Rows of 8 queries from the i-th on, the last one again where there are fewer. */
static void queries(states x, const sequence *s, int64_t i, const bf16 **rows) {
    for (int k = 0; k < ROWS; k++) rows[k] = row_of(x, s, min(i + k, s->length - 1));
}

/* Scores of the query at place i to probabilities, over n keys, a multiple of 16. */
static void softmax(float *restrict x, bf16 *restrict p, int64_t i, int64_t n, int64_t window, float scale) {
    int64_t from = window > 0 && i >= window ? i - window + 1 : 0;
    __m512 highest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += WIDTH) {
        __mmask16 seen = (__mmask16)(mask_of(max(0, i + 1 - k)) & ~mask_of(max(0, from - k)));
        __m512 scaled = _mm512_mul_ps(_mm512_set1_ps(scale), _mm512_loadu_ps(x + k));
        scaled = _mm512_mask_mov_ps(_mm512_set1_ps(-INFINITY), seen, scaled);
        _mm512_storeu_ps(x + k, scaled);
        highest = _mm512_max_ps(scaled, highest);
    }
    float most = _mm512_reduce_max_ps(highest);
    for (int64_t k = 0; k < n; k += WIDTH) {
        for (int j = 0; j < WIDTH; j++) x[k + j] = exponential(x[k + j] - most);
        total = _mm512_add_ps(total, _mm512_loadu_ps(x + k));
    }
    __m512 share = _mm512_set1_ps(1 / _mm512_reduce_add_ps(total));
    for (int64_t k = 0; k < n; k += WIDTH) narrowed(_mm512_mul_ps(_mm512_loadu_ps(x + k), share), p + k);
}

/* dS of a query from its dP and P, over n keys, a multiple of 16. */
static void gradient(const float *restrict dp, const bf16 *restrict p, bf16 *restrict ds, int64_t n, float scale) {
    __m512 total = _mm512_setzero_ps();
    for (int64_t k = 0; k < n; k += WIDTH)
        total = _mm512_fmadd_ps(widened(p + k, 0xffff), _mm512_loadu_ps(dp + k), total);
    __m512 inner = _mm512_set1_ps(_mm512_reduce_add_ps(total)), times = _mm512_set1_ps(scale);
    for (int64_t k = 0; k < n; k += WIDTH) {
        __m512 apart = _mm512_sub_ps(_mm512_loadu_ps(dp + k), inner);
        narrowed(_mm512_mul_ps(_mm512_mul_ps(times, widened(p + k, 0xffff)), apart), ds + k);
    }
}

/* Queries and keys of `size` numbers, values and outputs of `size_v`; outputs (T, heads, size_v). */
typedef struct {
    int64_t heads, groups, size, size_v, window;
    float scale;
} shape;

/* One head's queries of a sequence; `p`: their probabilities. `work`: 8 (N + size_v) floats. */
static void forward(const shape *d, const sequence *s, states q, const bf16 *keys, const bf16 *values, bf16 *p,
                    bf16 *out, float *work) {
    int64_t N = padded(s->length), next = d->heads * d->size_v;
    float *scores = work, *found = work + ROWS * N;
    for (int64_t i = s->common; i < s->length; i += ROWS, p += ROWS * N) {
        int64_t count = min(ROWS, s->length - i), n = padded(i + count);
        const bf16 *rows[ROWS];
        queries(q, s, i, rows);
        product(rows, 2, keys, 2 * N, d->size / 2, scores, N, n, 0);
        for (int64_t k = 0; k < count; k++) softmax(scores + k * N, p + k * N, i + k, n, d->window, d->scale);
        for (int64_t k = 0; k < ROWS; k++) rows[k] = p + min(k, count - 1) * N;
        product(rows, 2, values, 2 * d->size_v, n / 2, found, d->size_v, d->size_v, 0);
        for (int64_t k = 0; k < count; k++)
            row_narrowed(found + k * d->size_v, out + place(s, i + k) * next, d->size_v);
    }
}

/* Elements of a sequence's probabilities of one head. */
static int64_t kept(const sequence *s) { return (s->length - s->common) * padded(s->length); }

/* Room for the gradients of one head and of one sequence's keys and values. */
typedef struct {
    bf16 *values, *keys, *ds, *ds_pairs, *p_pairs, *q_pairs, *do_pairs;
    float *found, *dk, *dv;
} room;

/* dQ of one head's queries, and what they add to dk (N, size) and dv (N, size_v). */
static void backward(const shape *d, const sequence *s, states q, states dout, const bf16 *p, bf16 *dq, const room *r) {
    int64_t N = padded(s->length), rows = s->length - s->common, next = d->heads * d->size;
    memset(r->ds_pairs, 0, (rows + 1) / 2 * 2 * N * sizeof(bf16));
    memset(r->p_pairs, 0, (rows + 1) / 2 * 2 * N * sizeof(bf16));
    for (int64_t i = s->common; i < s->length; i += ROWS, p += ROWS * N) {
        int64_t count = min(ROWS, s->length - i), n = padded(i + count), at = (i - s->common) * N;
        const bf16 *own[ROWS];
        queries(dout, s, i, own);
        product(own, 2, r->values, 2 * N, d->size_v / 2, r->found, N, n, 0);
        for (int64_t k = 0; k < count; k++) gradient(r->found + k * N, p + k * N, r->ds + k * N, n, d->scale);
        for (int64_t k = 0; k < ROWS; k++) own[k] = r->ds + min(k, count - 1) * N;
        product(own, 2, r->keys, 2 * d->size, n / 2, r->found, d->size, d->size, 0);
        for (int64_t k = 0; k < count; k++) row_narrowed(r->found + k * d->size, dq + place(s, i + k) * next, d->size);
        for (int64_t k = 0; k < count; k += 2, at += 2 * N) {
            two_by_two(r->ds + k * N, k + 1 < count ? r->ds + (k + 1) * N : NULL, r->ds_pairs + at, n);
            two_by_two(p + k * N, k + 1 < count ? p + (k + 1) * N : NULL, r->p_pairs + at, n);
        }
    }
    in_rows(q, s, s->common, s->length, d->size, r->q_pairs);
    in_rows(dout, s, s->common, s->length, d->size_v, r->do_pairs);
    for (int64_t i = 0; i < s->length; i += ROWS) { /* keys that queries from the i-th on see */
        int64_t from = i > s->common ? (i - s->common) / 2 : 0, steps = (rows + 1) / 2 - from;
        const bf16 *ds[ROWS], *ps[ROWS];
        for (int64_t k = 0; k < ROWS; k++) ds[k] = r->ds_pairs + 2 * (from * N + i + k);
        for (int64_t k = 0; k < ROWS; k++) ps[k] = r->p_pairs + 2 * (from * N + i + k);
        const bf16 *qs = r->q_pairs + 2 * from * d->size, *dos = r->do_pairs + 2 * from * d->size_v;
        product(ds, 2 * N, qs, 2 * d->size, steps, r->dk + i * d->size, d->size, d->size, 1);
        product(ps, 2 * N, dos, 2 * d->size_v, steps, r->dv + i * d->size_v, d->size_v, d->size_v, 1);
    }
}

/* Adds rows of a sequence's keys or values where they lie, `at` first: more than one sequence may have them. */
static void added(const float *restrict x, const sequence *s, float *restrict total, int64_t at, int64_t size) {
    for (int64_t i = 0; i < s->length; i++, x += size) {
        float *sum = total + (place(s, i) - at) * size;
        for (int64_t j = 0; j < size; j++) sum[j] += x[j];
    }
}

/* What a call is given: strides of a head and of a position follow each of q (heads, T, size), k, v (groups, T, .).
   p: all probabilities; dout (T, heads, size_v), dq (T, heads, size), dk (T, groups, size) and dv (T, groups, size_v)
   lie in one piece. */
typedef struct {
    shape d;
    const bf16 *q, *k, *v, *dout;
    bf16 *p, *out, *dq, *dk, *dv;
    int64_t q_head, q_next, k_head, k_next, v_head, v_next;
    const sequence *all;
    int64_t count;
    int *status;
} operands;

static int64_t kept_before(const operands *o, int64_t sequences) {
    int64_t sum = 0;
    for (int64_t i = 0; i < sequences; i++) sum += o->d.heads * kept(o->all + i);
    return sum;
}

/* A sequence, of one group of heads. */
static void forward_item(void *given, int64_t item) {
    const operands *o = given;
    const shape *d = &o->d;
    int64_t g = item % d->groups, per = d->heads / d->groups, at = item / d->groups;
    const sequence *s = o->all + at;
    int64_t N = padded(s->length);
    bf16 *keys = malloc(N * (d->size + d->size_v) * sizeof *keys), *values = keys + N * d->size;
    float *work = malloc(ROWS * (N + d->size_v) * sizeof *work);
    if (keys && work) {
        bf16 *p = o->p + kept_before(o, at);
        in_columns((states){o->k + g * o->k_head, o->k_next}, s, d->size, keys);
        in_rows((states){o->v + g * o->v_head, o->v_next}, s, 0, N, d->size_v, values);
        for (int64_t h = g * per; h < (g + 1) * per; h++)
            forward(d, s, (states){o->q + h * o->q_head, o->q_next}, keys, values, p + h * kept(s),
                    o->out + h * d->size_v, work);
    } else
        *o->status = OUT_OF_MEMORY;
    free(work);
    free(keys);
}

int fedllm_attention(const bf16 *q, int64_t q_head, int64_t q_next, const bf16 *k, int64_t k_head, int64_t k_next,
                     const bf16 *v, int64_t v_head, int64_t v_next, bf16 *p, bf16 *out, const sequence *all,
                     int64_t count, int64_t heads, int64_t groups, int64_t size, int64_t size_v, int64_t window,
                     float scale) {
    int status = 0;
    operands o = {{heads, groups, size, size_v, window, scale}, q, k, v, NULL, p, out, NULL, NULL, NULL,
                  q_head, q_next, k_head, k_next, v_head, v_next, all, count, &status};
    in_parallel(forward_item, &o, count * groups);
    return status;
}

/* A run of sequences that share keys, of one group of heads: no other run has a key of theirs. */
static void backward_item(void *given, int64_t item) {
    const operands *o = given;
    const shape *d = &o->d;
    int64_t g = item % d->groups, per = d->heads / d->groups, run = item / d->groups, at = 0;
    for (; run; run--)
        for (at++; o->all[at].common;) at++;
    const sequence *first = o->all + at, *end = first + 1;
    int64_t N = padded(first->length), size = d->size, size_v = d->size_v, both = size + size_v;
    for (; end < o->all + o->count && end->common; end++) N = max(N, padded(end->length));
    int64_t begins = first->own, tokens = end[-1].own + end[-1].length - end[-1].common - begins;
    bf16 *numbers = malloc((2 * N * both + ROWS * N + 2 * N * N) * sizeof *numbers);
    float *floats = malloc((ROWS * (N > size ? N : size) + N * both + tokens * both) * sizeof *floats);
    if (!numbers || !floats) {
        *o->status = OUT_OF_MEMORY;
        free(floats), free(numbers);
        return;
    }
    room r = {.values = numbers, .keys = numbers + N * size_v, .q_pairs = numbers + N * both};
    r.do_pairs = r.q_pairs + N * size, r.ds = r.do_pairs + N * size_v;
    r.ds_pairs = r.ds + ROWS * N, r.p_pairs = r.ds_pairs + N * N;
    r.dk = floats, r.dv = r.dk + N * size, r.found = r.dv + N * size_v;
    float *total_k = floats + N * both + ROWS * (N > size ? N : size), *total_v = total_k + tokens * size;
    const bf16 *own = o->p + kept_before(o, at);
    memset(total_k, 0, tokens * both * sizeof *total_k);
    for (const sequence *s = first; s < end; own += d->heads * kept(s), s++) {
        in_rows((states){o->k + g * o->k_head, o->k_next}, s, 0, padded(s->length), size, r.keys);
        in_columns((states){o->v + g * o->v_head, o->v_next}, s, size_v, r.values);
        memset(r.dk, 0, N * both * sizeof *r.dk);
        for (int64_t h = g * per; h < (g + 1) * per; h++)
            backward(d, s, (states){o->q + h * o->q_head, o->q_next}, (states){o->dout + h * size_v, d->heads * size_v},
                     own + h * kept(s), o->dq + h * size, &r);
        added(r.dk, s, total_k, begins, size);
        added(r.dv, s, total_v, begins, size_v);
    }
    for (int64_t t = 0; t < tokens; t++) {
        row_narrowed(total_k + t * size, o->dk + ((begins + t) * d->groups + g) * size, size);
        row_narrowed(total_v + t * size_v, o->dv + ((begins + t) * d->groups + g) * size_v, size_v);
    }
    free(floats);
    free(numbers);
}

int fedllm_attention_backward(const bf16 *q, int64_t q_head, int64_t q_next, const bf16 *k, int64_t k_head,
                              int64_t k_next, const bf16 *v, int64_t v_head, int64_t v_next, const bf16 *p,
                              const bf16 *dout, bf16 *dq, bf16 *dk, bf16 *dv, const sequence *all, int64_t count,
                              int64_t tokens, int64_t heads, int64_t groups, int64_t size, int64_t size_v,
                              int64_t window, float scale) {
    (void)tokens;
    int status = 0;
    int64_t runs = 0;
    for (int64_t i = 0; i < count; i++) runs += !all[i].common;
    operands o = {{heads, groups, size, size_v, window, scale}, q, k, v, dout, (bf16 *)p, NULL, dq, dk, dv,
                  q_head, q_next, k_head, k_next, v_head, v_next, all, count, &status};
    in_parallel(backward_item, &o, runs * groups);
    return status;
}

#endif
