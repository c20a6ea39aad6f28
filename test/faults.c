/* SPDX-License-Identifier: MIT
 *
 * faults.c: memory and descriptors that run out at any moment. This program
 * is two: with FAULTS in its environment it is the chat, in which the Nth
 * call that takes memory or a descriptor fails; else it starts itself as that
 * chat, for N = 1, 2, 3 and so on, and has the same conversation with each,
 * until one comes to its end without a fault. Each time at most the client
 * that was served at that moment may be lost.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

/* ---- The chat, with a fault -------------------------------------------- */

/* Shared by the test and the chat. */
struct faults {
    volatile bool armed; /* from here on calls count */
    volatile int count;  /* of calls so far */
    int at;              /* the call that fails */
    int accepts;         /* accept4s that counted */
    char what[80];       /* which one that was */
};

static struct faults *faults;

/* Is this the call that fails? */
static bool fault(const char *call, const char *caller, int error) {
    if (!faults->armed || ++faults->count != faults->at) return false;
    snprintf(faults->what, sizeof faults->what, "%s in %s", call, caller);
    errno = error;
    return true;
}

#define FAULT(call, error, failed, ...) \
    (fault(call, __func__, error) ? (failed) : __VA_ARGS__)

#define malloc(n)       FAULT("malloc", ENOMEM, NULL, malloc(n))
#define calloc(n, size) FAULT("calloc", ENOMEM, NULL, calloc(n, size))
#define realloc(p, n)   FAULT("realloc", ENOMEM, NULL, realloc(p, n))
#define strdup(text)    FAULT("strdup", ENOMEM, NULL, strdup(text))
#define mmap(...)       FAULT("mmap", ENOMEM, MAP_FAILED, mmap(__VA_ARGS__))
#define ftruncate(...)  FAULT("ftruncate", ENOMEM, -1, ftruncate(__VA_ARGS__))
#define scandir(...)    FAULT("scandir", ENOMEM, -1, scandir(__VA_ARGS__))
#define syscall(...)    FAULT("openat2", EMFILE, -1, syscall(__VA_ARGS__))
#define memfd_create(...) \
    FAULT("memfd_create", EMFILE, -1, memfd_create(__VA_ARGS__))
/* It fails alike for each client, and that costs a second: two are enough. */
#define accept4(...)                                              \
    (faults->accepts < 2 && faults->armed && ++faults->accepts && \
             fault("accept4", __func__, ENOMEM)                   \
         ? -1                                                     \
         : accept4(__VA_ARGS__))
#define epoll_ctl(epoll, call, fd, event)                            \
    ((call) == EPOLL_CTL_ADD && fault("epoll_ctl", __func__, ENOMEM) \
         ? -1                                                        \
         : epoll_ctl(epoll, call, fd, event))

/* What the harness has by the same name. */
#define server        chat_server
#define peer          chat_peer
#define frame         chat_frame
#define response      chat_response
#define server_listen chat_listen
#define server_stop   chat_stop
#define close_code    chat_close_code
#define TEXT          CHAT_TEXT
#define BINARY        CHAT_BINARY
#define CLOSE         CHAT_CLOSE
#define PING          CHAT_PING
#define PONG          CHAT_PONG
#define main          chat_main
#include "../main.c"
#undef server
#undef peer
#undef frame
#undef response
#undef server_listen
#undef server_stop
#undef close_code
#undef TEXT
#undef BINARY
#undef CLOSE
#undef PING
#undef PONG
#undef main
#undef malloc
#undef calloc
#undef realloc
#undef strdup
#undef mmap
#undef ftruncate
#undef accept4
#undef scandir
#undef syscall
#undef memfd_create
#undef epoll_ctl

#include "harness.h"

/* ---- A conversation ---------------------------------------------------- */

static const char *chat; /* the program without faults */
static char folder[] = "/tmp/chat-faults-XXXXXX";
static struct peer *watcher; /* is there all the time */

static void watch_step(int port) {
    watcher = ws_open(port, "/?channel=watched");
}

static void get(int port, const char *target, int status) {
    struct response r;
    struct peer *p = http_get(port, target, &r);

    expect(r.status == status, "%s: status %d", target, r.status);
    peer_close(p);
}

static void listing_step(int port) {
    get(port, "/", 200);
}

static void redirect_step(int port) {
    get(port, "/below", 301);
}

static void file_step(int port) {
    get(port, "/file", 200);
}

static void missing_step(int port) {
    get(port, "/missing", 404);
}

static void metrics_step(int port) {
    get(port, "/metrics", 200);
}

/* A body that comes after its header has been read, and does not fit into
 * what is kept for that. */
