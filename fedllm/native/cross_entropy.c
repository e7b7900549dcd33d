/* Cross entropy over the vocabulary, and its slope in the place of the logits. */

#include <math.h>
#include <stdlib.h>

#include "bf16.h"

/* (rows, n) logits to softmax - onehot(target), and losses logsumexp - logit[target]. */
int fedllm_cross_entropy(bf16 *restrict x, const int64_t *targets, float *restrict losses, int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] < 0 || targets[row] >= n) return OUT_OF_RANGE;
    float *kept = malloc(n * sizeof *kept);
    if (!kept) return OUT_OF_MEMORY;
    for (int64_t row = 0; row < rows; row++, x += n) {
        float most = -INFINITY, picked = wide(x[targets[row]]), sum = 0;
#pragma omp simd reduction(max : most)
        for (int64_t i = 0; i < n; i++) most = wide(x[i]) > most ? wide(x[i]) : most;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < n; i++) sum += kept[i] = exponential(wide(x[i]) - most);
        float share = 1 / sum;
        for (int64_t i = 0; i < n; i++) x[i] = narrow(kept[i] * share);
        x[targets[row]] = narrow(kept[targets[row]] * share - 1);
        losses[row] = most + logf(sum) - picked;
    }
    free(kept);
    return 0;
}
