/* What low-rank adapters of several clients add to a frozen product, and its gradients. Rows lie client by client.

       y += s z B_k^T   z = u A_k^T        dz = s dy B_k   dx += dz A_k   dA_k = dz^T u   dB_k = s dy^T z

   u (T, in), y (T, out), z (T, R) in 16 bits; A_k (rank, in), B_k (out, rank) and their gradients in float. R is the rank,
   up to the next multiple of 8. Where the frozen matrix is given, its product is computed with it: y = plus + x W^T +
   bias + s z B_k^T, dx = plus + dy W + dz A_k. Each client's rows are taken in blocks that stay in the cache, from one product to the
   next. A product of two numbers of 16 bits is exact in float, in which all sums are made. */

#include <stdlib.h>

#include "product.h"
#include "team.h"
#include "tiles.h"

#ifdef TILES

enum { GROUP = 8, ROWS = 8, BLOCK = 32, STRIP = 128 }; /* ranks and rows of a tile, rows of a block, columns of a strip */

#include "row_blocks.h"

/* z = s x F^T: x (rows, n), z (rows, R), 8 ranks of F (n / 4, R, 4), each in two places of a vector. */
TILE dot_tile(const bf16 *x, const bf16 *f, bf16 *z, int rows, int64_t n, int64_t R, float s) {
    __m512 sum[ROWS];
    UNROLL for (int i = 0; i < rows; i++) sum[i] = _mm512_setzero_ps();
    for (int64_t c = 0; c < n; c += 4, f += 4 * R) {
        __m512bh factor = words(f, ~0u);
        UNROLL for (int i = 0; i < rows; i++) sum[i] = _mm512_dpbf16_ps(sum[i], four(x + i * n + c), factor);
    }
    UNROLL for (int i = 0; i < rows; i++) {
        __m512 both = _mm512_add_ps(sum[i], _mm512_permute_ps(sum[i], 0xb1)); /* each rank's sum, twice */
        __m512i even = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 14, 12, 10, 8, 6, 4, 2, 0);
        __m256 total = _mm512_castps512_ps256(_mm512_permutexvar_ps(even, both));
        _mm_storeu_si128((__m128i *)(z + i * R), (__m128i)_mm256_cvtneps_pbh(_mm256_mul_ps(total, _mm256_set1_ps(s))));
    }
}

/* For n a multiple of 4. */
static void dot(const bf16 *x, const bf16 *f, bf16 *z, int64_t rows, int64_t n, int64_t R, float s) {
    for (int64_t q = 0; q < R; q += GROUP) {
        int64_t i = 0;
        for (; i + ROWS <= rows; i += ROWS) dot_tile(x + i * n, f + 4 * q, z + i * R + q, ROWS, n, R, s);
        for (; i < rows; i++) dot_tile(x + i * n, f + 4 * q, z + i * R + q, 1, n, R, s);
    }
}

/* 16 columns of y += s z G: y (rows, n), z (rows, R), G (R / 2, n, 2). */
TILE add_tile(bf16 *y, const bf16 *z, const bf16 *g, int rows, int64_t n, int64_t R, float s, __mmask32 mask,
              __mmask16 half) {
    __m512 sum[ROWS];
    UNROLL for (int k = 0; k < rows; k++) sum[k] = _mm512_setzero_ps();
    for (int64_t q = 0; q < R; q += 2) {
        __m512bh factor = words(g + q * n, mask);
        UNROLL for (int k = 0; k < rows; k++) sum[k] = _mm512_dpbf16_ps(sum[k], factor, pair(z + k * R + q));
    }
    UNROLL for (int k = 0; k < rows; k++) {
        __m512 value = _mm512_fmadd_ps(sum[k], _mm512_set1_ps(s), widened(y + k * n, half));
        _mm256_mask_storeu_epi16(y + k * n, half, (__m256i)_mm512_cvtneps_pbh(value));
    }
}

