/* The pairs of numbers that are not zero in all rows of a tile: what is left to be multiplied where most are zero.

   Of a panel's pairs that count, those of the tile's first row, ..., those of its last one, then where they lie in the
   panel; tile by tile and panel by panel. A row has the sums that it has with all pairs: what is left out adds zero. */

#ifndef FEDLLM_FEW_H
#define FEDLLM_FEW_H

#include <stdlib.h>

#include "panels.h"

#ifdef TILES

enum { AHEAD = 12, LINE = 64 }; /* pairs whose rows of W are fetched beforehand; bytes of a line of the cache */

/* starts: where each tile's and panel's begin in `values`; size: numbers that there is room for. */
typedef struct {
    int32_t *values;
    int64_t *starts, panels, used, size;
} few;

static int64_t pairs_of(const few *p, int64_t t, int64_t panel, const int32_t **values) {
    const int64_t *start = p->starts + t * p->panels + panel;
    *values = p->values + start[0];
    return (start[1] - start[0]) / (ROWS + 1);
}

/* Those of `depth` numbers of each row x; gives how many. `out` has room for all, and for one vector more. */
static int64_t gathered(const bf16 *const *x, int64_t depth, int32_t *out) {
    __mmask16 any[DEPTH / (2 * WIDTH)] = {0};
    int64_t count = 0, vectors = (depth + 2 * WIDTH - 1) / (2 * WIDTH);
    for (int64_t v = 0; v < vectors; v++) {
        for (int i = 0; i < ROWS; i++) {
            __m512i both = (__m512i)words(x[i] + 2 * WIDTH * v, mask_of(depth - 2 * WIDTH * v));
            any[v] |= _mm512_test_epi32_mask(both, both);
        }
        count += __builtin_popcount(any[v]);
    }
    __m512i place = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    for (int i = 0; i <= ROWS; i++) {
        int32_t *row = out + i * count; /* what is written beyond its end, the next one writes again */
        for (int64_t v = 0; v < vectors; v++) {
            __m512i both = i < ROWS ? (__m512i)words(x[i] + 2 * WIDTH * v, mask_of(depth - 2 * WIDTH * v))
                                    : _mm512_add_epi32(place, _mm512_set1_epi32(WIDTH * v));
            _mm512_storeu_si512(row, _mm512_maskz_compress_epi32(any[v], both));
            row += __builtin_popcount(any[v]);
        }
    }
    return count;
}

/* The next tile's in the panel from `from` on; tiles and their panels come in order. */
static int add(few *p, const bf16 *const *x, int64_t depth) {
    int64_t most = (ROWS + 1) * DEPTH / 2 + WIDTH;
    if (p->used + most > p->size) {
        int32_t *more = realloc(p->values, (p->size = 2 * p->size + most) * sizeof *more);
        if (!more) return OUT_OF_MEMORY;
        p->values = more;
    }
    p->used += (ROWS + 1) * gathered(x, depth, p->values + p->used);
    return 0;
}

/* sum += x F of `count` pairs of each row. */
TILE summed_few(__m512 *sum, const int32_t *x, int64_t count, const bf16 *f) {
    const int32_t *places = x + ROWS * count;
    for (int64_t t = 0; t < count; t++, x++) {
        const bf16 *next = f + 2 * COLUMNS * places[min(t + AHEAD, count - 1)], *own = f + 2 * COLUMNS * places[t];
        UNROLL for (int j = 0; j < VECTORS; j++) _mm_prefetch(next + 2 * WIDTH * j, _MM_HINT_T0);
        __m512bh factor[VECTORS];
        UNROLL for (int j = 0; j < VECTORS; j++) factor[j] = words(own + 2 * WIDTH * j, ~0u);
        UNROLL for (int i = 0; i < ROWS; i++) {
            __m512bh both = (__m512bh)_mm512_set1_epi32(x[i * count]);
            UNROLL for (int j = 0; j < VECTORS; j++)
                sum[i * VECTORS + j] = _mm512_dpbf16_ps(sum[i * VECTORS + j], both, factor[j]);
        }
    }
}

/* The t-th of so many parts of the panel behind this one, into the larger cache: there is less to compute with each
   panel than it takes to come from memory. */
static void fetch_next(const panel *f, int64_t t, int64_t parts) {
    int64_t bytes = f->depth * COLUMNS * sizeof *f->pairs;
    const char *next = (const char *)(f->pairs + f->depth * COLUMNS);
    for (int64_t at = t * bytes / parts / LINE; at < (t + 1) * bytes / parts / LINE; at++)
        _mm_prefetch(next + LINE * at, _MM_HINT_T1);
}

#endif
#endif
