/* What low-rank adapters of several clients add to a frozen product in float, and its gradients; see low_rank.c.

       y += s z B_k^T   z = u A_k^T        dz = s dy B_k   dx += dz A_k   dA_k = dz^T u   dB_k = s dy^T z

   z (T, R), R the rank up to the next multiple of 8. A sum over rows or columns has one order, whoever computes it. */

#include <stdlib.h>

#include "lanes.h"
#include "product_float.h"
#include "team.h"

#ifdef LANES

enum {
    BLOCK = 32,                 /* rows of an item */
    ALONG = LANES > 8 ? 4 : 2,  /* rows and ranks of a tile of dot products */
    GROUP = 8,                  /* ranks that are added up at a time, */
    WIDE = VECTORS > 2 ? 2 : 1, /* vectors of columns at a time, */
    STRIP = 128,                /* and columns of an item */
};

#include "row_blocks.h"

typedef struct {
    const float *u, *dy, *a, *b, *z;
    float *to_z, *dz, *turned, *da, *db; /* turned: (clients, rank, out), the transposes of B */
    const int64_t *sizes;
    int64_t clients, rank, R, in, out, next_a, next_b, next_da, next_db, strips;
    float s;
} operands;

/* z (rows, R) = s x F^T: x (rows, n), F (rank, n). */
TILE dot_tile(const float *x, const float *f, float *z, int64_t n, int64_t R, float s, int rows, int ranks) {
    vec sum[ALONG * ALONG];
    UNROLL for (int i = 0; i < rows * ranks; i++) sum[i] = all(0);
    int64_t c = 0;
    for (; c + LANES <= n; c += LANES) {
        vec one[ALONG];
        UNROLL for (int q = 0; q < ranks; q++) one[q] = load(f + q * n + c);
        UNROLL for (int i = 0; i < rows; i++) {
            vec number = load(x + i * n + c);
            UNROLL for (int q = 0; q < ranks; q++) sum[i * ranks + q] += number * one[q];
        }
    }
    if (c < n)
        for (int i = 0; i < rows * ranks; i++)
            sum[i] += load_some(x + i / ranks * n + c, n - c) * load_some(f + i % ranks * n + c, n - c);
    for (int i = 0; i < rows * ranks; i++) z[i / ranks * R + i % ranks] = s * total(sum[i]);
}

static void dot(const float *x, const float *f, float *z, int64_t rows, int64_t n, int64_t rank, int64_t R, float s) {
    int64_t q = 0;
    for (; q + ALONG <= rank; q += ALONG) {
        int64_t i = 0;
        for (; i + ALONG <= rows; i += ALONG) dot_tile(x + i * n, f + q * n, z + i * R + q, n, R, s, ALONG, ALONG);
        for (; i < rows; i++) dot_tile(x + i * n, f + q * n, z + i * R + q, n, R, s, 1, ALONG);
    }
    for (; q < rank; q++)
        for (int64_t i = 0; i < rows; i++) dot_tile(x + i * n, f + q * n, z + i * R + q, n, R, s, 1, 1);
    for (int64_t i = 0; i < rows; i++) memset(z + i * R + rank, 0, (R - rank) * sizeof *z);
}

/* WIDE vectors of columns of F (ranks, next) = z^T x: x (rows, n), z (rows, R). */
TILE gather_tile(const float *x, const float *z, float *f, int64_t next, int64_t rows, int64_t n, int64_t R,
                 int64_t columns, int ranks) {
    vec sum[GROUP * WIDE];
    UNROLL for (int i = 0; i < ranks * WIDE; i++) sum[i] = all(0);
    for (int64_t t = 0; t < rows; t++, x += n, z += R) {
        vec number[WIDE];
        __builtin_prefetch(x + 8 * n);
        __builtin_prefetch(x + 8 * n + LANES);
        UNROLL for (int v = 0; v < WIDE; v++) number[v] = load_some(x + v * LANES, columns - v * LANES);
        UNROLL for (int q = 0; q < ranks; q++) {
            vec one = all(z[q]);
            UNROLL for (int v = 0; v < WIDE; v++) sum[q * WIDE + v] += one * number[v];
        }
    }
    UNROLL for (int q = 0; q < ranks; q++)
        UNROLL for (int v = 0; v < WIDE; v++)
            store_some(f + q * next + v * LANES, sum[q * WIDE + v], columns - v * LANES);
}

static void gather(const float *x, const float *z, float *f, int64_t next, int64_t rows, int64_t n, int64_t R,
                   int64_t columns, int64_t rank) {
    for (int64_t c = 0; c < columns; c += WIDE * LANES) {
        int64_t q = 0;
        for (; q + GROUP <= rank; q += GROUP)
            gather_tile(x + c, z + q, f + q * next + c, next, rows, n, R, columns - c, GROUP);
        for (; q < rank; q++) gather_tile(x + c, z + q, f + q * next + c, next, rows, n, R, columns - c, 1);
    }
}

