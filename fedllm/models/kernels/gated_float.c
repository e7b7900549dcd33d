/* The same as gated.c for numbers in float. */

#define FLOAT32

#include "gated.c"
