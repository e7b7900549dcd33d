/* A product with a frozen matrix in float, to which a product of each row's own client is added in the same sums.

       y_r = s z_r G_c + bias + plus_r + x_r W        c: the client of row r

   COLUMNS columns and DEPTH rows of W at a time, a panel, stay in the cache while rows of x pass: six of them make a
   tile whose sums never leave the registers. Each panel is added up by itself: one running sum over the words of a
   vocabulary would round ten times as much. A row's sums have one order, however W is given and whoever computes
   it. */

#include <stdlib.h>

#include "lanes.h"
#include "product_float.h"
#include "team.h"

#ifdef LANES

enum { DEPTH = 576 };

typedef struct {
    const float *x, *bias, *plus;
    float *y;
    int64_t rows, parts; /* parts: of the rows */
    matrix_float w;
    const own_float *own;
    const float **g; /* of each row's client */
    int *status;
} operands;

/* Rows of a part and columns of W that one item computes. `sofar`: their sums until W's next rows come. */
typedef struct {
    int64_t first, end, column, columns, from, depth;
    const float *panel;
    float *sofar;
} piece;

TILE begun(vec *sum, const operands *o, const piece *p, int64_t row, int rows) {
    const own_float *own = o->own;
    UNROLL for (int i = 0; i < rows * VECTORS; i++) sum[i] = all(0);
    if (own) {
        for (int64_t q = 0; q < own->order; q++)
            UNROLL for (int i = 0; i < rows; i++) {
                vec one = all(own->z[(row + i) * own->next + q]);
                const float *g = o->g[row + i] + q * o->w.n + p->column;
                UNROLL for (int v = 0; v < VECTORS; v++)
                    sum[i * VECTORS + v] += one * load_some(g + v * LANES, p->columns - v * LANES);
            }
        UNROLL for (int i = 0; i < rows * VECTORS; i++) sum[i] *= all(own->s);
    }
    UNROLL for (int v = 0; v < VECTORS; v++) {
        int64_t left = p->columns - v * LANES, at = p->column + v * LANES;
        if (o->bias)
            UNROLL for (int i = 0; i < rows; i++) sum[i * VECTORS + v] += load_some(o->bias + at, left);
        if (o->plus)
            UNROLL for (int i = 0; i < rows; i++)
                sum[i * VECTORS + v] += load_some(o->plus + (row + i) * o->w.n + at, left);
    }
}

TILE tile(const operands *o, const piece *p, int64_t row, int rows) {
    vec sum[ROWS * VECTORS];
    const float *x[ROWS];
    float *kept = p->sofar + (row - p->first) * COLUMNS;
    UNROLL for (int i = 0; i < rows; i++) x[i] = o->x + (row + i) * o->w.k + p->from;
    if (p->from)
        UNROLL for (int i = 0; i < rows * VECTORS; i++) sum[i] = all(0);
    else
        begun(sum, o, p, row, rows);
    multiplied(sum, x, 1, p->panel, COLUMNS, p->depth, rows, VECTORS);
    if (p->from)
        UNROLL for (int i = 0; i < rows * VECTORS; i++) sum[i] += load(kept + i * LANES);
    if (p->from + p->depth < o->w.k)
        UNROLL for (int i = 0; i < rows * VECTORS; i++) store(kept + i * LANES, sum[i]);
    else
        UNROLL for (int i = 0; i < rows; i++)
            UNROLL for (int v = 0; v < VECTORS; v++)
                store_some(o->y + (row + i) * o->w.n + p->column + v * LANES, sum[i * VECTORS + v],
                           p->columns - v * LANES);
}

/* A panel of W, (depth, COLUMNS); zeros behind the last column. */
static void laid_out(const matrix_float *w, int64_t column, int64_t columns, int64_t from, int64_t depth, float *out) {
    if (columns < COLUMNS) memset(out, 0, depth * COLUMNS * sizeof *out);
    if (w->form == PLAIN) {
        for (int64_t d = 0; d < depth; d++)
            memcpy(out + d * COLUMNS, w->values + (from + d) * w->n + column, columns * sizeof *out);
        return;
    }
    const float *rows = w->values + column * w->k + from;
    for (int64_t block = 0; block < depth; block += LANES)
        for (int64_t c = 0; c < columns; c++)
            for (int64_t d = block; d < min(block + LANES, depth); d++) out[d * COLUMNS + c] = rows[c * w->k + d];
}

/* Where a part begins: parts are whole tiles, for a row's last bits may depend on the height of its tile. */
static int64_t edge(const operands *o, int64_t part) {
    return part == o->parts ? o->rows : begin(o->rows / ROWS, part, o->parts) * ROWS;
}

static void item(void *given, int64_t number) {
    const operands *o = given;
    int64_t part = number % o->parts, column = number / o->parts * COLUMNS;
    piece p = {edge(o, part), edge(o, part + 1), column, min(COLUMNS, o->w.n - column), .from = 0};
    int ready = o->w.form == LAID_OUT;
    size_t sums = o->w.k > DEPTH ? (p.end - p.first) * COLUMNS : 0, panel = ready ? 0 : DEPTH * COLUMNS;
    float *room = aligned_alloc(64, (sums + panel + 16) / 16 * 16 * sizeof *room);
    if (!room) {
        *o->status = OUT_OF_MEMORY;
        return;
    }
    p.sofar = room + panel;
    do {
        p.depth = min(DEPTH, o->w.k - p.from), p.panel = room;
        if (ready)
            p.panel = o->w.values + column * o->w.k + p.from * COLUMNS;
        else
            laid_out(&o->w, column, p.columns, p.from, p.depth, room);
        for (int64_t row = p.first; row < p.end; row += ROWS) WITH_ROWS(p.end - row, tile, o, &p, row);
        p.from += p.depth;
    } while (p.from < o->w.k);
    free(room);
}

int product_float(const float *x, matrix_float w, const float *bias, const float *plus, float *y, int64_t rows,
                  const own_float *own) {
    int status = 0;
    operands o = {x, bias, plus, y, rows, 1, w, own, NULL, &status};
    int64_t panels = (w.n + COLUMNS - 1) / COLUMNS, items = team_size() > 1 ? 8 * team_size() : 1;
    o.parts = min(parts_of(rows, 4 * ROWS), (items + panels - 1) / panels);
    if (own) {
        if (!(o.g = malloc((rows + 1) * sizeof *o.g))) return OUT_OF_MEMORY;
        for (int64_t c = 0, row = 0; c < own->clients; c++)
            for (int64_t i = 0; i < own->sizes[c]; i++) o.g[row++] = own->g + c * own->next_g;
    }
    in_parallel(item, &o, panels * o.parts);
    free(o.g);
    return status;
}

int fedllm_product_float(const float *x, const float *w, const float *bias, const float *plus, float *y, int64_t rows,
                         int64_t k, int64_t n, int64_t form, int64_t few) {
    (void)few; /* zeros are multiplied as other numbers are */
    return product_float(x, (matrix_float){w, k, n, form}, bias, plus, y, rows, NULL);
}

/* W, plain or turned, panel by panel: k times n up to the next multiple of COLUMNS. */
int fedllm_laid_out_float(const float *values, float *out, int64_t k, int64_t n, int64_t form) {
    matrix_float w = {values, k, n, form};
    for (int64_t column = 0; column < n; column += COLUMNS, out += COLUMNS * k)
        laid_out(&w, column, min(COLUMNS, n - column), 0, k, out);
    return 0;
}

#endif
