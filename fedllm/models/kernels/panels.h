/* W of a product, some of its columns and rows at a time, laid out as tiles of sums read it. */

#ifndef FEDLLM_PANELS_H
#define FEDLLM_PANELS_H

#include "product.h"
#include "tiles.h"

#ifdef TILES

enum { ROWS = 6, VECTORS = 4, WIDTH = 16, COLUMNS = VECTORS * WIDTH, DEPTH = 768 }; /* DEPTH: rows of W at a time */

/* Columns of W from `column` on and its rows from `from` on, as many as are computed with at a time, in pairs. */
typedef struct {
    int64_t column, columns, from, depth;
    const bf16 *pairs;
} panel;

/* 16 rows of 16 pairs, to 16 rows of COLUMNS pairs: the i-th pair of each makes the i-th row. */
TILE transposed(__m512i *a, bf16 *out) {
    __m512i b[WIDTH];
    UNROLL for (int i = 0; i < WIDTH; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < WIDTH; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]), a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]), a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
        b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
        b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        _mm512_storeu_si512(out + 2 * i * COLUMNS, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
        _mm512_storeu_si512(out + 2 * (8 + i) * COLUMNS, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    }
}

/* Numbers of k that whole vectors hold. */
static int64_t in_vectors(int64_t k) { return (k + 2 * WIDTH - 1) / (2 * WIDTH) * 2 * WIDTH; }

/* `columns` rows of W (n, k), as columns of pairs; `depth` numbers of each. */
static void rows_laid_out(const bf16 *w, int64_t next, int64_t depth, int64_t columns, bf16 *out) {
    for (int64_t d = 0; d < depth; d += 2 * WIDTH)
        for (int64_t c = 0; c < COLUMNS; c += WIDTH) {
            __m512i rows[WIDTH];
            __mmask32 mask = mask_of(depth - d);
            UNROLL for (int i = 0; i < WIDTH; i++) {
                int there = c + i < columns;
                rows[i] = (__m512i)words(there ? w + (c + i) * next + d : w, there ? mask : 0);
            }
            transposed(rows, out + d * COLUMNS + 2 * c);
        }
}

/* `columns` columns of W (k, n), its rows in pairs. */
static void columns_laid_out(const bf16 *w, int64_t next, int64_t depth, int64_t columns, bf16 *out) {
    __m512i pairs = side_by_side();
    for (int64_t d = 0; d < depth; d += 2, w += 2 * next)
        for (int64_t c = 0; c < COLUMNS; c += WIDTH, out += 2 * WIDTH) {
            __mmask16 mask = half_of(columns - c);
            __m512i one = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, w + c));
            __m512i two = _mm512_castsi256_si512(_mm256_maskz_loadu_epi16(mask, w + next + c));
            _mm512_storeu_si512(out, _mm512_permutex2var_epi16(one, pairs, two));
        }
}

/* A panel in room of its own; as it lies there, where W is laid out. */
static const bf16 *laid_out(const matrix *w, const panel *f, bf16 *room) {
    if (w->form == LAID_OUT) return w->values + f->column * in_vectors(w->k) + f->from * COLUMNS;
    if (w->form == TURNED)
        rows_laid_out(w->values + f->column * w->k + f->from, w->k, f->depth, f->columns, room);
    else
        columns_laid_out(w->values + f->from * w->n + f->column, w->n, f->depth, f->columns, room);
    return room;
}

/* The panel at `column` and `from`. */
static panel cut(const matrix *w, int64_t column, int64_t from) {
    return (panel){column, min(COLUMNS, w->n - column), from, min(DEPTH, w->k - from), NULL};
}

#endif
#endif