TILE add_rows(bf16 *y, const bf16 *z, const bf16 *g, int rows, int64_t n, int64_t R, float s) {
    for (int64_t c = 0; c < n; c += 16) {
        __mmask16 half = (__mmask16)mask_of(min(n - c, 16));
        add_tile(y + c, z, g + 2 * c, rows, n, R, s, mask_of(2 * (n - c)), half);
    }
}

static void add(bf16 *y, const bf16 *z, const bf16 *g, int64_t rows, int64_t n, int64_t R, float s) {
    int64_t i = 0;
    for (; i + ROWS <= rows; i += ROWS) add_rows(y + i * n, z + i * R, g, ROWS, n, R, s);
    for (; i < rows; i++) add_rows(y + i * n, z + i * R, g, 1, n, R, s);
}

/* 32 columns of F += z^T x for 8 ranks: x (rows, n), F (R, n); pairs (rows / 2, 8, 2) of z. */
TILE gather_tile(const bf16 *x, const bf16 *pairs, float *f, int64_t rows, int64_t n, __mmask32 mask) {
    __m512i low = side_by_side();
    __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __mmask16 first = (__mmask16)mask, second = (__mmask16)(mask >> 16);
    __m512 left[GROUP], right[GROUP];
    UNROLL for (int k = 0; k < GROUP; k++) left[k] = _mm512_maskz_loadu_ps(first, f + k * n);
    UNROLL for (int k = 0; k < GROUP; k++) right[k] = _mm512_maskz_loadu_ps(second, f + k * n + 16);
    for (int64_t t = 0; t < rows; t += 2, pairs += 2 * GROUP) {
        __m512i one = (__m512i)words(x + t * n, mask);
        __m512i two = (__m512i)words(x + (t + 1 < rows ? t + 1 : t) * n, mask);
        __m512bh here = (__m512bh)_mm512_permutex2var_epi16(one, low, two);
        __m512bh there = (__m512bh)_mm512_permutex2var_epi16(one, high, two);
        UNROLL for (int k = 0; k < GROUP; k++) left[k] = _mm512_dpbf16_ps(left[k], here, pair(pairs + 2 * k));
        UNROLL for (int k = 0; k < GROUP; k++) right[k] = _mm512_dpbf16_ps(right[k], there, pair(pairs + 2 * k));
    }
    UNROLL for (int k = 0; k < GROUP; k++) _mm512_mask_storeu_ps(f + k * n, first, left[k]);
    UNROLL for (int k = 0; k < GROUP; k++) _mm512_mask_storeu_ps(f + k * n + 16, second, right[k]);
}

/* The columns from `first` up to `end`. An odd last row is paired with itself, times zero. */
static void gather(const bf16 *x, const bf16 *z, float *f, int64_t rows, int64_t n, int64_t R, int64_t first,
                   int64_t end) {
    bf16 two[BLOCK * GROUP]; /* ranks of two rows */
    for (int64_t q = 0; q < R; q += GROUP) {
        for (int64_t t = 0; t < rows + rows % 2; t++)
            for (int k = 0; k < GROUP; k++) two[(t / 2 * GROUP + k) * 2 + t % 2] = t < rows ? z[t * R + q + k] : 0;
        for (int64_t c = first; c < end; c += 32) gather_tile(x + c, two, f + q * n + c, rows, n, mask_of(n - c));
    }
}

/* Rows that were written long ago, and are read in columns. */
static void fetch(const bf16 *x, int64_t n) {
    for (int64_t i = 0; i < n; i += 32) __builtin_prefetch(x + i);
}

/* (R, n) to (n / 4, R, 4), or to (R / 2, n, 2). */
typedef void layout(const bf16 *rows, bf16 *out, int64_t n, int64_t R);

static void fours(const bf16 *rows, bf16 *out, int64_t n, int64_t R) {
    for (int64_t q = 0; q < R; q++)
        for (int64_t c = 0; c < n; c += 4) memcpy(out + c * R + 4 * q, rows + q * n + c, 4 * sizeof *rows);
}

