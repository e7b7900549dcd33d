/* Cross entropy over the vocabulary, and its slope in the place of the logits. */

#include <math.h>
#include <stdlib.h>

#include "bf16.h"

enum { FINENESS = 1 << 18 };

/* (rows, n) logits to softmax - onehot(target), and losses logsumexp - logit[target].

   With `rest` a row's probabilities below (1 - probability[target]) / FINENESS become zero, and their sum is in rest. */
int fedllm_cross_entropy(bf16 *restrict x, const int64_t *targets, float *restrict losses, float *restrict rest,
                         int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] < 0 || targets[row] >= n) return OUT_OF_RANGE;
    float *kept = malloc(n * sizeof *kept);
    if (!kept) return OUT_OF_MEMORY;
    for (int64_t row = 0; row < rows; row++, x += n) {
        int64_t target = targets[row];
        float most = -INFINITY, picked = wide(x[target]), sum = 0, left = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; i++) most = wide(x[i]) > most ? wide(x[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += kept[i] = exponential(wide(x[i]) - most);
        float share = 1 / sum, least = rest ? (sum - kept[target]) / FINENESS : 0, own = kept[target];
#pragma omp simd reduction(+ : left)
        for (int64_t i = 0; i < n; i++) {
            int small = kept[i] < least;
            left += small ? kept[i] : 0;
            x[i] = small ? 0 : narrow(kept[i] * share);
        }
        x[target] = narrow(own * share - 1);
        losses[row] = most + logf(sum) - picked;
        if (rest) rest[row] = (own < least ? left - own : left) * share;
    }
    free(kept);
    return 0;
}