static void post_step(int port) {
    struct peer *p = peer_open(port);
    struct response r;
    char body[3000];

    memset(body, 'b', sizeof body);
    peer_text(p, "POST /send?channel=posted HTTP/1.1\r\nHost: localhost\r\n"
                 "Expect: 100-continue\r\nContent-Length: 3000\r\n\r\n");
    read_response(p, false, &r);
    expect(r.status == 100, "status %d, expected 100", r.status);
    peer_send(p, body, sizeof body);
    read_response(p, false, &r);
    expect(r.status == 200, "status %d", r.status);
    peer_text(p, "GET /messages?channel=posted HTTP/1.1\r\n"
                 "Host: localhost\r\n\r\n");
    read_response(p, false, &r);
    expect(r.status == 200 && r.length == 3004, "status %d, %zu bytes",
           r.status, r.length);
    peer_close(p);
}

/* Joins with history, sends a message in two fragments with a ping between
 * them, and closes. */
static void join_step(int port) {
    char half[2000], whole[4000];
    struct peer *p;
    struct frame f;

    memset(half, 'h', sizeof half);
    memset(whole, 'h', sizeof whole);
    get(port, "/send?channel=joined&message=first", 200);
    p = ws_open(port, "/?channel=joined&history=2");
    ws_expect_text(p, "{\"history\":1}");
    ws_expect_text(p, "first");
    ws_send(p, 1, half, sizeof half);
    ws_sync(p);
    ws_send(p, 0x80, half, sizeof half);
    ws_expect(p, TEXT, whole, sizeof whole);
    ws_send(p, CLOSE, "\x03\xe8", 2);
    expect(ws_next(p, &f) && f.first == CLOSE, "no close frame");
    expect_end(p);
    peer_close(p);
}

static const struct {
    const char *name;
    void (*run)(int port);
} steps[] = {
    { "the watcher", watch_step },   { "a listing", listing_step },
    { "a redirect", redirect_step }, { "a file", file_step },
    { "a 404", missing_step },       { "a POST", post_step },
    { "a WebSocket", join_step },    { "metrics", metrics_step },
};

/* After the fault: all works, and the watcher, if it was not the one who was
 * lost, is still there. */
static void expect_well(int port, bool watched) {
    struct peer *p;

    listing_step(port);
    file_step(port);
    get(port, "/send?channel=after&message=x", 200);
    p = ws_open(port, "/?channel=watched");
    ws_text(p, "fresh");
    ws_expect_text(p, "fresh");
    if (watched) ws_expect_text(watcher, "fresh");
    peer_close(p);
    peer_close(watcher);
}

/* Names the case when it is known what failed, and who was lost by it. */
static void name_fault(const char *where, const char *lost) {
    begin("%s %d: %s%s%s", where, faults->at,
          faults->what[0] ? faults->what : "none is left",
          lost[0] ? ", lost: " : "", lost);
}

/* The conversation with the fault at call `at`. False: no call was the
 * `at`th, or something is wrong. */
static bool talk(int at) {
    struct server s = { 0 };
    char lost[200] = "", why[sizeof test.why] = "";
    bool watched = true, good;
    int count = 0;

    *faults = (struct faults){ .at = at };
    test.program = "/proc/self/exe";
    if (!START(&s, "-b", "none", "-d", folder, "--metrics") ||
        !server_answers(&s))
        return false;
    faults->armed = true;
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        double began = now();

        test.why[0] = '\0';
        steps[i].run(s.port);
        if (!test.why[0]) continue;
        watched &= i > 0;
        count++;
        snprintf(lost + strlen(lost), sizeof lost - strlen(lost), "%s ",
                 steps[i].name);
        if (count > 1 || now() - began >= test.patience)
            memcpy(why, test.why, sizeof why);
    }
    faults->armed = false;
    name_fault("call", lost);
    expect(!why[0], "%s", why);
    expect(count == 0 || faults->what[0], "lost without a fault");
    expect_well(s.port, watched);
    kill(s.pid, SIGTERM);
    expect(server_end(&s) == 0, "did not stop cleanly: %s", s.said);
    expect_quiet(&s);
    good = !test.why[0];
    finish();
    server_free(&s);
    return good && faults->what[0];
}

/* ---- Two instances ----------------------------------------------------- */

#define BUS_LINES                              \
    "^chat: peer [0-9a-f]{16} (joined|left)$|" \
    "^chat: lost [0-9]+ messages from [0-9a-f]{16}$"

/* One says the same again and again until the other has heard it, which
 * stays connected meanwhile. */
static bool says_until_heard(struct peer *from, struct peer *to,
                             const char *text) {
    double until = deadline();
    struct frame f;

    while (now() < until && !from->ended && !to->ended) {
        ws_text(from, text);
        peer_more(to, now() + 0.02);
        while (ws_take(to, &f))
            if (f.first == TEXT && f.length == strlen(text) &&
                !memcmp(f.data, text, f.length))
                return true;
    }
    return false;
}

