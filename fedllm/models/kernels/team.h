/* Threads that help the one that calls a kernel. An item's numbers do not depend on who computes it, so results have
   the same bits for any number of threads. */

#ifndef FEDLLM_TEAM_H
#define FEDLLM_TEAM_H

#include <stdint.h>

typedef void task(void *job, int64_t item);

/* Computes items 0 to count - 1, in any order, on the calling thread and its helpers; returns when all are done. */
void in_parallel(task *run, void *job, int64_t count);

/* Threads of the calling thread's team, itself included. */
int64_t team_size(void);

/* Where part `item` of `count` begins among n rows. */
static inline int64_t begin(int64_t n, int64_t item, int64_t count) { return n * item / count; }

/* Parts of n rows that keep a team busy, of at least `least` rows each. */
static inline int64_t parts_of(int64_t n, int64_t least) {
    int64_t most = n / least, wanted = team_size() > 1 ? 4 * team_size() : 1;
    return most < 1 ? 1 : (most < wanted ? most : wanted);
}

#endif
