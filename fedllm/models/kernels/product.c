/* A product with a frozen matrix, to which a product of each row's own client is added in the same sums.

       y_r = s z_r G_c + bias + plus_r + x_r W        c: the client of row r

   64 columns of W at a time are laid out in pairs of its rows, (k / 2, 64, 2), which stay in the cache while all rows of
   x pass: six rows make a tile of 24 vectors of sums, which never leave the registers, and each number of x that is read
   is multiplied by four vectors. A row's sums have one order, whatever the other rows are, and however W is given. */

#include <stdlib.h>

#include "nonzero_pairs.h"
#include "panels.h"
#include "team.h"

#ifdef TILES

/* Sums of a tile. */
typedef __m512 sums[ROWS * VECTORS];

typedef struct {
    const bf16 *x, *bias, *plus;
    bf16 *y;
    int64_t rows;
    matrix w;
    const own_part *own;
    const bf16 **g; /* of each row's client */
    const few *few; /* null: all pairs */
    int64_t tiles, parts; /* parts: of the tiles */
    int *status;
} operands;

/* Where rows of a tile lie: x from the panel's first row of W on, y and G from its first column on. */
typedef struct {
    const bf16 *x[ROWS], *z[ROWS], *g[ROWS], *plus[ROWS];
    bf16 *y[ROWS];
} places;

/* sum = s z G + bias + plus. Rows of one client, as those of nearly all tiles are, have one G. */
TILE begun(__m512 *sum, const places *at, const own_part *own, const bf16 *bias, int64_t n, int64_t columns) {
    __mmask32 masks[VECTORS];
    UNROLL for (int j = 0; j < VECTORS; j++)
        masks[j] = columns > WIDTH * j ? mask_of(2 * (columns - WIDTH * j)) : 0;
    UNROLL for (int i = 0; i < ROWS * VECTORS; i++) sum[i] = _mm512_setzero_ps();
    if (own && at->g[0] == at->g[ROWS - 1])
        for (int64_t q = 0; q < own->order; q += 2) {
            __m512bh g[VECTORS];
            UNROLL for (int j = 0; j < VECTORS; j++) g[j] = words(at->g[0] + q * n + 2 * WIDTH * j, masks[j]);
            UNROLL for (int i = 0; i < ROWS; i++) {
                __m512bh both = pair(at->z[i] + q);
                UNROLL for (int j = 0; j < VECTORS; j++)
                    sum[i * VECTORS + j] = _mm512_dpbf16_ps(sum[i * VECTORS + j], both, g[j]);
            }
        }
    else
        for (int64_t q = 0; own && q < own->order; q += 2)
            UNROLL for (int i = 0; i < ROWS; i++) {
                __m512bh both = pair(at->z[i] + q);
                UNROLL for (int j = 0; j < VECTORS; j++) {
                    __m512bh g = words(at->g[i] + q * n + 2 * WIDTH * j, masks[j]);
                    sum[i * VECTORS + j] = _mm512_dpbf16_ps(sum[i * VECTORS + j], both, g);
                }
            }
    UNROLL for (int i = 0; own && i < ROWS * VECTORS; i++) sum[i] = _mm512_mul_ps(sum[i], _mm512_set1_ps(own->s));
    UNROLL for (int j = 0; bias && j < VECTORS; j++) {
        __m512 wider = widened(bias + WIDTH * j, half_of(columns - WIDTH * j));
        UNROLL for (int i = 0; i < ROWS; i++) sum[i * VECTORS + j] = _mm512_add_ps(sum[i * VECTORS + j], wider);
    }
    if (at->plus[0])
        UNROLL for (int i = 0; i < ROWS; i++)
            UNROLL for (int j = 0; j < VECTORS; j++) {
                __m512 wider = widened(at->plus[i] + WIDTH * j, half_of(columns - WIDTH * j));
                sum[i * VECTORS + j] = _mm512_add_ps(sum[i * VECTORS + j], wider);
            }
}

/* sum += x F, F (steps, COLUMNS, 2). */
TILE summed(__m512 *sum, const places *at, const bf16 *f, int64_t steps) {
    for (int64_t t = 0; t < steps; t++, f += 2 * COLUMNS) {
        __m512bh factor[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) factor[j] = words(f + 2 * WIDTH * j, ~0u);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512bh both = pair(at->x[i] + 2 * t);
            UNROLL for (int j = 0; j < VECTORS; j++)
                sum[i * VECTORS + j] = _mm512_dpbf16_ps(sum[i * VECTORS + j], both, factor[j]);
        }
    }
}

TILE written(const __m512 *sum, const places *at, int64_t columns) {
    UNROLL for (int i = 0; i < ROWS; i++)
        UNROLL for (int j = 0; j < VECTORS; j++)
            _mm256_mask_storeu_epi16(at->y[i] + WIDTH * j, half_of(columns - WIDTH * j),
                                     (__m256i)_mm512_cvtneps_pbh(sum[i * VECTORS + j]));
}

