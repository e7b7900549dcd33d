/* A product with a frozen matrix in float, to which a product of each row's own client is added in the same sums. */

#ifndef FEDLLM_PRODUCT_FLOAT_H
#define FEDLLM_PRODUCT_FLOAT_H

#include "product.h"

/* s z_r G_c for the rows r of client c, sizes[c] of them: z (rows, .) in rows of `next`, `order` numbers of each;
   G_c (order, n) at g + c * next_g. */
typedef struct {
    const float *z, *g;
    const int64_t *sizes;
    int64_t clients, order, next, next_g;
    float s;
} own_float;

/* W (k, n), in a form of product.h. */
typedef struct {
    const float *values;
    int64_t k, n, form;
} matrix_float;

/* y (rows, n) = plus + x (rows, k) W + bias + the clients' own. bias, plus (rows, n) and own may be null, and plus y. */
int product_float(const float *x, matrix_float w, const float *bias, const float *plus, float *y, int64_t rows,
                  const own_float *own);

#endif