/* With faults, all of the bus's datagrams that a second instance sends. The
 * client of the first may be lost, and messages on the bus may (counted). */
static void cross(struct server *a, struct server *b, char *lost) {
    char big[3000];
    struct peer *at_a = ws_open(a->port, "/?channel=x"), *at_b;
    bool heard;

    if (test.why[0]) strcpy(lost, "a client");
    test.why[0] = '\0';
    at_b = ws_open(b->port, "/?channel=x");
    memset(big, 'b', sizeof big);
    ws_send(at_b, TEXT, big, sizeof big);
    heard = !lost[0] && says_until_heard(at_b, at_a, "from b") &&
            says_until_heard(at_a, at_b, "from a");
    if (at_a->ended) strcpy(lost, "a client");
    expect(heard || lost[0], "not heard");
    peer_close(at_a);
    peer_close(at_b);
}

static bool talk_across(int at, const char *bus) {
    struct server a = { .may_say = BUS_LINES }, b = a;
    struct peer *at_a, *at_b;
    char lost[200] = "", why[sizeof test.why];
    bool good;

    *faults = (struct faults){ .at = at, .accepts = 2 };
    test.program = "/proc/self/exe";
    if (!START(&a, "-b", bus) || !server_answers(&a)) return false;
    faults->armed = true;
    test.program = chat;
    if (!START(&b, "-b", bus)) return false;
    begin("%s", "");
    cross(&a, &b, lost);
    faults->armed = false;
    memcpy(why, test.why, sizeof why);
    name_fault("across", lost);
    expect(!why[0], "%s", why);
    at_a = ws_open(a.port, "/?channel=x");
    at_b = ws_open(b.port, "/?channel=x");
    expect(says_until_heard(at_b, at_a, "again from b"), "b not heard");
    expect(says_until_heard(at_a, at_b, "again from a"), "a not heard");
    get(a.port, "/", 200);
    peer_close(at_a);
    peer_close(at_b);
    kill(b.pid, SIGTERM);
    expect(server_end(&b) == 0, "b did not stop cleanly: %s", b.said);
    kill(a.pid, SIGTERM);
    expect(server_end(&a) == 0, "did not stop cleanly: %s", a.said);
    expect_quiet(&a);
    expect_quiet(&b);
    good = !test.why[0];
    finish();
    server_free(&a);
    server_free(&b);
    return good && faults->what[0];
}

/* ---- All of it --------------------------------------------------------- */

static void make_files(bool make) {
    char path[3][64];

    if (make && !mkdtemp(folder)) perror("mkdtemp");
    snprintf(path[0], sizeof path[0], "%s/below", folder);
    snprintf(path[1], sizeof path[1], "%s/file", folder);
    snprintf(path[2], sizeof path[2], "%s/a name that is escaped", folder);
    for (int i = 0; i < 3; i++) {
        FILE *file = i > 0 && make ? fopen(path[i], "w") : NULL;

        if (i == 0 && make) mkdir(path[i], 0755);
        if (file) fprintf(file, "text\n");
        if (file) fclose(file);
        if (!make) remove(path[i]);
    }
    if (!make) rmdir(folder);
}

/* Maps what is shared; `fd` is -1 where that is to be made. */
static void faults_open(int fd) {
    char number[16];

    if (fd < 0) {
        fd = memfd_create("faults", 0); /* the chat inherits it */
        snprintf(number, sizeof number, "%d", fd);
        setenv("FAULTS", number, 1);
        if (fd < 0 || ftruncate(fd, sizeof *faults)) perror("memfd");
    }
    faults =
        mmap(NULL, sizeof *faults, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (faults == MAP_FAILED) {
        perror("mmap");
        exit(1);
    }
}

static void across_test(void) {
    char bus[64];
    int at = 0;

    faults_open(-1);
    snprintf(bus, sizeof bus, "239.255.80.80:%d", free_port());
    while (talk_across(++at, bus))
        ;
    printf("# %d calls failed with a second instance\n", at - 1);
}

static void alone_test(void) {
    int at = 0;

    faults_open(-1);
    while (talk(++at))
        ;
    printf("# %d calls failed alone\n", at - 1);
}

int main(int argc, char **argv) {
    const char *shared = getenv("FAULTS");

    if (shared) {
        faults_open(atoi(shared));
        return chat_main(argc, argv);
    }
    harness_open();
    chat = test.program;
    make_files(true);
    begin_beside(across_test);
    alone_test();
    end_beside();
    make_files(false);
    return harness_close();
}
