/* A product with a frozen matrix, to which a product of each row's own client is added in the same sums. */

#ifndef FEDLLM_PRODUCT_H
#define FEDLLM_PRODUCT_H

#include "bf16.h"

/* s z_r G_c for the rows r of client c, sizes[c] of them: z (rows, order), G_c the c-th of pairs (order / 2, n, 2). */
typedef struct {
    const bf16 *z, *pairs;
    const int64_t *sizes;
    int64_t order;
    float s;
} own_part;

/* W (k, n), k even: as it is, its transpose (n, k), or laid out by `fedllm_laid_out`. few: whether most of what it is
   multiplied by is zero. */
enum { PLAIN, TURNED, LAID_OUT };

typedef struct {
    const bf16 *values;
    int64_t k, n, form, few;
} matrix;

/* y (rows, n) = plus + x (rows, k) W + bias + the clients' own. bias, plus (rows, n) and own may be null. */
int product(const bf16 *x, matrix w, const bf16 *bias, const bf16 *plus, bf16 *y, int64_t rows, const own_part *own);

#endif
