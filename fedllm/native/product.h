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

/* y (rows, n) = x (rows, k) W + bias + the clients' own. W is (k, n), or (n, k) if it is turned; k is even; bias may be
   null. */
int product(const bf16 *x, const bf16 *w, const bf16 *bias, bf16 *y, int64_t rows, int64_t k, int64_t n, int turned,
            const own_part *own);

#endif