/* Rows of the t-th tile. The last one has rows again that the one before it had, or its last row several times. */
static places placed(const operands *o, const panel *f, int64_t t) {
    places at = {0};
    int64_t end = min((t + 1) * ROWS, o->rows), first = end > ROWS ? end - ROWS : 0;
    for (int i = 0; i < ROWS; i++) {
        int64_t row = min(first + i, end - 1);
        at.x[i] = o->x + row * o->w.k + f->from, at.y[i] = o->y + row * o->w.n + f->column;
        if (o->plus) at.plus[i] = o->plus + row * o->w.n + f->column;
        if (!o->own) continue;
        at.z[i] = o->own->z + row * o->own->order;
        at.g[i] = o->g[row] + 2 * f->column;
    }
    return at;
}

/* The t-th tile's part of a product, added to what it has so far. */
static void tile(const operands *o, const panel *f, int64_t t, __m512 *sofar) {
    places at = placed(o, f, t);
    sums sum;
    if (f->from)
        UNROLL for (int i = 0; i < ROWS * VECTORS; i++) sum[i] = sofar[i];
    else
        begun(sum, &at, o->own, o->bias ? o->bias + f->column : NULL, o->w.n, f->columns);
    if (o->few) {
        const int32_t *values;
        int64_t count = pairs_of(o->few, t, f->from / DEPTH, &values);
        summed_few(sum, values, count, f->pairs);
    } else
        summed(sum, &at, f->pairs, f->depth / 2);
    if (f->from + f->depth == o->w.k)
        written(sum, &at, f->columns);
    else
        UNROLL for (int i = 0; i < ROWS * VECTORS; i++) sofar[i] = sum[i];
}

/* Of all tiles, where only pairs that are not zero are to be multiplied. */
static int few_of(few *p, const operands *o, int64_t tiles) {
    p->panels = (o->w.k + DEPTH - 1) / DEPTH;
    p->starts = malloc((tiles * p->panels + 1) * sizeof *p->starts);
    if (!p->starts) return OUT_OF_MEMORY;
    for (int64_t t = 0, at = 0; t < tiles; t++)
        for (int64_t from = 0; from < o->w.k; from += DEPTH) {
            panel f = cut(&o->w, 0, from);
            places rows = placed(o, &f, t);
            p->starts[at++] = p->used;
            if (add(p, rows.x, f.depth)) return OUT_OF_MEMORY;
        }
    p->starts[tiles * p->panels] = p->used;
    return 0;
}

/* 64 columns of some tiles. */
static void item(void *given, int64_t number) {
    const operands *o = given;
    int64_t part = number % o->parts, column = number / o->parts * COLUMNS;
    int64_t first = begin(o->tiles, part, o->parts), end = begin(o->tiles, part + 1, o->parts);
    bf16 *room = o->w.form == LAID_OUT ? NULL : aligned_alloc(64, DEPTH * COLUMNS * sizeof *room);
    sums *sofar = aligned_alloc(64, (o->w.k > DEPTH ? end - first + 1 : 1) * sizeof *sofar); /* until W's next rows come */
    int ready = (room || o->w.form == LAID_OUT) && sofar;
    if (!ready) *o->status = OUT_OF_MEMORY;
    for (int64_t from = 0; from < o->w.k && ready; from += DEPTH) {
        panel f = cut(&o->w, column, from);
        f.pairs = laid_out(&o->w, &f, room);
        for (int64_t t = first; t < end; t++) {
            if (o->w.few && o->w.form == LAID_OUT) fetch_next(&f, t - first, end - first);
            tile(o, &f, t, sofar[o->w.k > DEPTH ? t - first : 0]);
        }
    }
    free(sofar);
    free(room);
}

int product(const bf16 *x, matrix w, const bf16 *bias, const bf16 *plus, bf16 *y, int64_t rows, const own_part *own) {
    int64_t tiles = (rows + ROWS - 1) / ROWS, columns = (w.n + COLUMNS - 1) / COLUMNS;
    int status = 0;
    operands o = {x, bias, plus, y, rows, w, own, malloc((rows + 1) * sizeof *o.g), NULL, tiles, 1, &status};
    if (!o.g) return OUT_OF_MEMORY;
    if (team_size() > 1) o.parts = min(parts_of(tiles, 4), (8 * team_size() + columns - 1) / columns);
    for (int64_t c = 0, row = 0; own && row < rows && !status; c++)
        for (int64_t i = 0; i < own->sizes[c]; i++) o.g[row++] = own->pairs + c * own->order * w.n;
    few pairs = {0};
    if (w.few && !status) status = few_of(&pairs, &o, tiles), o.few = &pairs;
    if (!status) in_parallel(item, &o, columns * o.parts);
    free(pairs.starts);
    free(pairs.values);
    free(o.g);
    return status;
}

int fedllm_product(const bf16 *x, const bf16 *w, const bf16 *bias, const bf16 *plus, bf16 *y, int64_t rows, int64_t k,
                   int64_t n, int64_t form, int64_t few) {
    return product(x, (matrix){w, k, n, form, few}, bias, plus, y, rows, NULL);
}

/* W, plain or turned, panel by panel: k up to the next multiple of 32 times n up to the next multiple of 64. */
int fedllm_laid_out(const bf16 *values, bf16 *out, int64_t k, int64_t n, int64_t form) {
    matrix w = {values, k, n, form, 0};
    for (int64_t column = 0; column < n; column += COLUMNS, out += COLUMNS * in_vectors(k))
        for (int64_t from = 0; from < k; from += DEPTH) {
            panel f = cut(&w, column, from);
            laid_out(&w, &f, out + from * COLUMNS);
        }
    return 0;
}

#endif
