/* The same as norm.c for numbers in float. */

#define FLOAT32

#include "norm.c"