static void pairs(const bf16 *restrict rows, bf16 *restrict out, int64_t n, int64_t R) {
    for (int64_t q = 0; q < R; q += 2, rows += 2 * n, out += 2 * n)
        for (int64_t i = 0; i < n; i++) out[2 * i] = rows[i], out[2 * i + 1] = rows[n + i];
}

/* (rank, n) floats in a layout, with zeros for the ranks up to R. `rows`: (R, n). */
static void laid_out(const float *f, bf16 *rows, bf16 *out, int64_t rank, int64_t n, int64_t R, layout *to) {
    for (int64_t i = 0; i < rank * n; i++) rows[i] = narrow(f[i]);
    memset(rows + rank * n, 0, (R - rank) * n * sizeof *rows);
    to(rows, out, n, R);
}

/* Ranks q to q + 7 of a row of B, zeros behind the last. */
static inline __m256 ranks_of(const float *row, int64_t rank, int64_t q) {
    return _mm256_maskz_loadu_ps((__mmask8)mask_of(min(rank - q, GROUP)), row + q);
}

/* The same of 4 rows in 16 bits, row by row. */
static inline __m512i four_rows(const float *b, int64_t rank, int64_t q) {
    __m512 two[2];
    UNROLL for (int i = 0; i < 2; i++, b += 2 * rank)
        two[i] = _mm512_insertf32x8(_mm512_castps256_ps512(ranks_of(b, rank, q)), ranks_of(b + rank, rank, q), 1);
    return (__m512i)_mm512_cvtne2ps_pbh(two[1], two[0]);
}

/* The transpose of B (n, rank) in fours, n a multiple of 4. */
static void turned_fours(const float *b, bf16 *out, int64_t rank, int64_t n, int64_t R) {
    __m512i order = _mm512_set_epi16(31, 23, 15, 7, 30, 22, 14, 6, 29, 21, 13, 5, 28, 20, 12, 4,
                                     27, 19, 11, 3, 26, 18, 10, 2, 25, 17, 9, 1, 24, 16, 8, 0);
    for (int64_t i = 0; i < n; i += 4, b += 4 * rank, out += 4 * R)
        for (int64_t q = 0; q < R; q += GROUP)
            _mm512_storeu_si512(out + 4 * q, _mm512_permutexvar_epi16(order, four_rows(b, rank, q)));
}

/* The transpose of B (n, rank) in pairs. */
static void turned_pairs(const float *b, bf16 *out, int64_t rank, int64_t n, int64_t R) {
    __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    for (int64_t i = 0; i < n; i += 4, b += 4 * rank, out += 8)
        for (int64_t q = 0; q < R; q += GROUP) {
            __m512i pairs = _mm512_permutexvar_epi32(order, four_rows(b, rank, q));
            _mm_storeu_si128((__m128i *)(out + q * n), _mm512_castsi512_si128(pairs));
            _mm_storeu_si128((__m128i *)(out + (q + 2) * n), _mm512_extracti32x4_epi32(pairs, 1));
            _mm_storeu_si128((__m128i *)(out + (q + 4) * n), _mm512_extracti32x4_epi32(pairs, 2));
            _mm_storeu_si128((__m128i *)(out + (q + 6) * n), _mm512_extracti32x4_epi32(pairs, 3));
        }
}

/* out (n, rank) = s times the transpose of f (R, n), n a multiple of 4. */
static void turned_back(const float *f, float *out, int64_t rank, int64_t n, float s) {
    for (int64_t i = 0; i < n; i += 4, out += 4 * rank)
        for (int64_t q = 0; q < rank; q += 4) {
            __m128 rows[4];
            UNROLL for (int k = 0; k < 4; k++) rows[k] = _mm_mul_ps(_mm_loadu_ps(f + (q + k) * n + i), _mm_set1_ps(s));
            _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
            __mmask8 mask = (__mmask8)mask_of(min(rank - q, 4));
            UNROLL for (int k = 0; k < 4; k++) _mm_mask_storeu_ps(out + k * rank + q, mask, rows[k]);
        }
}

