/* What this library has. */

#include "tiles.h"

int fedllm_has_tiles(void) {
#ifdef TILES
    return 1;
#else
    return 0;
#endif
}
