/* Makes one kind of system call fail on a registry's files; for LD_PRELOAD.

   DISK_FAULTS names a file that both sides map: which call of a kind fails, with which error, and
   for how many calls; here the calls are counted. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SYNC = 1, WRITE = 2 };

struct faults {
    int64_t kind;          /* 0: nothing is counted, and nothing fails */
    int64_t first;         /* the first call that fails, from 1 on */
    int64_t calls;         /* how many fail */
    int64_t error;
    _Atomic int64_t count; /* calls so far */
};

static struct faults *faults;

__attribute__((constructor)) static void map_faults(void) {
    const char *name = getenv("DISK_FAULTS");
    int file = name ? open(name, O_RDWR | O_CLOEXEC) : -1;
    if (file < 0) abort();
    faults = mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (faults == MAP_FAILED) abort();
}

static int fails(int64_t kind, int file) {
    char link[64], path[4096];
    if (!faults || faults->kind != kind) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    if (!strstr(path, "registry.db")) return 0;
    int64_t number = atomic_fetch_add(&faults->count, 1) + 1;
    if (number < faults->first || number >= faults->first + faults->calls) return 0;
    errno = (int)faults->error;
    return 1;
}

#define REAL(name) static __typeof__(name) *real; if (!real) real = dlsym(RTLD_NEXT, #name)

int fsync(int file) { REAL(fsync); return fails(SYNC, file) ? -1 : real(file); }

int fdatasync(int file) { REAL(fdatasync); return fails(SYNC, file) ? -1 : real(file); }

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    return fails(WRITE, file) ? -1 : real(file, data, size);
}

ssize_t pwrite(int file, const void *data, size_t size, off_t at) {
    REAL(pwrite);
    return fails(WRITE, file) ? -1 : real(file, data, size, at);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    return fails(WRITE, file) ? -1 : real(file, data, size, at);
}
