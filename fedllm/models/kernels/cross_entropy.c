/* Cross entropy over the vocabulary, and its gradient in the place of the logits. */

#include <math.h>
#include <stdlib.h>

#include "team.h"
#include "tiles.h"

enum { FINENESS = 1 << 18 };

#ifdef TILES

enum { WIDTH = 16 };

static float largest(const bf16 *x, int64_t n) {
    __m512 most = all(-INFINITY);
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        most = _mm512_mask_max_ps(most, mask, widened(x + i, mask), most); /* a NaN is passed over */
    }
    return _mm512_reduce_max_ps(most);
}

static float powers(const bf16 *x, int64_t n, float most, float *kept) {
    __m512 sum = all(0);
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 power = exponentials(_mm512_sub_ps(widened(x + i, mask), all(most)));
        _mm512_mask_storeu_ps(kept + i, mask, power);
        sum = _mm512_mask_add_ps(sum, mask, sum, power);
    }
    return _mm512_reduce_add_ps(sum);
}

static float shares(const float *kept, int64_t n, float share, float least, bf16 *x) {
    __m512 left = all(0);
    for (int64_t i = 0; i < n; i += WIDTH) {
        __mmask16 mask = half_of(n - i);
        __m512 power = _mm512_maskz_loadu_ps(mask, kept + i);
        __mmask16 small = _mm512_mask_cmp_ps_mask(mask, power, all(least), _CMP_LT_OQ);
        left = _mm512_mask_add_ps(left, small, left, power);
        __m512 found = _mm512_maskz_mul_ps((__mmask16)~small, power, all(share));
        _mm256_mask_storeu_epi16(x + i, mask, (__m256i)_mm512_cvtneps_pbh(found));
    }
    return _mm512_reduce_add_ps(left);
}

#else

static float largest(const num *x, int64_t n) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < n; i++) most = wide_num(x[i]) > most ? wide_num(x[i]) : most;
    return most;
}

static float powers(const num *x, int64_t n, float most, float *kept) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += kept[i] = exponential(wide_num(x[i]) - most);
    return sum;
}

static float shares(const float *kept, int64_t n, float share, float least, num *x) {
    float left = 0;
#pragma omp simd reduction(+ : left)
    for (int64_t i = 0; i < n; i++) {
        int small = kept[i] < least;
        left += small ? kept[i] : 0;
        x[i] = small ? 0 : narrow_num(kept[i] * share);
    }
    return left;
}

#endif

/* (rows, n) logits to softmax - onehot(target), and losses logsumexp - logit[target].

   With `rest` a row's probabilities below (1 - probability[target]) / FINENESS become zero, and their sum is in rest. */
typedef struct {
    num *x;
    const int64_t *targets;
    float *losses, *rest, *kept; /* kept: (parts, n) */
    int64_t rows, n, parts;
} entropy;

static void rows_of(void *given, int64_t part) {
    const entropy *d = given;
    int64_t n = d->n;
    float *kept = d->kept + part * n;
    for (int64_t row = begin(d->rows, part, d->parts); row < begin(d->rows, part + 1, d->parts); row++) {
        num *x = d->x + row * n;
        int64_t target = d->targets[row];
        float most = largest(x, n), picked = wide_num(x[target]), sum = powers(x, n, most, kept), own = kept[target];
        float least = d->rest ? (sum - own) / FINENESS : 0, left = shares(kept, n, 1 / sum, least, x);
        x[target] = narrow_num(own / sum - 1);
        d->losses[row] = most + logf(sum) - picked;
        if (d->rest) d->rest[row] = (own < least ? left - own : left) / sum;
    }
}

int KERNEL(fedllm_cross_entropy)(num *x, const int64_t *targets, float *losses, float *rest, int64_t rows, int64_t n) {
    for (int64_t row = 0; row < rows; row++)
        if (targets[row] < 0 || targets[row] >= n) return OUT_OF_RANGE;
    entropy d = {x, targets, losses, rest, NULL, rows, n, parts_of(rows, 1)};
    if (!(d.kept = malloc(d.parts * n * sizeof *d.kept))) return OUT_OF_MEMORY;
    in_parallel(rows_of, &d, d.parts);
    free(d.kept);
    return 0;
}
