/* The same as rotary.c for numbers in float. */

#define FLOAT32

#include "rotary.c"
