/* A team belongs to the thread that set its size and ends with it. Helpers wait for a job without sleeping for some
   microseconds, as between two kernels of a layer, and then asleep. One that comes late to a job finds it closed: nobody
   waits for a thread that the system has put aside, unless it has an item in hand. */

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "bf16.h"
#include "team.h"

enum { AWAKE = 4000, PATIENT = 1000 }; /* looks at a counter before a thread sleeps, or lets others go first */

typedef struct {
    task *run;
    void *job;
    int64_t count;
    atomic_llong next;             /* the first item that nobody has taken */
    atomic_ullong jobs;            /* so far */
    atomic_int open, inside, idle; /* whether there is a job; helpers that work on it; helpers that sleep */
    atomic_int ending;
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int64_t size; /* threads, the owner included */
    pthread_t *helpers;
} team;

static _Thread_local team *own;
static pthread_key_t at_exit;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline void pause_a_little(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static void take_items(team *t) {
    for (int64_t item; (item = atomic_fetch_add(&t->next, 1)) < t->count;) t->run(t->job, item);
}

static void *help(void *given) {
    team *t = given;
    for (unsigned long long seen = 0;;) {
        for (int i = 0; i < AWAKE && atomic_load(&t->jobs) == seen; i++) pause_a_little();
        if (atomic_load(&t->jobs) == seen) {
            pthread_mutex_lock(&t->lock);
            atomic_fetch_add(&t->idle, 1);
            while (atomic_load(&t->jobs) == seen && !atomic_load(&t->ending)) pthread_cond_wait(&t->wake, &t->lock);
            atomic_fetch_sub(&t->idle, 1);
            pthread_mutex_unlock(&t->lock);
        }
        if (atomic_load(&t->ending)) return NULL;
        seen = atomic_load(&t->jobs);
        atomic_fetch_add(&t->inside, 1);
        if (atomic_load(&t->open)) take_items(t);
        atomic_fetch_sub(&t->inside, 1);
    }
}

static void wake_all(team *t) {
    if (!atomic_load(&t->idle)) return;
    pthread_mutex_lock(&t->lock);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
}

static void ended(void *given) {
    team *t = given;
    pthread_mutex_lock(&t->lock);
    atomic_store(&t->ending, 1);
    pthread_cond_broadcast(&t->wake);
    pthread_mutex_unlock(&t->lock);
    atomic_fetch_add(&t->jobs, 1);
    for (int64_t i = 0; i < t->size - 1; i++) pthread_join(t->helpers[i], NULL);
    pthread_cond_destroy(&t->wake);
    pthread_mutex_destroy(&t->lock);
    free(t->helpers);
    free(t);
}

static void make_key(void) { pthread_key_create(&at_exit, ended); }

int64_t team_size(void) { return own ? own->size : 1; }

int fedllm_threads(int64_t size) {
    if (size == team_size()) return 0;
    pthread_once(&once, make_key);
    if (own) ended(own);
    own = NULL;
    pthread_setspecific(at_exit, NULL);
    if (size < 2) return 0;
    team *t = calloc(1, sizeof *t);
    if (!t || !(t->helpers = calloc(size - 1, sizeof *t->helpers))) return free(t), OUT_OF_MEMORY;
    pthread_mutex_init(&t->lock, NULL);
    pthread_cond_init(&t->wake, NULL);
    for (t->size = 1; t->size < size; t->size++)
        if (pthread_create(&t->helpers[t->size - 1], NULL, help, t)) break; /* fewer will do */
    own = t;
    pthread_setspecific(at_exit, t);
    return 0;
}

void in_parallel(task *run, void *job, int64_t count) {
    team *t = own;
    if (!t || t->size < 2 || count < 2) {
        for (int64_t item = 0; item < count; item++) run(job, item);
        return;
    }
    t->run = run, t->job = job, t->count = count;
    atomic_store(&t->next, 0);
    atomic_store(&t->open, 1);
    atomic_fetch_add(&t->jobs, 1);
    wake_all(t);
    take_items(t);
    atomic_store(&t->open, 0);
    for (int i = 0; atomic_load(&t->inside); i++) i < PATIENT ? pause_a_little() : (void)sched_yield();
}
