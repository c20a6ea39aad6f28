/* SPDX-License-Identifier: MIT
 *
 * openat2.h: valgrind 3.19 knows no openat2(2), which main.c calls by number.
 * Included before all else, this does as much of it by other calls: a file
 * counts as beneath a directory if its path begins with the directory's, and
 * if no absolute link stands for it.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

/* The path of an open file, as the kernel tells it; "" if there is none. */
static inline size_t openat2_path(int fd, char path[4096]) {
    char link[40];
    ssize_t n;

    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    n = readlink(link, path, 4095);
    path[n > 0 ? n : 0] = '\0';
    return strlen(path);
}

static inline long openat2_call(long number, int dir, const char *name,
                                const void *how, size_t size) {
    char root[4096], path[4096];
    uint64_t flags;
    size_t n;
    int fd;

    (void)number;
    (void)size;
    memcpy(&flags, how, sizeof flags);
    if (readlinkat(dir, name, path, 1) == 1 && *path == '/') fd = -1;
    else fd = openat(dir, name, (int)flags);
    if (fd < 0) return -1;
    n = openat2_path(dir, root);
    openat2_path(fd, path);
    if (strncmp(path, root, n) == 0 && (path[n] == '/' || path[n] == '\0'))
        return fd;
    close(fd);
    errno = EXDEV;
    return -1;
}
#define syscall openat2_call