/* rows: room to lay out factors of each client; left, right: laid out; grad_a (clients, R, in), grad_b (clients, R, out). */
typedef struct {
    const bf16 *u, *dy, *z;
    bf16 *y, *to_z, *dz, *dx, *rows, *left, *right;
    const float *a, *b;
    float *grad_a, *grad_b, *da, *db;
    const int64_t *sizes;
    int64_t clients, rank, R, in, out, next_a, next_b, next_da, next_db;
    float s;
} operands;

static void lay_out(void *given, int64_t k) {
    const operands *d = given;
    laid_out(d->a + k * d->next_a, d->rows + k * d->R * d->in, d->left + k * d->R * d->in, d->rank, d->in, d->R, fours);
    turned_pairs(d->b + k * d->next_b, d->right + k * d->R * d->out, d->rank, d->out, d->R);
}

static void forward(void *given, int64_t item) {
    const operands *d = given;
    int64_t k, t, n = block_of(d->sizes, item, &k, &t), R = d->R;
    dot(d->u + t * d->in, d->left + k * R * d->in, d->to_z + t * R, n, d->in, R, 1);
    if (d->y) add(d->y + t * d->out, d->to_z + t * R, d->right + k * R * d->out, n, d->out, R, d->s);
}

/* Where w is null, y is added to. `form`: of W's transpose. */
int fedllm_low_rank(const bf16 *u, bf16 *y, bf16 *z, const float *a, const float *b, const int64_t *sizes,
                    int64_t clients, int64_t rank, int64_t in, int64_t out, int64_t next_a, int64_t next_b, float s,
                    const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *plus, int64_t form) {
    int64_t R = (rank + GROUP - 1) / GROUP * GROUP;
    operands d = {.u = u, .y = w ? NULL : y, .to_z = z, .a = a, .b = b, .sizes = sizes, .clients = clients, .rank = rank,
                  .R = R, .in = in, .out = out, .next_a = next_a, .next_b = next_b, .s = s};
    if (!(d.rows = malloc(clients * R * (2 * in + out) * sizeof *d.rows))) return OUT_OF_MEMORY;
    d.left = d.rows + clients * R * in, d.right = d.left + clients * R * in;
    in_parallel(lay_out, &d, clients);
    in_parallel(forward, &d, blocks_before(sizes, clients));
    own_part own = {z, d.right, sizes, R, s};
    int status = w ? product(x, (matrix){w, in, out, form, 0}, bias, plus, y, rows_before(sizes, clients), &own) : 0;
    free(d.rows);
    return status;
}

static void lay_out_back(void *given, int64_t k) {
    const operands *d = given;
    laid_out(d->a + k * d->next_a, d->rows + k * d->R * d->in, d->left + k * d->R * d->in, d->rank, d->in, d->R, pairs);
    turned_fours(d->b + k * d->next_b, d->right + k * d->R * d->out, d->rank, d->out, d->R);
}

static void backward(void *given, int64_t item) {
    const operands *d = given;
    int64_t k, t, n = block_of(d->sizes, item, &k, &t), R = d->R;
    dot(d->dy + t * d->out, d->right + k * R * d->out, d->dz + t * R, n, d->out, R, d->s);
    if (d->dx) add(d->dx + t * d->in, d->dz + t * R, d->left + k * R * d->in, n, d->in, R, 1);
}

static void gather_a(const operands *d, int64_t k, int64_t t, int64_t n, int64_t first, int64_t end) {
    gather(d->u + t * d->in, d->dz + t * d->R, d->grad_a + k * d->R * d->in, n, d->in, d->R, first, end);
}

static void gather_b(const operands *d, int64_t k, int64_t t, int64_t n, int64_t first, int64_t end) {
    gather(d->dy + t * d->out, d->z + t * d->R, d->grad_b + k * d->R * d->out, n, d->out, d->R, first, end);
}

