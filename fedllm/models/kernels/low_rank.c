/* What low-rank adapters of several clients add to a frozen product, and its gradients. Rows lie client by client.

       y += s z B_k^T   z = u A_k^T        dz = s dy B_k   dx += dz A_k   dA_k = dz^T u   dB_k = s dy^T z

   u (T, in), y (T, out), z (T, R) in 16 bits; A_k (rank, in), B_k (out, rank) and their gradients in float. R is the rank,
   up to the next multiple of 8. Where the frozen matrix is given, its product is computed with it: y = plus + x W^T +
   bias + s z B_k^T, dx = plus + dy W + dz A_k. Each client's rows are taken in blocks that stay in the cache, from one product to the
   next. A product of two numbers of 16 bits is exact in float, in which all sums are made. */

#include <stdlib.h>

#include "product.h"
#include "tiles.h"

#ifdef TILES

enum { GROUP = 8, ROWS = 8, BLOCK = 32 }; /* ranks and rows of a tile, rows of a block */

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

/* An odd last row is paired with itself, times zero. */
static void gather(const bf16 *x, const bf16 *z, float *f, int64_t rows, int64_t n, int64_t R) {
    bf16 two[BLOCK * GROUP]; /* ranks of two rows */
    for (int64_t q = 0; q < R; q += GROUP) {
        for (int64_t t = 0; t < rows + rows % 2; t++)
            for (int k = 0; k < GROUP; k++) two[(t / 2 * GROUP + k) * 2 + t % 2] = t < rows ? z[t * R + q + k] : 0;
        for (int64_t c = 0; c < n; c += 32) gather_tile(x + c, two, f + q * n + c, rows, n, mask_of(n - c));
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

static int64_t total(const int64_t *sizes, int64_t clients) {
    int64_t sum = 0;
    for (int64_t k = 0; k < clients; k++) sum += sizes[k];
    return sum;
}

/* Where w is null, y is added to. `form`: of W's transpose. */
int fedllm_low_rank(const bf16 *u, bf16 *y, bf16 *z, const float *a, const float *b, const int64_t *sizes,
                    int64_t clients, int64_t rank, int64_t in, int64_t out, int64_t next_a, int64_t next_b, float s,
                    const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *plus, int64_t form) {
    int64_t R = (rank + GROUP - 1) / GROUP * GROUP;
    bf16 *rows = malloc(R * (2 * in + clients * out) * sizeof *rows);
    bf16 *left = rows + R * in, *right = left + R * in;
    int status = rows ? 0 : OUT_OF_MEMORY;
    const bf16 *own_u = u, *pairs_of = right;
    bf16 *own_z = z;
    for (int64_t k = 0; k < clients && !status; k++, a += next_a, b += next_b, pairs_of += R * out) {
        laid_out(a, rows, left, rank, in, R, fours);
        turned_pairs(b, right + k * R * out, rank, out, R);
        for (int64_t t = 0; t < sizes[k]; t += BLOCK) {
            int64_t n = min(BLOCK, sizes[k] - t);
            dot(own_u, left, own_z, n, in, R, 1);
            if (!w) add(y, own_z, pairs_of, n, out, R, s), y += n * out;
            own_u += n * in, own_z += n * R;
        }
    }
    own_part own = {z, right, sizes, R, s};
    if (w && !status) status = product(x, (matrix){w, in, out, form, 0}, bias, plus, y, total(sizes, clients), &own);
    free(rows);
    return status;
}

/* da and db may be null, and dx, which is written where w is there and else added to. `form`: of W. */
int fedllm_low_rank_backward(const bf16 *dy, const bf16 *u, const bf16 *z, bf16 *dx, const float *a, const float *b,
                          float *da, float *db, const int64_t *sizes, int64_t clients, int64_t rank, int64_t in,
                          int64_t out, int64_t next_a, int64_t next_b, int64_t next_da, int64_t next_db, float s,
                          const bf16 *w, const bf16 *plus, int64_t form) {
    int64_t R = (rank + GROUP - 1) / GROUP * GROUP, T = total(sizes, clients);
    bf16 *rows = malloc(R * (in + clients * in + out + T) * sizeof *rows);
    bf16 *left = rows + R * in, *right = left + clients * R * in, *dz = right + R * out;
    float *grad_a = malloc(R * (in + out) * sizeof *grad_a), *grad_b = grad_a + R * in;
    int status = rows && grad_a ? 0 : OUT_OF_MEMORY;
    const bf16 *own_dy = dy, *pairs_of = left;
    bf16 *own_dz = dz, *own_dx = dx;
    for (int64_t k = 0; k < clients && !status; k++, a += next_a, b += next_b, pairs_of += R * in) {
        laid_out(a, rows, left + k * R * in, rank, in, R, pairs);
        turned_fours(b, right, rank, out, R);
        memset(grad_a, 0, R * (in + out) * sizeof *grad_a);
        for (int64_t t = 0; t < sizes[k]; t += BLOCK) {
            int64_t n = min(BLOCK, sizes[k] - t);
            fetch(u, n * in);
            dot(own_dy, right, own_dz, n, out, R, s);
            if (db) gather(own_dy, z, grad_b, n, out, R);
            if (da) gather(u, own_dz, grad_a, n, in, R);
            if (dx && !w) add(own_dx, own_dz, pairs_of, n, in, R, 1), own_dx += n * in;
            own_dy += n * out, u += n * in, z += n * R, own_dz += n * R;
        }
        if (da) memcpy(da, grad_a, rank * in * sizeof *da), da += next_da;
        if (db) turned_back(grad_b, db, rank, out, s), db += next_db;
    }
    own_part own = {dz, left, sizes, R, 1};
    if (w && dx && !status) status = product(dy, (matrix){w, out, in, form, 0}, NULL, plus, dx, T, &own);
    free(grad_a);
    free(rows);
    return status;
}

#endif
