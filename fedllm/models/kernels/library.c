/* What this library has. */

#include "tiles.h"

int fedllm_has_tiles(void) {
#ifdef TILES
    return 1;
#else
    return 0;
#endif
}

/* Whether their products with frozen matrices are faster than others': not where the processor multiplies whole tiles. */
int fedllm_has_products(void) {
#if defined(TILES) && !defined(__AMX_BF16__)
    return 1;
#else
    return 0;
#endif
}
