/* The rows of K clients, one after another, in blocks of BLOCK rows that hold rows of one client each. `sizes`: rows of
   each client. BLOCK is the including file's. */

/* Rows before client k's. */
static int64_t rows_before(const int64_t *sizes, int64_t k) {
    int64_t sum = 0;
    for (int64_t c = 0; c < k; c++) sum += sizes[c];
    return sum;
}

/* Blocks before client k's; with k the number of clients, all there are. */
static int64_t blocks_before(const int64_t *sizes, int64_t k) {
    int64_t sum = 0;
    for (int64_t c = 0; c < k; c++) sum += (sizes[c] + BLOCK - 1) / BLOCK;
    return sum;
}

/* The client of a block, and the block's first row; how many it has. */
static int64_t block_of(const int64_t *sizes, int64_t item, int64_t *client, int64_t *row) {
    int64_t k = 0, at = 0, count;
    for (; item >= (count = (sizes[k] + BLOCK - 1) / BLOCK); k++) item -= count, at += sizes[k];
    *client = k, *row = at + item * BLOCK;
    return min(BLOCK, sizes[k] - item * BLOCK);
}