static void turn(void *given, int64_t k) {
    const operands *d = given;
    const float *b = d->b + k * d->next_b;
    float *to = d->turned + k * d->rank * d->out;
    for (int64_t i = 0; i < d->out; i++)
        for (int64_t q = 0; q < d->rank; q++) to[q * d->out + i] = b[i * d->rank + q];
}

static void forward(void *given, int64_t item) {
    const operands *d = given;
    int64_t k, t, rows = block_of(d->sizes, item, &k, &t);
    dot(d->u + t * d->in, d->a + k * d->next_a, d->to_z + t * d->R, rows, d->in, d->rank, d->R, 1);
}

static void backward(void *given, int64_t item) {
    const operands *d = given;
    int64_t k, t, rows = block_of(d->sizes, item, &k, &t);
    dot(d->dy + t * d->out, d->turned + k * d->rank * d->out, d->dz + t * d->R, rows, d->out, d->rank, d->R, d->s);
}

/* Columns of a client's dA, then of its dB. */
static void gradients(void *given, int64_t item) {
    const operands *d = given;
    int64_t k = item / d->strips, c = item % d->strips * STRIP, t = rows_before(d->sizes, k), rank = d->rank;
    int64_t of_a = (d->in + STRIP - 1) / STRIP * STRIP;
    if (c < of_a) {
        if (d->da)
            gather(d->u + t * d->in + c, d->dz + t * d->R, d->da + k * d->next_da + c, d->in, d->sizes[k], d->in, d->R,
                   min(STRIP, d->in - c), rank);
        return;
    }
    if (!d->db) return;
    c -= of_a;
    int64_t columns = min(STRIP, d->out - c);
    float *db = d->db + k * d->next_db + c * rank, found[GROUP * STRIP];
    for (int64_t q = 0; q < rank; q += GROUP) {
        int64_t ranks = min(GROUP, rank - q);
        gather(d->dy + t * d->out + c, d->z + t * d->R + q, found, STRIP, d->sizes[k], d->out, d->R, columns, ranks);
        for (int64_t i = 0; i < columns; i++)
            for (int64_t j = 0; j < ranks; j++) db[i * rank + q + j] = d->s * found[j * STRIP + i];
    }
}

/* Where w is null, y is added to. `form`: of W's transpose. */
int fedllm_low_rank_float(const float *u, float *y, float *z, const float *a, const float *b, const int64_t *sizes,
                          int64_t clients, int64_t rank, int64_t in, int64_t out, int64_t next_a, int64_t next_b,
                          float s, const float *x, const float *w, const float *bias, const float *plus, int64_t form) {
    operands d = {.u = u, .a = a, .b = b, .to_z = z, .sizes = sizes, .clients = clients, .rank = rank,
                  .R = (rank + 7) / 8 * 8, .in = in, .out = out, .next_a = next_a, .next_b = next_b};
    if (!(d.turned = malloc((clients * rank * out + 1) * sizeof *d.turned))) return OUT_OF_MEMORY;
    in_parallel(turn, &d, clients);
    in_parallel(forward, &d, blocks_before(sizes, clients));
    own_float own = {z, d.turned, sizes, clients, rank, d.R, rank * out, s};
    int status = product_float(x, (matrix_float){w, w ? in : 0, out, form}, bias, w ? plus : y, y,
                               rows_before(sizes, clients), &own);
    free(d.turned);
    return status;
}

/* da and db may be null, and dx, which is written where w is there and else added to. `form`: of W. */
int fedllm_low_rank_backward_float(const float *dy, const float *u, const float *z, float *dx, const float *a,
                                   const float *b, float *da, float *db, const int64_t *sizes, int64_t clients,
                                   int64_t rank, int64_t in, int64_t out, int64_t next_a, int64_t next_b,
                                   int64_t next_da, int64_t next_db, float s, const float *w, const float *plus,
                                   int64_t form) {
    operands d = {u, dy, a, b, z, NULL, NULL, NULL, da, db, sizes, clients, rank, (rank + 7) / 8 * 8, in, out,
                  next_a, next_b, next_da, next_db, (in + STRIP - 1) / STRIP + (out + STRIP - 1) / STRIP, s};
    int64_t rows = rows_before(sizes, clients);
    if (!(d.turned = malloc((clients * rank * out + rows * d.R + 1) * sizeof *d.turned))) return OUT_OF_MEMORY;
    d.dz = d.turned + clients * rank * out;
    in_parallel(turn, &d, clients);
    in_parallel(backward, &d, blocks_before(sizes, clients));
    in_parallel(gradients, &d, clients * d.strips);
    own_float own = {d.dz, a, sizes, clients, rank, d.R, next_a, 1};
    int status = 0;
    if (dx) status = product_float(dy, (matrix_float){w, w ? out : 0, in, form}, NULL, w ? plus : dx, dx, rows, &own);
    free(d.turned);
    return status;
}

#endif
