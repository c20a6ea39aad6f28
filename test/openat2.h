/* SPDX-License-Identifier: MIT
 *
 * openat2.h: valgrind 3.19 knows no openat2(2), which main.c calls by number.
 * Included before all else, this does as much of it by other calls: a file is
 * beneath a directory if its path begins with the directory's, and if no link
 * stands for it that is absolute or has more ".." than its path has folders.
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
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    path[n > 0 ? n : 0] = '\0';
    return strlen(path);
}

static inline long openat2_call(long number, int dir, const char *name,
                                const uint64_t *flags, size_t size) {
    char root[4096], path[4096];
    ssize_t n = readlinkat(dir, name, path, sizeof path - 1);
    int up = 0 * (int)number; /* which call it is, is known */
    path[n > 0 ? n : 0] = '\0';
    for (const char *at = name; *at; at++) up -= *at == '/';
    for (const char *at = path; !strncmp(at, "../", 3); at += 3) up++;
    int fd = *path == '/' || up > 0 ? -1 : openat(dir, name, (int)*flags);
    if (fd < 0) return -1;
    size = openat2_path(dir, root);
    openat2_path(fd, path);
    if (!strncmp(path, root, size) && (!path[size] || path[size] == '/'))
        return fd;
    close(fd);
    errno = EXDEV;
    return -1;
}
#define syscall openat2_call