/* A client's gradients, block by block, while the block is in the cache: for a thread alone. */
static void whole_client(void *given, int64_t k) {
    const operands *d = given;
    int64_t t = rows_before(d->sizes, k), end = t + d->sizes[k], item = blocks_before(d->sizes, k);
    for (; t < end; t += BLOCK, item++) {
        int64_t n = min(BLOCK, end - t);
        fetch(d->u + t * d->in, n * d->in);
        backward(given, item);
        if (d->db) gather_b(d, k, t, n, 0, d->out);
        if (d->da) gather_a(d, k, t, n, 0, d->in);
    }
}

/* Some columns of a client's gradients: those of A, then those of B. */
static void strip(void *given, int64_t item) {
    const operands *d = given;
    int64_t of_a = (d->in + STRIP - 1) / STRIP, all = of_a + (d->out + STRIP - 1) / STRIP, k = item / all;
    int64_t number = item % all, c = STRIP * (number < of_a ? number : number - of_a), first = rows_before(d->sizes, k);
    for (int64_t t = first; t < first + d->sizes[k]; t += BLOCK) {
        int64_t n = min(BLOCK, first + d->sizes[k] - t);
        if (number < of_a && d->da) gather_a(d, k, t, n, c, min(c + STRIP, d->in));
        if (number >= of_a && d->db) gather_b(d, k, t, n, c, min(c + STRIP, d->out));
    }
}

static void hand_over(void *given, int64_t k) {
    const operands *d = given;
    if (d->da) memcpy(d->da + k * d->next_da, d->grad_a + k * d->R * d->in, d->rank * d->in * sizeof *d->da);
    if (d->db) turned_back(d->grad_b + k * d->R * d->out, d->db + k * d->next_db, d->rank, d->out, d->s);
}

/* da and db may be null, and dx, which is written where w is there and else added to. `form`: of W. */
int fedllm_low_rank_backward(const bf16 *dy, const bf16 *u, const bf16 *z, bf16 *dx, const float *a, const float *b,
                          float *da, float *db, const int64_t *sizes, int64_t clients, int64_t rank, int64_t in,
                          int64_t out, int64_t next_a, int64_t next_b, int64_t next_da, int64_t next_db, float s,
                          const bf16 *w, const bf16 *plus, int64_t form) {
    int64_t R = (rank + GROUP - 1) / GROUP * GROUP;
    operands d = {.u = u, .dy = dy, .z = z, .dx = w ? NULL : dx, .a = a, .b = b, .da = da, .db = db, .sizes = sizes,
                  .clients = clients, .rank = rank, .R = R, .in = in, .out = out, .next_a = next_a, .next_b = next_b,
                  .next_da = next_da, .next_db = next_db, .s = s};
    int64_t T = rows_before(sizes, clients), strips = (in + STRIP - 1) / STRIP + (out + STRIP - 1) / STRIP;
    d.rows = malloc(R * (clients * (2 * in + out) + T) * sizeof *d.rows);
    d.grad_a = calloc(clients * R * (in + out), sizeof *d.grad_a);
    int status = d.rows && d.grad_a ? 0 : OUT_OF_MEMORY;
    if (!status) {
        d.left = d.rows + clients * R * in, d.right = d.left + clients * R * in, d.dz = d.right + clients * R * out;
        d.grad_b = d.grad_a + clients * R * in;
        in_parallel(lay_out_back, &d, clients);
        if (team_size() == 1)
            in_parallel(whole_client, &d, clients);
        else {
            in_parallel(backward, &d, blocks_before(sizes, clients));
            in_parallel(strip, &d, clients * strips);
        }
        in_parallel(hand_over, &d, clients);
        own_part own = {d.dz, d.left, sizes, R, 1};
        if (w && dx) status = product(dy, (matrix){w, out, in, form, 0}, NULL, plus, dx, T, &own);
    }
    free(d.grad_a);
    free(d.rows);
    return status;
}

#endif
