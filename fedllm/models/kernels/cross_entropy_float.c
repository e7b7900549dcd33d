/* The same as cross_entropy.c for numbers in float. */

#define FLOAT32

#include "cross_entropy.c"
