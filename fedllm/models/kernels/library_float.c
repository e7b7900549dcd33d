/* What this library has for numbers in float. */

#include "lanes.h"

int fedllm_has_floats(void) {
#ifdef LANES
    return 1;
#else
    return 0;
#endif
}
