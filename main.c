/* mini-ws-chat: what one browser sends, every browser shows.
 *
 *   browser --WebSocket--> this instance ---> the channel's log ---> every
 *                               |             client of this instance
 *                               v
 *                          the bus (UDP) ---> every other instance, which
 *                                             does the same with it
 *
 * A channel is one log: a ring of ready-made WebSocket frames. Frames from
 * a server carry no mask (RFC 6455 5.1), so all clients get the same bytes;
 * a client is a cursor into the log, and a broadcast is one append and then
 * one send() a client, from its cursor to the log's head. The bus is a log
 * too, of what this instance posts; the others keep cursors into that.
 *
 * The functions on its way: client_read, websocket_step, server_post (into
 * the logs); at the end of the round bus_flush and channel_flush. At the
 * others: bus_readable, bus_deliver, bus_message, channel_flush.
 *
 * One thread, one epoll loop; with -j, N processes of that kind. Begin with
 * server_run, if you like, in the last but one of the chapters:
 *
 *   1. Limits                        9. Channels
 *   2. Tools: bytes and text        10. The bus between instances
 *   3. The log                      11. NATS, the other bus
 *   4. Hashes (skip at first)       12. HTTP: the answers
 *   5. HTTP: the request            13. WebSocket: conversations
 *   6. WebSocket: frames            14. The event loop
 *   7. The data                     15. Options and main
 *   8. Clients: cursors into a log
 *
 * Build and run:   cc main.c -o chat && ./chat     (Linux 5.6 or newer)
 *
 * SPDX-License-Identifier: MIT
 */
#define _GNU_SOURCE /* NOLINT: a reserved name that is ours to define */
#include <arpa/inet.h>
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#ifdef TLS
#include <openssl/err.h>
#include <openssl/ssl.h>
#endif

/* ---- 1. Limits ----------------------------------------------------------
 * Every size that bounds memory and every time that bounds patience stands
 * here (those of the bus stand with it). Test builds shrink some with -D, so
 * that the paths for split and growing input run all the time.
 */
#define KIB 1024L
#define MIB (1024 * KIB)
#define SECOND 1000L /* times are milliseconds since the start, unless said */

#ifndef READ_SIZE
#define READ_SIZE (64 * KIB) /* bytes taken from a client at once */
#endif
#ifndef SEND_BUFFER
#define SEND_BUFFER (128 * KIB) /* what the kernel may hold for a client */
#endif
#define HEADER_MAX (8 * KIB)       /* a request's line and headers */
#define MESSAGE_MAX (16 * MIB)     /* the most that -m allows */
#define UNSENT_MAX (64 * MIB)      /* of answers; then /messages is 503 */
#define CHANNELS_MAX 1024          /* with and without clients */
#define CHANNEL_NAME_MAX 64        /* bytes */
#define EVENTS_MAX 1024            /* taken from epoll at once */
#define TIMEOUTS_MAX 128           /* dealt with in a round */
#ifndef SLICE
#define SLICE 512                  /* clients of a channel sent to in a round */
#endif
#define WORKERS_MAX 64             /* processes that share the port */
#define REQUEST_TIME (10 * SECOND) /* for headers; between pieces of a body */
#define IDLE_TIME (60 * SECOND)    /* since we last sent something */
#define PING_TIME (30 * SECOND)    /* of silence before a ping, then again */
#define SLOW_TIME SECOND           /* that senders wait for slow readers */
#define BUS_SLOW_TIME 250          /* and the bus, with all its channels */
#define CLOSE_TIME (4 * SECOND)    /* for the other side to close as well */
#define TLS_RECORD (16 * KIB)      /* the most that one holds (RFC 8446 5.1) */

/* ---- 2. Tools: bytes and text -------------------------------------------
 * Growing buffers, numbers on the wire, percent-decoding, UTF-8, escapes.
 * Nothing here knows of sockets.
 */
struct text { /* a slice of somebody else's bytes */
    const char *at;
    size_t size;
};

struct buffer { /* bytes on the heap, growing */
    char *bytes;
    size_t size, capacity;
    bool failed; /* out of memory: so a row of appends needs one check */
};

/* A failure to start: one line, exit 1. */
__attribute__((noreturn))
static void fail(const char *what, const char *why) {
    fprintf(stderr, "chat: %s: %s\n", what, why);
    exit(1);
}

/* A bad option: one line, exit 2. */
__attribute__((noreturn))
static void option_error(const char *option, const char *why) {
    fprintf(stderr, "chat: %s: %s (see chat -h)\n", option, why);
    exit(2);
}

/* For calls that must succeed at start. */
static int must(int result, const char *call) {
    if (result < 0) fail(call, strerror(errno));
    return result;
}

static int64_t earlier(int64_t a, int64_t b) {
    return a < b ? a : b;
}

static int64_t clock_us(clockid_t id) {
    struct timespec t;
    clock_gettime(id, &t); /* cannot fail, because both clocks exist */
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

static struct text text_of(const char *string) {
    return (struct text){string, strlen(string)};
}

/* Makes room for `more` bytes and a NUL (which only buffer_print writes). */
static bool buffer_reserve(struct buffer *b, size_t more) {
    if (!b->failed && b->capacity - b->size > more) return true;
    size_t capacity = (b->size + more + 1) * 2;
    char *grown = b->failed ? NULL : realloc(b->bytes, capacity);
    b->failed = grown == NULL;
    if (b->failed) return false;
    b->bytes = grown;
    b->capacity = capacity;
    return true;
}

static void buffer_add(struct buffer *b, const void *bytes, size_t size) {
    if (size == 0 || !buffer_reserve(b, size)) return;
    memcpy(b->bytes + b->size, bytes, size);
    b->size += size;
}

__attribute__((format(printf, 2, 3)))
static void buffer_print(struct buffer *b, const char *format, ...) {
    va_list list;
    for (size_t room = 512;;) { /* most fit at the first try */
        if (!buffer_reserve(b, room)) return;
        va_start(list, format);
        int size = vsnprintf(b->bytes + b->size, room, format, list);
        va_end(list);
        if ((size_t)size < room) {
            b->size += (size_t)size;
            return;
        }
        room = (size_t)size + 1;
    }
}

static void buffer_clear(struct buffer *b) {
    free(b->bytes);
    *b = (struct buffer){0};
}

/* Appends text with all but letters, digits and `safe` in a printf format,
 * and so harmless in HTML ("&#%d;", UTF-8 stays as it is), a URL or a log. */
static void buffer_escape(struct buffer *b, struct text t, const char *safe,
                          const char *format) {
    for (size_t i = 0; i < t.size; i++) {
        unsigned char c = (unsigned char)t.at[i];
        bool plain = isalnum(c) || (c > 0 && c < 128 && strchr(safe, c)) ||
                     (c > 127 && *format == '&');
        if (plain) buffer_add(b, &c, 1);
        else buffer_print(b, format, c);
    }
}

/* Appends text as a JSON string (RFC 8259 7). */
static void buffer_json(struct buffer *b, struct text t) {
    buffer_add(b, "\"", 1);
    for (size_t i = 0; i < t.size; i++) {
        unsigned char c = (unsigned char)t.at[i];
        if (c == '"' || c == '\\') buffer_add(b, "\\", 1);
        if (c < ' ') buffer_print(b, "\\u%04x", c);
        else buffer_add(b, &c, 1);
    }
    buffer_add(b, "\"", 1);
}

/* Numbers of n bytes in network order (most significant byte first). */
static uint64_t get_number(const uint8_t *bytes, int n) {
    uint64_t value = 0;
    for (int i = 0; i < n; i++) value = value << 8 | bytes[i];
    return value;
}

static void put_number(uint8_t *bytes, uint64_t value, int n) {
    while (n-- > 0) {
        bytes[n] = (uint8_t)value;
        value >>= 8;
    }
}

/* A decimal number of digits only, 18 at most; else -1. */
static int64_t parse_number(const char *text) {
    size_t n = strspn(text, "0123456789");
    return n == 0 || n > 18 || text[n] != '\0' ? -1 : strtoll(text, NULL, 10);
}

/* Decodes %XX, and '+' as a space if `query`. `in` ends with what is no hex
 * digit; `out`, perhaps the same, takes n + 1 bytes, the last a NUL. Returns
 * the size, or -1 for a bad %. */
static ssize_t percent_decode(const char *in, size_t n, char *out, bool query) {
    ssize_t size = 0;
    for (size_t i = 0; i < n; i++) {
        char c = in[i];
        if (c == '+' && query) c = ' ';
        if (c == '%') {
            if (!isxdigit((unsigned char)in[i + 1]) ||
                !isxdigit((unsigned char)in[i + 2])) {
                *out = '\0';
                return -1;
            }
            c = (char)strtol((char[]){in[i + 1], in[i + 2], 0}, NULL, 16);
            i += 2;
        }
        out[size++] = c;
    }
    out[size] = '\0';
    return size;
}

/* Finds NAME=value in a query string, decoded into `out` (which has room for
 * the whole query). Returns the size, -1 where there is none, -2 if bad. */
static ssize_t query_get(const char *query, const char *name, char *out) {
    while (*query) {
        size_t n = strcspn(query, "&"), key = strcspn(query, "=&");
        ssize_t got = percent_decode(query, key, out, true);
        if (got == (ssize_t)strlen(name) && !strcmp(out, name)) {
            key += query[key] == '=';
            ssize_t size = percent_decode(query + key, n - key, out, true);
            return size < 0 ? -2 : size;
        }
        query += n + (query[n] == '&');
    }
    return -1;
}

/* UTF-8 (RFC 3629), checked as it arrives: `left` continuation bytes are
 * due, the next of them between `low` and `high`. None is due at the start. */
struct utf8 {
    uint8_t left, low, high;
};

static bool utf8_check(struct utf8 *u, const void *bytes, size_t size) {
    const uint8_t *at = bytes, *end = at + size;
    uint64_t word;
    while (at < end) {
        if (u->left == 0 && end - at >= 8) { /* eight ASCII bytes at once */
            memcpy(&word, at, 8);
            at += (word & 0x8080808080808080) ? 0 : 8;
            if (!(word & 0x8080808080808080)) continue;
        }
        uint8_t b = *at++;
        if (u->left > 0) {
            if (b < u->low || b > u->high) return false;
            *u = (struct utf8){u->left - 1, 0x80, 0xBF};
        } else if (b >= 0x80) { /* no overlong forms, no D800.., no 110000.. */
            if (b < 0xC2 || b > 0xF4) return false;
            u->left = b < 0xE0 ? 1 : b < 0xF0 ? 2 : 3;
            u->low = b == 0xE0 ? 0xA0 : b == 0xF0 ? 0x90 : 0x80;
            u->high = b == 0xED ? 0x9F : b == 0xF4 ? 0x8F : 0xBF;
        }
    }
    return true;
}

static bool utf8_valid(const void *bytes, size_t size) {
    struct utf8 u = {0};
    return utf8_check(&u, bytes, size) && u.left == 0;
}

/* ---- 3. The log ---------------------------------------------------------
 * A ring of records, addressed by offsets that only grow. The same memory
 * is mapped twice, one copy behind the other, so that a record that runs
 * over the ring's end is still one piece of memory. What a record is (and
 * so where the next one starts) is its owner's business.
 *
 *      tail: oldest whole record        head: where the next one goes
 *        v                                v
 *   ...  [record][record][record][record] .      head - tail <= size
 */
struct log {
    uint8_t *ring;
    size_t size; /* a multiple of the page size */
    uint64_t tail, head;
};

static bool log_open(struct log *l, size_t size) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size = (size + page - 1) / page * page;
    int fd = memfd_create("log", MFD_CLOEXEC);
    uint8_t *ring = mmap(NULL, 2 * size, PROT_NONE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    bool good = fd >= 0 && ring != MAP_FAILED && !ftruncate(fd, (off_t)size);
    for (size_t i = 0; good && i < 2; i++)
        good = mmap(ring + i * size, size, PROT_READ | PROT_WRITE,
                    MAP_SHARED | MAP_FIXED, fd, 0) != MAP_FAILED;
    if (fd >= 0) close(fd);
    if (!good && ring != MAP_FAILED) munmap(ring, 2 * size);
    *l = (struct log){.ring = ring, .size = size};
    return good;
}

static void log_close(struct log *l) {
    munmap(l->ring, 2 * l->size);
}

static uint8_t *log_at(const struct log *l, uint64_t offset) {
    return l->ring + offset % l->size;
}

/* The owner has made room: head + size - tail <= l->size. */
static void log_append(struct log *l, const void *bytes, size_t size) {
    memcpy(log_at(l, l->head), bytes, size);
    l->head += size;
}

/* ---- 4. Hashes (skip at first) ------------------------------------------
 * SHA-1 (RFC 3174) for the WebSocket handshake, HMAC-SHA1 (RFC 2104) for
 * the bus, base64 (RFC 4648). SHA-1 is broken for signatures; in the
 * handshake it guards nothing, and HMAC does not rest on what is broken.
 */
#define SHA1_SIZE 20

struct sha1 {
    uint32_t h[5];
    uint64_t size; /* bytes so far: whole blocks of 64 */
};

static const struct sha1 sha1_start = {
    {0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476, 0xC3D2E1F0}, 0};

static uint32_t rotate_left(uint32_t x, int n) {
    return x << n | x >> (32 - n);
}

static void sha1_block(struct sha1 *s, const uint8_t *block) {
    static const uint32_t k[] = {0x5A827999, 0x6ED9EBA1, 0x8F1BBCDC,
                                 0xCA62C1D6};
    uint32_t w[80], *h = s->h, a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
    for (size_t i = 0; i < 16; i++)
        w[i] = (uint32_t)get_number(block + 4 * i, 4);
    for (size_t i = 16; i < 80; i++)
        w[i] = rotate_left(w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16], 1);
    for (int i = 0; i < 80; i++) {
        uint32_t f = i < 20             ? (b & c) | (~b & d)
                     : i < 40 || i > 59 ? b ^ c ^ d
                                        : (b & c) | (b & d) | (c & d);
        uint32_t next = rotate_left(a, 5) + f + e + k[i / 20] + w[i];
        e = d, d = c, c = rotate_left(b, 30), b = a, a = next;
    }
    h[0] += a, h[1] += b, h[2] += c, h[3] += d, h[4] += e;
    s->size += 64;
}

/* Takes in the last bytes and writes the digest. */
static void sha1_end(struct sha1 s, const void *bytes, size_t size,
                     uint8_t digest[SHA1_SIZE]) {
    const uint8_t *at = bytes;
    uint8_t last[128] = {0};
    for (; size >= 64; size -= 64, at += 64) sha1_block(&s, at);
    memcpy(last, at, size);
    last[size] = 0x80;
    size_t padded = size < 56 ? 64 : 128;
    put_number(last + padded - 8, (s.size + size) * 8, 8);
    for (size_t i = 0; i < padded; i += 64) sha1_block(&s, last + i);
    for (size_t i = 0; i < 5; i++) put_number(digest + 4 * i, s.h[i], 4);
}

/* HMAC's two hashes, each with its padded key already taken in. */
struct hmac {
    struct sha1 inner, outer;
};

static void hmac_key(struct hmac *k, const void *key, size_t size) {
    uint8_t block[64] = {0};
    if (size > sizeof block)
        sha1_end(sha1_start, key, size, block); /* a long key is hashed */
    else
        memcpy(block, key, size);
    k->inner = k->outer = sha1_start;
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36;
    sha1_block(&k->inner, block);
    for (size_t i = 0; i < sizeof block; i++) block[i] ^= 0x36 ^ 0x5C;
    sha1_block(&k->outer, block);
}

static void hmac_sign(const struct hmac *k, const void *bytes, size_t size,
                      uint8_t mac[SHA1_SIZE]) {
    sha1_end(k->inner, bytes, size, mac);
    sha1_end(k->outer, mac, SHA1_SIZE, mac);
}

static void buffer_base64(struct buffer *b, const uint8_t *in, size_t size) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                 "abcdefghijklmnopqrstuvwxyz0123456789+/=";
    for (size_t i = 0; i < size; i += 3) {
        size_t n = size - i < 3 ? size - i : 3;
        uint64_t bits = get_number(in + i, (int)n) << (8 * (3 - n));
        for (size_t j = 0; j < 4; j++)
            buffer_add(b, digits + (j > n ? 64 : bits >> (18 - 6 * j) & 63), 1);
    }
}

/* ---- 5. HTTP: the request -----------------------------------------------
 * RFC 9112. The parser is strict: what could be read in two ways (bare CR
 * or LF, folded lines, space before a colon, two lengths) is refused.
 *
 *   GET /send?message=hi HTTP/1.1 CRLF      method SP target SP version
 *   Host: localhost:8080 CRLF               name ":" value
 *   CRLF
 */
#define TOKEN "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz" \
              "ABCDEFGHIJKLMNOPQRSTUVWXYZ" /* RFC 9110 5.6.2 */

enum header { HOST, ORIGIN, SITE, LENGTH, SINCE, WS_KEY, WS_VERSION, HEADERS };

static const char *const header_names[HEADERS] = {
    "Host", "Origin", "Sec-Fetch-Site", "Content-Length", "If-Modified-Since",
    "Sec-WebSocket-Key", "Sec-WebSocket-Version"};

struct request {
    struct client *client;
    const char *method, *path, *query, *header[HEADERS]; /* NULL: not there */
    const char *authority;     /* of an absolute target; NULL: it was none */
    struct text line;          /* as it came, for the log */
    const char *body;
    struct text channel;       /* in `name` */
    size_t size;               /* of line and headers */
    int64_t length;            /* of the body */
    bool old;                  /* HTTP/1.0 */
    bool head;                 /* the method: no body is wanted */
    bool keep_alive, closes, upgrade, websocket, expects, none_match;
    char copy[HEADER_MAX + 1]; /* of line and headers, cut into strings */
    char name[HEADER_MAX];     /* of the channel, decoded */
};

/* Finds the empty line that ends the headers. Returns the size up to and
 * with it, 0 for "need more", or minus a status. */
static int request_scan(const char *bytes, size_t size) {
    for (int i = 0; i < (int)size && i < HEADER_MAX; i++) {
        unsigned char c = (unsigned char)bytes[i];
        bool after_cr = i > 0 && bytes[i - 1] == '\r';
        if ((c == '\n') != after_cr || c == 0x7F ||
            (c < ' ' && !strchr("\t\r\n", c)) || c == '\0') return -400;
        if (c == '\n' && i > 2 && bytes[i - 2] == '\n') return i + 1;
    }
    if (size < HEADER_MAX) return 0;
    return memchr(bytes, '\n', HEADER_MAX) ? -431 : -414;
}

/* Cuts up "METHOD target HTTP/1.x". Returns 0 or a status. */
static int request_line(struct request *r, char *line) {
    char *target = strchr(line, ' ');
    char *version = target ? strchr(target + 1, ' ') : NULL;
    if (version == NULL || strchr(line, '\t')) return 400;
    *target++ = *version++ = '\0';
    r->method = line;
    if (line[strspn(line, TOKEN)] != '\0' || *line == '\0' ||
        strlen(version) != 8 || strncmp(version, "HTTP/", 5) != 0 ||
        !isdigit((unsigned char)version[5]) || version[6] != '.' ||
        !isdigit((unsigned char)version[7])) return 400;
    if (version[5] != '1') return 505;
    r->old = version[7] == '0';
    r->keep_alive = !r->old;
    bool absolute = strncasecmp(target, "http://", 7) == 0;
    if (absolute) { /* 3.2.2; its host moves down by one, for a NUL */
        size_t n = strcspn(target + 7, "/?");
        r->authority = memmove(target + 6, target + 7, n);
        target[6 + n] = '\0';
        target += 7 + n;
    }
    char *query = strchr(target, '?');
    r->query = query ? query + 1 : "";
    if (query) *query = '\0';
    ssize_t n = query_get(r->query, "channel", r->name);
    r->channel = (struct text){r->name, n > 0 ? (size_t)n : 0};
    if (n < -1 || n > CHANNEL_NAME_MAX || !utf8_valid(r->name, r->channel.size))
        return 400;
    r->path = absolute && *target == '\0' ? "/" : target;
    bool rooted = *r->path == '/' || (!strcmp(line, "OPTIONS") &&
                                      !strcmp(target, "*")); /* 3.2.4 */
    ssize_t size = percent_decode(target, strlen(target), target, false);
    return rooted && size == (ssize_t)strlen(target) ? 0 : 400;
}

/* Is `word` in a comma-separated list? */
static bool list_has(const char *list, const char *word) {
    for (size_t n, size; *list; list += n) {
        list += strspn(list, ", \t");
        size = n = strcspn(list, ",");
        while (size > 0 && strchr(" \t", list[size - 1])) size--;
        if (size == strlen(word) && !strncasecmp(list, word, size)) return true;
    }
    return false;
}

/* A host, perhaps with a port (RFC 9110 7.2). No comma, though it could be
 * part of a name: that would rather be two fields made one. */
static bool host_valid(const char *host) {
    bool six = *host == '[';
    size_t n = six ? 1 + strspn(host + 1, "0123456789abcdefABCDEF:.") : 0;
    while (!six && host[n] && (isalnum((unsigned char)host[n]) ||
                               strchr("-._~%!$&'()*+;=", host[n]))) n++;
    if (six && host[n++] != ']') return false;
    if (host[n] == ':') n += 1 + strspn(host + n + 1, "0123456789");
    return host[n] == '\0';
}

/* Takes in one "name: value". Returns 0 or a status. */
static int request_header(struct request *r, char *line) {
    char *value = line + strspn(line, TOKEN), *end = line + strlen(line);
    if (value == line || *value != ':') return 400;
    *value++ = '\0';
    value += strspn(value, " \t");
    while (end > value && strchr(" \t", end[-1])) *--end = '\0';
    for (int h = 0; h < HEADERS; h++)
        if (!strcasecmp(line, header_names[h])) {
            if (r->header[h]) return 400; /* each at most once */
            r->header[h] = value;
        }
    if (!strcasecmp(line, "Transfer-Encoding")) return 501;
    if (!strcasecmp(line, "Connection")) {
        r->upgrade |= list_has(value, "upgrade");
        r->closes |= list_has(value, "close");
        r->keep_alive |= list_has(value, "keep-alive");
    }
    if (!strcasecmp(line, "Upgrade"))
        r->websocket |= list_has(value, "websocket");
    r->none_match |= !strcasecmp(line, "If-None-Match");
    if (!strcasecmp(line, "Expect"))
        r->expects |= list_has(value, "100-continue");
    return 0;
}

/* Returns the size of line and headers, 0 for "need more" or minus a
 * status. r->line and r->body point into `bytes`. */
static int request_parse(const char *bytes, size_t size, struct request *r) {
    memset(r, 0, offsetof(struct request, copy));
    int end = request_scan(bytes, size), status = 0;
    const char *cr = memchr(bytes, '\r', size);
    r->line = (struct text){bytes, cr ? (size_t)(cr - bytes) : 0};
    r->head = size > 4 && !memcmp(bytes, "HEAD ", 5);
    if (end <= 0) return end;
    r->size = (size_t)end;
    r->body = bytes + end;
    memcpy(r->copy, bytes, r->size - 2);
    r->copy[r->size - 2] = '\0';
    for (char *line = r->copy, *next; *line && status == 0; line = next) {
        next = strstr(line, "\r\n") + 2;
        next[-2] = '\0';
        status = line == r->copy ? request_line(r, line)
                                 : request_header(r, line);
    }
    r->keep_alive &= !r->closes; /* whatever else is asked for (9.3) */
    if (status != 0) return -status;
    if (r->header[LENGTH]) r->length = parse_number(r->header[LENGTH]);
    const char *host = r->header[HOST];
    if (host ? !host_valid(host) : !r->old) return -400;
    if (r->authority) {
        if (!*r->authority || !host_valid(r->authority)) return -400;
        r->header[HOST] = r->authority; /* 3.2.2: whatever Host says */
    }
    return r->length < 0 ? -400 : end;
}

/* ---- 6. WebSocket: frames -----------------------------------------------
 * RFC 6455 5.2. From a client every frame is masked, from a server none.
 *
 *    0               1               2               3
 *   +-+-+-+-+-------+-+-------------+-------------------------------+
 *   |F|R|R|R|opcode |M| length      | longer length: 2 bytes if 126,|
 *   |I|S|S|S|       |A| 0..125, or  | 8 bytes if 127                |
 *   |N|V|V|V|       |S| 126 or 127  |                               |
 *   +-+-+-+-+-------+-+-------------+-------------------------------+
 *   | mask key: 4 bytes, if MASK    | payload, byte i XOR key[i % 4]|
 *   +-------------------------------+-------------------------------+
 */
enum opcode { CONTINUATION, TEXT, BINARY, CLOSE = 8, PING, PONG };
#define FRAME_HEADER_MAX 10 /* of a server's frame */

struct frame {
    bool fin;
    uint8_t opcode, mask[4];
    uint64_t size; /* of the payload */
};

/* Returns the size of the header, 0 for "need more", or minus a close code
 * (RFC 6455 7.4.1). */
static int frame_parse(const uint8_t *bytes, size_t size, struct frame *f) {
    if (size < 2) return 0;
    *f = (struct frame){.fin = bytes[0] >> 7, .opcode = bytes[0] & 15};
    f->size = bytes[1] & 127;
    bool control = f->opcode >= CLOSE, masked = bytes[1] >> 7;
    if (bytes[0] & 0x70 || !masked || f->opcode > PONG ||
        (control ? !f->fin || f->size > 125 : f->opcode > BINARY))
        return -1002;
    int longer = f->size == 126 ? 2 : f->size == 127 ? 8 : 0;
    if (size < 2 + (size_t)longer + 4) return 0;
    if (longer) f->size = get_number(bytes + 2, longer);
    if ((longer == 2 && f->size < 126) || f->size > INT64_MAX ||
        (longer == 8 && f->size < 65536)) return -1002; /* not the shortest */
    memcpy(f->mask, bytes + 2 + longer, 4);
    return 2 + longer + 4;
}

/* Writes the header of a server's frame; returns its size. */
static size_t frame_header(uint8_t *out, int opcode, size_t size) {
    int longer = size < 126 ? 0 : size < 65536 ? 2 : 8;
    out[0] = (uint8_t)(0x80 | opcode);
    out[1] = longer == 0 ? (uint8_t)size : longer == 2 ? 126 : 127;
    put_number(out + 2, size, longer);
    return 2 + (size_t)longer;
}

/* Reads a server's frame, as it stands in a log; returns its whole size. */
static size_t frame_read(const uint8_t *at, struct text *payload) {
    int longer = at[1] == 126 ? 2 : at[1] == 127 ? 8 : 0;
    payload->size = longer ? (size_t)get_number(at + 2, longer) : at[1];
    payload->at = (const char *)at + 2 + longer;
    return 2 + (size_t)longer + payload->size;
}

/* Moves n bytes from `in` down to `out` (they may overlap), taking the mask
 * off, eight at a time; leaves the mask turned for the byte after them. */
static void unmask(uint8_t *out, const uint8_t *in, size_t n, uint8_t mask[4]) {
    uint8_t twice[8] = {mask[0], mask[1], mask[2], mask[3],
                        mask[0], mask[1], mask[2], mask[3]};
    uint64_t key, word;
    size_t i = 0;
    memcpy(&key, twice, 8);
    for (; i + 8 <= n; i += 8) {
        memcpy(&word, in + i, 8);
        word ^= key;
        memcpy(out + i, &word, 8);
    }
    for (; i < n; i++) out[i] = in[i] ^ mask[i % 4];
    memcpy(mask, twice + n % 4, 4);
}

/* Checks the payload of a close frame: the code to answer with, 1005 where
 * it has none (RFC 6455 7.4). */
static int close_code(const uint8_t *payload, size_t size) {
    int code = size < 2 ? 0 : (int)get_number(payload, 2);
    if (size == 0) return 1005;
    if (code < 1000 || code > 4999 || (code > 1014 && code < 3000) ||
        (code >= 1004 && code <= 1006)) return 1002;
    return utf8_valid(payload + 2, size - 2) ? code : 1007;
}

/* ---- 7. The data --------------------------------------------------------
 * Who holds what: the server owns clients, channels and the bus; a client in
 * a channel stands in its list; the bus owns its peers. What a client sent
 * and is not done with is in its `in`, what is for it alone in its `out`;
 * all else that it gets, it reads from its channel's log.
 */
struct input {
    size_t size, capacity;
    size_t done; /* [0, done): payload of the unfinished message, unmasked */
    size_t next; /* [next, size): bytes not looked at yet */
    struct frame frame; /* the last one; size: of what is still to come */
    uint8_t opcode; /* of the unfinished message; 0: there is none */
    bool in_frame;
    struct utf8 utf8;
    uint8_t bytes[];
};

/*   accept            101                 close frame, or a response
 *   ------> HTTP -------------> WebSocket -+  that is the last one
 *            |  websocket_open             |  client_finish
 *            +-----------------------------+-----> closing
 *                                                     | all is sent:
 *            any error, time out:                     v client_flush
 *            client_kill ---------> dead <---------- shut, until the other
 *                                    | server_reap   side closes too
 *                                    v
 *                                  freed */
struct client {
    int fd;
    int file;              /* being sent, or -1 */
    bool websocket, nats;  /* else it speaks HTTP */
    bool closing, shut, dead;
    bool blocked;          /* the kernel's send buffer is full */
    bool waiting;          /* for room for its message; in s->waiting */
    bool pinged;
    uint32_t interest;     /* what epoll watches for us */
    int64_t deadline;      /* see client_timeout */
    struct channel *channel;
    struct client *previous, *next; /* in the channel */
    uint64_t cursor;       /* what it has of the log (or of the file) */
    uint64_t boundary;     /* >= cursor: the end of the frames under way, where
                              private bytes may go (of a file: its end) */
    struct ssl_st *tls;    /* NULL: plain TCP */
    struct input *in;      /* NULL: nothing is unfinished */
    struct buffer out;
    size_t out_sent;
    size_t counted;        /* of `out`, in s->unsent */
    struct client *next_waiting, *next_dead;
};

struct channel {
    struct channel *next;  /* in order of use, the latest first */
    struct log log;        /* of frames */
    struct client *at;     /* the next to flush; NULL: no pass is under way */
    bool dirty;            /* has messages that no pass has begun to send */
    bool swept;            /* another pass would move no cursor */
    uint64_t low, next_low; /* no cursor is below; the same, after this pass */
    uint64_t lap;          /* see channel_room: bytes before this offset */
    int64_t lap_time;      /* ... were in the log at this time */
    struct client *clients;
    size_t client_count, name_size;
    char name[CHANNEL_NAME_MAX];
};

#define BLOCK 1200         /* bytes of stream in a datagram at most */
#define WINDOW_BLOCKS 256  /* held of a peer's stream: 300 KiB */
#define WINDOW ((uint64_t)BLOCK * WINDOW_BLOCKS)
#define PEERS_MAX 64       /* other instances known, also the dead */

/* One message in a stream; the channel's name and the payload follow. */
struct record {
    uint64_t sequence, time; /* of posting: see clock in struct bus */
    uint32_t size;           /* of the payload */
    uint16_t opcode, name_size;
};

struct peer {              /* another instance; ours too: see struct bus */
    struct peer *next;
    uint64_t id;           /* random, per start */
    int64_t heard;
    bool joined;           /* no recording: it proved so, or others say so */
    bool alive;            /* joined, and heard in the last 5 s */
    uint64_t time;         /* of its latest STATUS, by its own clock */
    uint64_t acked;        /* what it has of our stream ... */
    int64_t progress;      /* ... and when it last got on with it */
    uint64_t tail, head;   /* what it says it has of its own stream ... */
    struct log log;        /* ... and our copy of the end of it: all is here
                              up to log.head, and further pieces wait behind
                              that, in their places */
    uint64_t start;        /* in log: of the record that comes next ... */
    struct record header;  /* ... and how it begins, once that is here */
    uint16_t filled[WINDOW_BLOCKS]; /* block b is here up to filled[b % n] */
    int64_t block_sent[WINDOW_BLOCKS]; /* when we last sent it from its start */
    uint64_t old;          /* its head when it joined: history before that */
    uint64_t sequence;     /* of the record expected next; 0: any */
};

struct bus {
    int fd;                /* -1: no bus */
    bool group;            /* by multicast; else to a list of peers */
    bool leaves;           /* the machine, so silence deserves a warning */
    struct sockaddr_in to[PEERS_MAX]; /* the group, or a list of peers */
    int to_count;
    struct hmac key;
    uint64_t clock;        /* us since 1970, and after all that we have seen:
                              no answer is older than its question */
    struct peer self;      /* our stream: self.log has the records that we
                              posted, up to self.head they went out. The
                              other instances follow as self.next */
    int64_t status_at;     /* when the next STATUS is due, at the latest; ... */
    int64_t beat_at, beat_gap; /* ... when all is quiet; ... */
    int64_t ask_at;        /* ... while something is missing */
    int64_t met_at;        /* when we last had a peer */
    int64_t error_at;
    bool waits;            /* for older history, delivering nothing */
    int64_t catch_up_end;
};

/* OFF: the bus is another one. AWAY: there is no connection. CALLING: there
 * is one, on which it has not said INFO yet. GREETED: it has. JOINED: it has
 * let us in. */
enum nats_state { OFF, AWAY, CALLING, GREETED, JOINED };

struct nats {
    enum nats_state state;
    bool met;              /* it has let us in once */
    struct client *connection; /* NULL: AWAY, or OFF */
    struct addrinfo *found, *next; /* its addresses; the one to try next */
    char *user, *password; /* no password: user is a token, or none is asked */
    char id[19];           /* in each command, to know our own again */
    size_t max_message;    /* by -m; less if the server takes less */
    uint64_t sent;         /* of the bus's log */
    int64_t progress_at;   /* the last time that all of it, or more, was sent */
    int64_t retry_at;      /* AWAY: to connect; JOINED: to begin to send */
    int64_t backoff;
};

enum metric { /* in the order of the names in answer_metrics */
    CLIENTS, CHANNELS, RECEIVED, SENT, BYTES_IN, BYTES_OUT, SLOW_CLIENTS,
    BUS_PEERS, BUS_IN, BUS_OUT, BUS_REPAIRS, BUS_LOST, BUS_ERRORS, METRICS
};

struct server {
    const char *option[128]; /* values by letter; NULL: not given */
    const char *origins[16];
    char port[8];            /* that we listen on */
    int origin_count;
    size_t max_message, history, max_clients;
    int workers, running;    /* wanted, and there (only the parent counts) */
    bool replaced;           /* one that died: so the start was good */
    struct {
        int listener, bus;   /* open before any starts */
        pid_t pid;           /* 0: it does not run */
    } worker[WORKERS_MAX];
    int epoll, signals, listener, dir, home; /* home: where we started */
    int page;                /* index.html, as a file in memory */
    struct ssl_ctx_st *tls;  /* for new clients; NULL: plain TCP */
    bool accepting, catching_up, announced, stopping;
    int64_t now, tick_at, accept_at, stop_at; /* since the start */
    struct client **clients; /* by descriptor */
    size_t clients_size, connections;
    size_t clients_end;      /* no client's descriptor is that high */
    size_t unsent;           /* bytes in all clients' `out` */
    struct channel *channels; /* the one used last is first */
    struct client *waiting, **waiting_end, *dead;
    struct bus bus;
    struct nats nats;
    uint64_t counters[METRICS];
    char date[40];           /* as in a response, made at date_at */
    time_t date_at;
    struct input *input;     /* the shared read buffer */
};

/* ---- 8. Clients: cursors into a log -------------------------------------
 * What a client is sent, in this order: the rest of a frame that went out
 * in part, its private bytes (responses, pong, close), a file, the log.
 *
 * A socket is a descriptor with its other end across the network. Ours never
 * wait: where recv() has nothing or send() finds no room, errno is EAGAIN, and
 * epoll tells when to try again (EPOLLIN: to read, EPOLLOUT: to send).
 *
 * First the socket, with TLS (make TLS=1; skip it at first) and without. What
 * OpenSSL could not send, it wants to be offered again, more at most: that
 * comes by itself, as a cursor moves only past what was sent.
 */

/* Where `bytes` is NULL, they come out of its file, from its cursor on: the
 * kernel has them, so they are not copied here. What stands before a file
 * waits for it, to go out in the same packet. */
static ssize_t tcp_send(struct client *c, const void *bytes, size_t size) {
    off_t at = (off_t)c->cursor;
    if (!bytes) return sendfile(c->fd, c->file, &at, size);
    return send(c->fd, bytes, size, c->file < 0 ? 0 : MSG_MORE);
}

#ifdef TLS
_Static_assert(READ_SIZE >= TLS_RECORD, "a record must fit");

/* A client that lists what it speaks must list HTTP/1.1 (RFC 7301). */
static int tls_protocol(SSL *tls, const uint8_t **chosen, uint8_t *size,
                        const uint8_t *list, unsigned list_size, void *none) {
    static const uint8_t ours[] = "\x08http/1.1";
    (void)tls, (void)none;
    return SSL_select_next_proto((uint8_t **)(uintptr_t)chosen, size, ours,
                                 sizeof ours - 1, list, list_size) ==
           OPENSSL_NPN_NEGOTIATED ? SSL_TLSEXT_ERR_OK
                                  : SSL_TLSEXT_ERR_ALERT_FATAL;
}

/* Loads certificate and key for clients to come. If that fails it says so on
 * stderr, and what was loaded before stays. */
static bool tls_load(struct server *s) {
    const char *cert = s->option['C'], *key = s->option['K'];
    SSL_CTX *tls = SSL_CTX_new(TLS_server_method());
    if (tls) SSL_CTX_set_default_passwd_cb_userdata(tls, ""); /* do not ask */
    if (!tls || !SSL_CTX_set_min_proto_version(tls, TLS1_2_VERSION) ||
        SSL_CTX_use_certificate_chain_file(tls, cert) != 1 ||
        SSL_CTX_use_PrivateKey_file(tls, key, SSL_FILETYPE_PEM) != 1 ||
        SSL_CTX_check_private_key(tls) != 1) {
        fprintf(stderr, "chat: %s, %s: %s\n", cert, key,
                ERR_error_string(ERR_get_error(), NULL));
        SSL_CTX_free(tls);
        return false;
    }
    SSL_CTX_set_mode(tls, SSL_MODE_ENABLE_PARTIAL_WRITE | /* as send() does */
                              SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER |
                              SSL_MODE_RELEASE_BUFFERS); /* when idle */
    SSL_CTX_clear_mode(tls, SSL_MODE_AUTO_RETRY); /* so that all get a turn */
    SSL_CTX_set_options(tls, SSL_OP_NO_RENEGOTIATION);
    SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF); /* but tickets */
    SSL_CTX_set_alpn_select_cb(tls, tls_protocol, NULL);
    SSL_CTX_free(s->tls); /* goes when the last of its clients does */
    s->tls = tls;
    return true;
}

/* What recv() or send() would return. */
static ssize_t tls_result(struct client *c, int result) {
    int error = SSL_get_error(c->tls, result);
    bool wait = error == SSL_ERROR_WANT_READ || error == SSL_ERROR_WANT_WRITE;
    c->blocked |= error == SSL_ERROR_WANT_WRITE;
    errno = wait ? EAGAIN : ECONNRESET;
    return result > 0 ? result : error == SSL_ERROR_ZERO_RETURN ? 0 : -1;
}

static ssize_t socket_recv(struct client *c, void *bytes, size_t size) {
    if (!c->tls || c->shut) return recv(c->fd, bytes, size, 0);
    ERR_clear_error();
    return tls_result(c, SSL_read(c->tls, bytes, (int)size));
}

static ssize_t socket_send(struct client *c, const void *bytes, size_t size) {
    char chunk[READ_SIZE];
    ssize_t sent = 0, n = 1;
    if (!c->tls) return tcp_send(c, bytes, size);
    if (!bytes) {
        n = pread(c->file, chunk, size < READ_SIZE ? size : READ_SIZE,
                  (off_t)c->cursor);
        if (n <= 0) return n;
        bytes = chunk;
        size = (size_t)n;
    }
    while (n > 0 && sent < (ssize_t)size) { /* a record at a time */
        ERR_clear_error();
        n = tls_result(c, SSL_write(c->tls, (const char *)bytes + sent,
                                    (int)((ssize_t)size - sent)));
        if (n > 0) sent += n;
    }
    return sent > 0 ? sent : n;
}

/* The first SSL_read() will shake hands. */
static bool socket_open(struct client *c, SSL_CTX *tls) {
    c->tls = tls ? SSL_new(tls) : NULL;
    if (c->tls) SSL_set_accept_state(c->tls);
    return !tls || (c->tls && SSL_set_fd(c->tls, c->fd));
}

static void socket_shutdown(struct client *c) {
    if (c->tls) SSL_shutdown(c->tls);
    shutdown(c->fd, SHUT_WR);
}

static void socket_close(struct client *c) {
    if (c->tls && !c->shut) SSL_shutdown(c->tls);
    SSL_free(c->tls);
    close(c->fd);
}
#else
static bool tls_load(struct server *s) {
    (void)s;
    option_error("cert", "this chat was built without TLS (make TLS=1)");
}

static bool socket_open(const struct client *c, const void *tls) {
    return !tls && !c->tls;
}

#define socket_recv(c, bytes, size) recv((c)->fd, bytes, size, 0)
#define socket_send tcp_send
#define socket_shutdown(c) shutdown((c)->fd, SHUT_WR)
#define socket_close(c) close((c)->fd)
#endif

/* Owns fd from here on. NULL: it could not, and fd is closed. */
static struct client *client_add(struct server *s, int fd,
                                 struct ssl_ctx_st *tls) {
    struct client *c = NULL;
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    if ((size_t)fd < s->clients_size) c = calloc(1, sizeof *c);
    if (!c) {
        close(fd);
        return NULL;
    }
    c->fd = fd;
    bool good = socket_open(c, tls) &&
                !epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event);
    if (!good) {
        socket_close(c);
        free(c);
        return NULL;
    }
    c->file = -1;
    c->interest = EPOLLIN;
    c->deadline = s->now + REQUEST_TIME;
    s->clients[fd] = c;
    s->connections++;
    if ((size_t)fd >= s->clients_end) s->clients_end = (size_t)fd + 1;
    return c;
}

/* Marks it dead; server_reap frees it when the round ends. So a caller may go
 * on with it, and asks c->dead where that matters. */
static void client_kill(struct server *s, struct client *c) {
    if (c->dead) return;
    c->dead = true;
    c->next_dead = s->dead;
    s->dead = c;
}

static void channel_insert(struct channel *ch, struct client *c) {
    if (c->cursor < ch->next_low) ch->next_low = c->cursor;
    c->channel = ch;
    c->previous = NULL;
    c->next = ch->clients;
    if (c->next) c->next->previous = c;
    ch->clients = c;
    ch->client_count++;
}

/* It ends, or will stand elsewhere in the list: see websocket_step. */
static void channel_remove(struct client *c) {
    struct channel *ch = c->channel;
    if (ch == NULL) return;
    if (ch->at == c) {
        ch->at = c->next;
        ch->swept = false; /* a pass that so ends does not tell `low` */
    }
    if (c->next) c->next->previous = c->previous;
    if (c->previous) c->previous->next = c->next;
    else ch->clients = c->next;
    ch->client_count--;
    c->channel = NULL;
}

/* Tells epoll what we want to hear of this client. It is read only when
 * its private bytes are out: who asks much and reads nothing waits. (A NATS
 * server may wait for us to read before it reads on itself.) */
static void client_watch(struct server *s, struct client *c) {
    bool busy = c->closing || c->waiting || c->file >= 0 ||
                (c->out.size && !c->nats);
    s->unsent += c->out.size - c->counted;
    c->counted = c->out.size;
    uint32_t interest = (!busy || c->shut ? EPOLLIN : 0) |
                        (c->blocked ? EPOLLOUT : 0);
    if (c->dead || interest == c->interest) return;
    struct epoll_event event = {.events = interest, .data.fd = c->fd};
    epoll_ctl(s->epoll, EPOLL_CTL_MOD, c->fd, &event); /* cannot fail */
    c->interest = interest;
}

/* Sends what the kernel takes; returns how much that was. If that is not all,
 * it is blocked until EPOLLOUT. */
static size_t client_send(struct server *s, struct client *c, const void *bytes,
                          size_t size) {
    ssize_t n = socket_send(c, bytes, size);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        client_kill(s, c); /* 0: the file shrank; it ends in an error */
    c->blocked = n < (ssize_t)size;
    if (n <= 0) return 0;
    s->counters[BYTES_OUT] += (uint64_t)n;
    if (!c->websocket && !c->nats) c->deadline = s->now + IDLE_TIME;
    return (size_t)n;
}

static void client_close_file(struct server *s, struct client *c) {
    if (c->file >= 0 && c->file != s->page) close(c->file);
    c->file = -1;
}

/* Sends all that is due, until it is out or the kernel's buffer is full. Who
 * would miss private bytes, because there was no memory for them, is cut off
 * here: so nobody who adds to `out` need look. */
static void client_flush(struct server *s, struct client *c) {
    struct log *log = c->channel ? &c->channel->log : NULL;
    if (c->out.failed) client_kill(s, c);
    while (!c->dead && !c->blocked) {
        if (log && c->cursor < c->boundary) {
            c->cursor += client_send(s, c, log_at(log, c->cursor),
                                     c->boundary - c->cursor);
        } else if (c->out.size > 0) {
            c->out_sent += client_send(s, c, c->out.bytes + c->out_sent,
                                       c->out.size - c->out_sent);
            if (c->out_sent < c->out.size) break;
            buffer_clear(&c->out);
            c->out_sent = 0;
        } else if (c->file >= 0) {
            c->cursor += client_send(s, c, NULL, c->boundary - c->cursor);
            if (c->cursor == c->boundary) client_close_file(s, c);
        } else if (log && !c->closing && c->cursor < log->head) {
            c->boundary = log->head;
        } else {
            break;
        }
    }
    if (c->closing && !c->shut && !c->blocked && !c->dead) {
        /* Close our half, read on until the other side closes its own: a
         * close() now would answer bytes still on their way with a reset,
         * and a reset can overtake what we sent. */
        channel_remove(c);
        socket_shutdown(c);
        c->shut = true;
        c->deadline = s->now + CLOSE_TIME;
    }
    client_watch(s, c);
}

/* No more input counts; what is queued goes out, then it is closed. */
static void client_finish(struct server *s, struct client *c) {
    c->closing = true;
    c->deadline = s->now + CLOSE_TIME;
}

/* Its message has to wait: the step that posts it returns false, and is done
 * again at the end of each round. */
static void client_wait(struct server *s, struct client *c) {
    c->waiting = true;
    c->next_waiting = NULL;
    *s->waiting_end = c;
    s->waiting_end = &c->next_waiting;
}

/* ---- 9. Channels --------------------------------------------------------
 * Made when first named. A message is encoded once, appended to the log, and
 * after the round each client gets all that is new with one send(). Channels
 * without clients are kept for their history, until there are too many: then
 * the one that was not used for longest goes.
 */
static void channel_free(struct server *s, struct channel **link) {
    struct channel *ch = *link;
    *link = ch->next;
    log_close(&ch->log);
    free(ch);
    s->counters[CHANNELS]--;
}

/* Finds a channel, and puts it in front. NULL: there is none. */
static struct channel *channel_find(struct server *s, struct text name) {
    struct channel **link = &s->channels, *ch;
    for (ch = *link; ch; link = &ch->next, ch = *link)
        if (ch->name_size == name.size &&
            !memcmp(ch->name, name.at, name.size)) {
            *link = ch->next;
            ch->next = s->channels;
            s->channels = ch;
            return ch;
        }
    return NULL;
}

/* Finds or makes a channel. NULL: no memory, or every one has clients. */
static struct channel *channel_get(struct server *s, struct text name) {
    struct channel *ch = channel_find(s, name), **idle = NULL;
    if (ch) return ch;
    for (struct channel **at = &s->channels; *at; at = &(*at)->next)
        if (!(*at)->clients && !(*at)->dirty) idle = at;
    bool full = s->counters[CHANNELS] >= CHANNELS_MAX;
    if (full && idle) channel_free(s, idle);
    else if (full) return NULL;
    ch = calloc(1, sizeof *ch);
    if (!ch || !log_open(&ch->log, s->history)) {
        free(ch);
        return NULL;
    }
    memcpy(ch->name, name.at, name.size);
    ch->name_size = name.size;
    ch->next = s->channels;
    s->channels = ch;
    s->counters[CHANNELS]++;
    return ch;
}

/* Puts a client into the channel, `offset` being its cursor. */
static void channel_join(struct server *s, struct channel *ch, struct client *c,
                         uint64_t offset) {
    c->cursor = c->boundary = offset;
    channel_insert(ch, c);
    ch->swept = false;
    if (offset < ch->low) ch->low = offset;
    /* Who starts with old messages gets the time to read them: a new lap,
     * but not so often that joining could hold a channel up for long. */
    if (offset < ch->log.head && s->now - ch->lap_time >= 2 * SLOW_TIME) {
        ch->lap = ch->log.head;
        ch->lap_time = s->now;
    }
}

/* Sends the new messages to the next SLICE clients. In a channel with more,
 * a pass through all takes several rounds, so that its length holds up
 * neither new input nor other channels. */
static void channel_flush(struct server *s, struct channel *ch) {
    if (!ch->at) {
        ch->at = ch->clients;
        ch->next_low = ch->log.head;
        ch->swept = true;
        ch->dirty = false;
    }
    for (int i = 0; ch->at && i < SLICE; i++) {
        struct client *c = ch->at;
        ch->at = c->next; /* a client that has finished leaves */
        if (!c->blocked) client_flush(s, c);
        if (!c->dead && c->channel == ch && c->cursor < ch->next_low)
            ch->next_low = c->cursor;
    }
    if (!ch->at) ch->low = ch->next_low;
}

/* Makes room for a message at the log's head. What clients were not sent yet
 * is sent first. If some client would still lose bytes, the answer is false
 * ("not now") as long as these bytes are in the log for less than `patience`
 * milliseconds; then such clients are cut off as too slow.
 *
 * How old bytes are is known a lap at a time: what is before `lap` was there
 * at lap_time. A lap is a whole log, so a channel moves at least its log's
 * size in that time, whatever its readers do. */
static bool channel_room(struct server *s, struct channel *ch, size_t size,
                         int64_t patience) {
    struct log *log = &ch->log;
    struct text payload;
    uint64_t tail = log->tail;
    while (log->head + FRAME_HEADER_MAX + size - tail > log->size)
        tail += frame_read(log_at(log, tail), &payload);
    if (tail > ch->lap) {
        ch->lap = log->head;
        ch->lap_time = s->now;
    }
    if (ch->low < tail && (ch->at || !ch->swept)) channel_flush(s, ch);
    if (ch->low < tail && s->now - ch->lap_time < patience) return false;
    for (struct client *c = ch->clients, *next; ch->low < tail && c; c = next) {
        next = c->next;
        if (c->cursor < tail && !c->blocked) client_flush(s, c);
        if (c->cursor >= tail || c->dead || c->channel != ch) continue;
        client_kill(s, c);
        s->counters[SLOW_CLIENTS]++;
    }
    if (ch->low < tail) ch->low = tail;
    log->tail = tail;
    return true;
}

/* Appends a message as a frame; channel_room has made the room. */
static void channel_append(struct server *s, struct channel *ch, int opcode,
                           struct text message) {
    uint8_t header[FRAME_HEADER_MAX];
    size_t size = frame_header(header, opcode, message.size);
    log_append(&ch->log, header, size);
    log_append(&ch->log, message.at, message.size);
    s->counters[SENT] += ch->client_count;
    ch->swept = false;
    ch->dirty = true;
}

/* ---- 10. The bus between instances --------------------------------------
 * UDP carries datagrams: each comes whole or not at all, perhaps late or twice.
 * One to the address of a multicast group reaches all who have joined it.
 *
 * What an instance posts is appended to its own log of records, and the bus
 * carries that stream of bytes, as TCP does, but to many receivers at once:
 * by multicast, or by unicast to a list of peers. Small messages are so
 * packed, big ones cut and lost ones repaired without code of their own.
 * There are two datagrams (numbers are little-endian):
 *
 *   mac 20 | DATA 4   | sender 8 | offset 8 | tail 8 | head 8 | bytes of the
 *            stream from `offset` on, within one block
 *   mac 20 | STATUS 4 | sender 8 | time 8   | tail 8 | head 8 | for each
 *            sender that is known: id 8 | echo 8 | tail 8 | need 8 | bitmap 32
 *   LEAVE is a STATUS, the sender's last.
 *
 * mac is the HMAC-SHA1 of what follows. offset, tail, head and need count
 * bytes of the stream; a block is BLOCK bytes of it; head is the end of what
 * went out. need is the first byte that the sender of the STATUS lacks; bit
 * i of the bitmap says that it has all of block i behind the one that need
 * is in; from the entry's tail to need it could send the stream itself. echo
 * is the latest time that it saw in a STATUS of that id.
 *
 * A STATUS tells state, not events: so a lost one is made good by the next,
 * and one kind serves as heartbeat, request, receipt and membership. It goes
 * out when something is missing, some time after the last DATA (the only
 * cure for a lost last message), and every second.
 *
 * Who is new begins at the tails of the others' logs, and of what they hold
 * of the dead: so an instance that is restarted has its own words again. For
 * a sender that is silent, any of the others repairs.
 *
 * Promised: instances that live lose nothing (but what is larger than their
 * own -m), and each sender's messages come in order. Not promised: one order
 * between senders, delivery to who is silent for longer than a log lasts (it
 * is told how much it missed), and secrecy (use a tunnel). A recording is no
 * danger: DATA counts only from a peer whose STATUS has echoed a recent time
 * of ours (or that such a peer tells us of), and never twice.
 */
enum { DATA = 1, STATUS, LEAVE };
#define ASK_TIME 10             /* between requests while bytes are missing */
#define ASK_JITTER 5            /* so that not all ask for the same bytes */
#define LINGER_TIME 4           /* a block on its way is not sent again, ... */
#define BULK_TIME 15            /* ... nor where many are */
#define BEAT_FIRST 20           /* after the last DATA, doubling ... */
#define BEAT_LAST SECOND        /* ... up to this */
#define RECEIPT_TIME 200        /* at most, from DATA to a STATUS */
#define HOLD_TIME 250           /* that new bytes wait for a stuck peer */
#define REPAIRS_MAX 64          /* for one STATUS */
#define HELLO_TIME 100          /* at start, for others to make known */
#define CATCH_UP_TIME (2 * SECOND) /* since the last with history joined */
#define ECHO_TIME (uint64_t)(10 * SECOND) /* a "recent time of ours" */
#define ALIVE_TIME (5 * SECOND) /* of silence, then nobody waits for it */
#define PEER_TIME (600 * SECOND) /* then it is forgotten */

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the bus's datagrams are structs in little-endian order"
#endif

struct entry {
    uint64_t id, echo, tail, need;
    uint8_t bitmap[WINDOW_BLOCKS / 8];
};

struct datagram {
    uint8_t mac[SHA1_SIZE];
    uint32_t kind;
    uint64_t sender;
    union {
        uint64_t offset, time;
    };
    uint64_t tail, head;
    union {
        uint8_t bytes[BLOCK];
        struct entry known[PEERS_MAX];
    };
};
#define DATAGRAM_HEADER offsetof(struct datagram, bytes)

/* The whole size of a record, whose header is there; 0: it can be none. */
static size_t record_size(const void *bytes) {
    struct record r;
    memcpy(&r, bytes, sizeof r);
    if (r.size > MESSAGE_MAX || r.name_size > CHANNEL_NAME_MAX ||
        (r.opcode != TEXT && r.opcode != BINARY)) return 0;
    return sizeof r + r.name_size + r.size;
}

/* Is this a datagram of ours? The MAC is checked elsewhere. */
static bool datagram_valid(const struct datagram *d, size_t size) {
    if (size < DATAGRAM_HEADER || d->head > INT64_MAX || d->tail > d->head)
        return false;
    size -= DATAGRAM_HEADER;
    if (d->kind == DATA) /* within the stream, and within one block */
        return size > 0 && d->offset <= d->head && size <= d->head - d->offset
               && d->offset % BLOCK + size <= BLOCK;
    return (d->kind == STATUS || d->kind == LEAVE) &&
           size % sizeof(struct entry) == 0;
}

/* A message error: counted, told once in a while, never fatal. */
static void bus_error(struct server *s, const char *what) {
    unsigned long long count = ++s->counters[BUS_ERRORS];
    if (s->now < s->bus.error_at) return;
    s->bus.error_at = s->now + 10 * SECOND;
    fprintf(stderr, "chat: message error on the bus: %.200s (%llu so far)\n",
            what, count);
}

/* Signs and sends. Best effort: what the kernel does not take is lost like
 * any other datagram, and mended like it. */
static void bus_send(struct server *s, struct datagram *d, size_t size) {
    struct bus *b = &s->bus;
    hmac_sign(&b->key, &d->kind, size - SHA1_SIZE, d->mac);
    for (int i = 0; i < b->to_count; i++)
        sendto(b->fd, d, size, 0, (struct sockaddr *)&b->to[i], sizeof *b->to);
    s->counters[BUS_OUT] += (uint64_t)b->to_count;
}

/* Sends [from, end) of a stream, ours or a peer's in its place, or what of it
 * is in from's block. Returns where it stopped. */
static uint64_t bus_send_data(struct server *s, struct peer *p, uint64_t from,
                              uint64_t end) {
    struct datagram d = {.kind = DATA, .sender = p->id, .offset = from,
                         .tail = p->log.tail, .head = end};
    uint64_t block = from / BLOCK, to = (block + 1) * BLOCK;
    if (to > end) to = end;
    memcpy(d.bytes, log_at(&p->log, from), to - from);
    if (from % BLOCK == 0) p->block_sent[block % WINDOW_BLOCKS] = s->now;
    bus_send(s, &d, DATAGRAM_HEADER + (to - from));
    return to;
}

static void bus_send_status(struct server *s, uint32_t kind) {
    struct bus *b = &s->bus;
    struct peer *p = &b->self;
    p->time = p->time < (uint64_t)s->now ? (uint64_t)s->now : p->time + 1;
    struct datagram d = {.kind = kind, .sender = p->id, .time = p->time,
                         .tail = p->log.tail, .head = p->head};
    struct entry *e = d.known;
    for (p = p->next; p; p = p->next, e++) {
        *e = (struct entry){p->id, p->time, p->log.tail, p->log.head, {0}};
        for (uint64_t i = 1; i < WINDOW_BLOCKS; i++)
            if (p->filled[(p->log.head / BLOCK + i) % WINDOW_BLOCKS] == BLOCK)
                e->bitmap[i / 8] |= (uint8_t)(1 << i % 8);
    }
    bus_send(s, &d, (size_t)((uint8_t *)e - (uint8_t *)&d));
}

/* Wants a STATUS to go out within `delay`. */
static void bus_hurry(struct server *s, int64_t delay) {
    s->bus.status_at = earlier(s->bus.status_at, s->now + delay);
}

/* It holds four of the largest messages at least, as a channel's log does. */
static size_t bus_log_size(const struct server *s) {
    return s->history > 4 * MIB ? s->history : 4 * MIB;
}

/* Makes room for another record. False: "not now", a live peer still needs
 * what it would overwrite. */
static bool bus_room(struct server *s, size_t size) {
    struct log *log = &s->bus.self.log;
    uint64_t tail = log->tail;
    if (!log->ring) return true;
    size += sizeof(struct record) + CHANNEL_NAME_MAX;
    while (log->head + size - tail > log->size)
        tail += record_size(log_at(log, tail));
    for (struct peer *p = s->bus.self.next; p; p = p->next)
        if (p->alive && p->acked < tail) return false;
    log->tail = tail;
    return true;
}

/* Posts a message; bus_room has made the room. It goes out with all others
 * of this round. */
static void bus_post(struct server *s, struct channel *ch, int opcode,
                     struct text message) {
    struct bus *b = &s->bus;
    if (!b->self.log.ring) return;
    uint64_t now = (uint64_t)clock_us(CLOCK_REALTIME);
    b->clock = now > b->clock ? now : b->clock + 1;
    struct record r = {++b->self.sequence, b->clock, (uint32_t)message.size,
                       (uint16_t)opcode, (uint16_t)ch->name_size};
    log_append(&b->self.log, &r, sizeof r);
    log_append(&b->self.log, ch->name, ch->name_size);
    log_append(&b->self.log, message.at, message.size);
}

/* Sends what is new, but not beyond the window of the slowest peer. (One that
 * makes no progress, or is further behind, holds nobody up: it will ask.) */
static void bus_flush(struct server *s) {
    struct bus *b = &s->bus;
    uint64_t from = b->self.head, limit = b->self.log.head;
    if (b->fd < 0) return;
    for (struct peer *p = b->self.next; p; p = p->next) {
        uint64_t end = (p->acked / BLOCK + WINDOW_BLOCKS) * BLOCK;
        if (p->acked >= from) p->progress = s->now;
        if (p->alive && end >= from && end < limit &&
            s->now - p->progress < HOLD_TIME) limit = end;
    }
    if (limit <= from) return;
    b->self.head = limit;
    b->beat_gap = BEAT_FIRST;
    b->beat_at = s->now + BEAT_FIRST;
    while (s->counters[BUS_PEERS] && from < limit)
        from = bus_send_data(s, &b->self, from, limit);
}

/* Sends again what an entry lacks of a stream: each block that is not whole,
 * from its start, so that one datagram does for all who lack some of it. */
static void bus_repair(struct server *s, struct peer *p,
                       const struct entry *e) {
    uint64_t end = p == &s->bus.self ? p->head : p->log.head;
    uint64_t from = e->need / BLOCK * BLOCK, next;
    int64_t linger = end - e->need > WINDOW / 8 ? BULK_TIME : LINGER_TIME;
    int count = 0;
    if (e->need < p->log.tail || e->need >= end) return;
    if (from < p->log.tail) from = p->log.tail;
    for (int i = 0; i < WINDOW_BLOCKS && from < end; i++, from = next) {
        int64_t sent = p->block_sent[from / BLOCK % WINDOW_BLOCKS];
        next = (from / BLOCK + 1) * BLOCK;
        if (e->bitmap[i / 8] >> i % 8 & 1 || s->now - sent < linger) continue;
        if (count++ == REPAIRS_MAX) return;
        bus_send_data(s, p, from, end);
        s->counters[BUS_REPAIRS]++;
    }
}

/* Goes on at `offset`, where a record should begin. */
static void peer_skip(struct peer *p, uint64_t offset) {
    p->log.tail = p->log.head = p->start = offset;
    memset(p->filled, 0, sizeof p->filled);
    p->filled[offset / BLOCK % WINDOW_BLOCKS] = offset % BLOCK;
}

/* Moves log.head on to the end of the peer's next record. False: more has to
 * come first. */
static bool peer_next(struct server *s, struct peer *p) {
    struct log *log = &p->log;
    if (log->head < p->tail) peer_skip(p, p->tail);
    for (;;) {
        size_t here = log->head - p->start, goal = sizeof p->header;
        if (here >= goal) {
            memcpy(&p->header, log_at(log, p->start), goal);
            goal = record_size(&p->header);
        }
        if (here == goal) return true;
        if (goal == 0 || goal > log->size - WINDOW) {
            bus_error(s, "a record too big or without sense, skipped");
            /* Amid a record, the latter comes again. */
            peer_skip(p, goal ? p->start + goal : p->head);
            return false;
        }
        uint16_t *filled = &p->filled[log->head / BLOCK % WINDOW_BLOCKS];
        size_t n = *filled - log->head % BLOCK;
        if (n == 0) return false;
        log->head += n < goal - here ? n : goal - here;
        if (log->head % BLOCK == 0) *filled = 0; /* for a block to come */
        if (log->head % (WINDOW / 4) == 0) bus_hurry(s, 0); /* a receipt */
    }
}

/* Is there history of this peer that we wait for, so as to show what came
 * from several in order of post time? */
static bool peer_lags(const struct server *s, const struct peer *p) {
    if (s->now >= s->bus.catch_up_end) return false;
    return p->joined ? p->log.head < p->old : s->now - p->heard < SECOND;
}

/* Gives a message from another instance to our clients. False: "not now", its
 * channel waits for slow readers. */
static bool bus_message(struct server *s, struct text name, int opcode,
                        struct text message) {
    bool valid = message.size <= s->max_message && opcode != 0 &&
                 name.size <= CHANNEL_NAME_MAX &&
                 utf8_valid(name.at, name.size) &&
                 (opcode != TEXT || utf8_valid(message.at, message.size));
    struct channel *ch = valid ? channel_get(s, name) : NULL;
    if (!valid) bus_error(s, "a message too big or not UTF-8");
    if (ch && !channel_room(s, ch, message.size, BUS_SLOW_TIME)) return false;
    if (ch) channel_append(s, ch, opcode, message);
    return true;
}

/* Delivers the peer's next message, which is whole. False: "not now". */
static bool peer_deliver(struct server *s, struct peer *p) {
    struct record r = p->header;
    struct text name = {(char *)log_at(&p->log, p->start) + sizeof r,
                        r.name_size};
    struct text message = {name.at + name.size, r.size};
    if (!bus_message(s, name, r.opcode, message)) return false;
    if (p->sequence != 0 && r.sequence > p->sequence) {
        unsigned long long lost = r.sequence - p->sequence, id = p->id;
        s->counters[BUS_LOST] += lost;
        fprintf(stderr, "chat: lost %llu messages from %016llx\n", lost, id);
    }
    p->sequence = r.sequence + 1;
    if (r.time > s->bus.clock && r.time < INT64_MAX) s->bus.clock = r.time;
    p->start = p->log.head;
    return true;
}

/* Delivers what has come, the oldest first: until a channel has no room for
 * it, and not while there is older history still to come. */
static void bus_deliver(struct server *s) {
    struct peer *oldest;
    do {
        oldest = NULL;
        s->bus.waits = s->bus.fd >= 0 && s->now < HELLO_TIME;
        struct peer *p = s->bus.self.next;
        for (; p && !s->bus.waits; p = p->next) {
            bool ready = peer_next(s, p);
            s->bus.waits = !ready && peer_lags(s, p);
            if (ready && (!oldest || p->header.time < oldest->header.time))
                oldest = p;
        }
    } while (!s->bus.waits && oldest && peer_deliver(s, oldest));
    if (oldest) bus_hurry(s, BUS_SLOW_TIME / 4); /* to try again */
}

static void bus_data_in(struct server *s, struct peer *p, struct datagram *d,
                        size_t size) {
    struct log *log = &p->log;
    uint64_t block = d->offset / BLOCK, ahead = block - log->head / BLOCK;
    uint64_t start = d->offset % BLOCK, end = start + size;
    uint16_t *filled = &p->filled[block % WINDOW_BLOCKS];
    if (!p->joined) return;
    if (d->head > p->head) p->head = d->head;
    bus_hurry(s, RECEIPT_TIME);
    if (ahead >= WINDOW_BLOCKS || start > *filled || end <= *filled) return;
    while (log->tail < p->start && log->tail + log->size < d->offset + size)
        log->tail += record_size(log_at(log, log->tail)); /* what it covers */
    /* Not what was there before: it may be consumed already. */
    memcpy(log_at(log, block * BLOCK + *filled), d->bytes + *filled - start,
           end - *filled);
    *filled = (uint16_t)end;
}

static void peer_alive(struct server *s, struct peer *p, bool alive) {
    if (p->alive == alive) return;
    p->alive = alive;
    if (p->acked < s->bus.self.log.tail) p->acked = s->bus.self.log.tail;
    s->counters[BUS_PEERS] += alive ? 1 : (uint64_t)-1;
    fprintf(stderr, "chat: peer %016llx %s\n", (unsigned long long)p->id,
            alive ? "joined" : "left");
}

/* What comes of its stream counts from now on. If both have been up for longer
 * than either remembers the other, its history was shown here long ago, or
 * is too late. */
static void peer_join(struct server *s, struct peer *p) {
    bool met = (int64_t)p->time > PEER_TIME && s->now > PEER_TIME;
    p->joined = true;
    p->old = p->head;
    if (met) peer_skip(p, p->head);
    else if (p->tail < p->head) s->bus.catch_up_end = s->now + CATCH_UP_TIME;
}

static void peer_forget(struct server *s, struct peer *p) {
    struct peer *before = &s->bus.self;
    while (before->next != p) before = before->next;
    before->next = p->next;
    log_close(&p->log);
    free(p);
}

/* Finds a peer, or ourselves, by id. A STATUS may make a new one, in the place
 * of the dead one silent for longest if there are too many. NULL: none. */
static struct peer *bus_peer(struct server *s, uint64_t id, bool make) {
    struct peer *dead = NULL;
    int count = 0;
    if (id == s->bus.self.id) return &s->bus.self;
    for (struct peer *p = s->bus.self.next; p; p = p->next, count++) {
        if (p->id == id) return p;
        if (!p->alive && (!dead || p->heard < dead->heard)) dead = p;
    }
    if (!make || (count == PEERS_MAX && !dead)) return NULL;
    if (count == PEERS_MAX) peer_forget(s, dead);
    struct peer *p = calloc(1, sizeof *p);
    size_t record = sizeof p->header + CHANNEL_NAME_MAX + s->max_message;
    if (!p || !log_open(&p->log, WINDOW + record)) {
        free(p);
        return NULL;
    }
    p->id = id;
    p->next = s->bus.self.next;
    s->bus.self.next = p;
    return p;
}

/* A peer that is alive has told what it has of a stream. Of ours, we send it
 * what it lacks; of one whose sender is silent, about one of us does. Who is
 * new learns so of those that are silent. */
static void bus_entry_in(struct server *s, struct peer *from,
                         const struct entry *e) {
    bool news = s->now < CATCH_UP_TIME && e->tail < e->need &&
                e->need <= INT64_MAX;
    struct peer *p = bus_peer(s, e->id, news);
    if (p == &s->bus.self) {
        if (e->need > from->acked && e->need <= p->head) {
            from->acked = e->need;
            from->progress = s->now;
        }
        bus_repair(s, p, e);
    } else if (p && news && !p->time && e->need > p->head) {
        p->tail = e->tail;
        p->head = e->need;
        peer_join(s, p);
    } else if (p && p->joined && s->now - p->heard >= HOLD_TIME &&
               random() % (long)s->counters[BUS_PEERS] == 0) {
        bus_repair(s, p, e);
    }
}

static void bus_status_in(struct server *s, struct peer *p, struct datagram *d,
                          size_t size) {
    struct bus *b = &s->bus;
    struct entry *end = d->known + size / sizeof *d->known;
    bool fresh = false;
    if (d->time <= p->time) return; /* overtaken, or a recording */
    p->time = d->time;
    p->tail = d->tail;
    if (d->head > p->head) p->head = d->head;
    for (struct entry *e = d->known; e < end; e++)
        if (e->id == b->self.id) fresh = b->self.time - e->echo < ECHO_TIME;
    if (fresh && !p->joined) peer_join(s, p);
    if (fresh || !p->joined) p->heard = s->now;
    if (fresh) peer_alive(s, p, d->kind != LEAVE);
    for (struct entry *e = d->known; p->alive && e < end; e++)
        bus_entry_in(s, p, e);
    if (!p->joined) bus_hurry(s, random() % ASK_JITTER); /* with an echo */
}

static void bus_datagram_in(struct server *s, struct datagram *d, size_t size) {
    uint8_t mac[SHA1_SIZE], difference = 0;
    if (!datagram_valid(d, size)) {
        bus_error(s, "not a datagram of ours");
        return;
    }
    if (d->sender == s->bus.self.id) return;
    s->counters[BUS_IN]++;
    hmac_sign(&s->bus.key, &d->kind, size - SHA1_SIZE, mac);
    for (int i = 0; i < SHA1_SIZE; i++) /* in constant time: it tells nothing */
        difference |= mac[i] ^ d->mac[i];
    if (difference != 0) {
        bus_error(s, "wrong secret");
        return;
    }
    struct peer *p = bus_peer(s, d->sender, d->kind == STATUS);
    if (p && d->kind == DATA) bus_data_in(s, p, d, size - DATAGRAM_HEADER);
    else if (p) bus_status_in(s, p, d, size - DATAGRAM_HEADER);
}

static void bus_readable(struct server *s) {
    struct datagram d;
    for (int i = 0; i < WINDOW_BLOCKS; i++) { /* then the clients' turn */
        ssize_t n = recv(s->bus.fd, &d, sizeof d, 0);
        if (n < 0) return;
        bus_datagram_in(s, &d, (size_t)n);
    }
}

/* Asks for what is missing, beats, forgets. Returns when it is due again. */
static int64_t bus_tick(struct server *s) {
    struct bus *b = &s->bus;
    bool missing = false;
    if (b->fd < 0) return INT64_MAX;
    for (struct peer *p = b->self.next, *next; p; p = next) {
        next = p->next;
        missing |= p->log.head < p->head && (p->alive || peer_lags(s, p));
        if (s->now - p->heard >= ALIVE_TIME) peer_alive(s, p, false);
        if (s->now - p->heard >= PEER_TIME) peer_forget(s, p);
    }
    if (!missing)
        b->ask_at = INT64_MAX; /* it has come meanwhile */
    else if (b->ask_at == INT64_MAX)
        b->ask_at = s->now + random() % ASK_JITTER;
    if (s->now >= earlier(b->status_at, earlier(b->beat_at, b->ask_at))) {
        bus_send_status(s, STATUS);
        b->status_at = s->now + BEAT_LAST;
        b->beat_gap = earlier(b->beat_gap * 2, BEAT_LAST);
        b->beat_at = s->now + b->beat_gap;
        if (missing) b->ask_at = s->now + ASK_TIME - 2 + random() % ASK_JITTER;
    }
    if (s->counters[BUS_PEERS] > 0) b->met_at = s->now;
    if (b->leaves && s->now - b->met_at >= 10 * SECOND) {
        fprintf(stderr, "chat: no peer heard on the bus for 10 s\n");
        b->met_at = INT64_MAX; /* once is enough */
    }
    return earlier(b->status_at, earlier(b->beat_at, b->ask_at));
}

/* Joins the multicast group on the interface. */
static void bus_join_group(struct server *s, int fd) {
    struct bus *b = &s->bus;
    const char *hops = s->option['t'];
    int on = 1, off = 0, ttl = hops ? (int)parse_number(hops) : b->leaves;
    int interface = (int)if_nametoindex(s->option['i']);
    struct ip_mreqn member = {b->to->sin_addr, {0}, interface};
    if (!interface) fail(s->option['i'], "no such interface");
    /* Several instances on one machine share the port; ... */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    /* ... but not what another program's membership brings here. */
    setsockopt(fd, IPPROTO_IP, IP_MULTICAST_ALL, &off, sizeof off);
    must(setsockopt(fd, IPPROTO_IP, IP_ADD_MEMBERSHIP, &member,
                    sizeof member), "bus: joining the group");
    /* What we send goes out by the interface, whatever the routes say, ... */
    setsockopt(fd, IPPROTO_IP, IP_MULTICAST_IF, &member, sizeof member);
    /* ... so many hops far: 0 stays on this machine. (To the other instances
     * here it goes anyway, that is the default.) */
    setsockopt(fd, IPPROTO_IP, IP_MULTICAST_TTL, &ttl, sizeof ttl);
}

/* Takes the shared secret from the file, or else from the environment. */
static void bus_secret(struct server *s) {
    const char *file = s->option['s'], *env = getenv("CHAT_SECRET");
    char secret[4 * KIB + 1] = "";
    struct stat status;
    bool none = file && !strcmp(file, "none");
    if (file && !none) {
        int fd = must(open(file, O_RDONLY | O_CLOEXEC), file);
        must((int)read(fd, secret, sizeof secret - 1), file);
        must(fstat(fd, &status), file);
        close(fd);
        secret[strcspn(secret, "\r\n")] = '\0';
        if (status.st_mode & S_IROTH) /* a group may: systemd's files do so */
            fail(file, "others can read this secret");
        if (!*secret) fail(file, "the secret is empty");
    }
    if (!file && env) snprintf(secret, sizeof secret, "%s", env);
    if (strlen(secret) == 4 * KIB) fail("bus: the secret", "too long");
    if (!*secret && !none && s->bus.leaves)
        fail("the bus leaves this machine and needs a secret", "make one with "
             "(umask 077; head -c 32 /dev/urandom | base64 > secret) and give "
             "-s secret, or -s none");
    hmac_key(&s->bus.key, secret, strlen(secret));
    explicit_bzero(secret, sizeof secret);
}

/* Finds out where the bus is: HOST:PORT,... is a group, or a list of peers.
 * Each worker of a host has a port of its own, from PORT on; those who share a
 * group share its port. */
static void bus_configure(struct server *s) {
    struct bus *b = &s->bus;
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_DGRAM};
    struct addrinfo *found;
    if (!strcmp(s->option['b'], "none")) return;
    char *list = strdup(s->option['b']), *rest = list;
    for (char *host; (host = strsep(&rest, ","));) {
        char *colon = strrchr(host, ':');
        int64_t port = colon ? parse_number(colon + 1) : -1;
        if (port < 1 || port + s->workers - 1 > 65535 || colon == host)
            option_error("bus", "not HOST:PORT,...");
        *colon = '\0';
        int error = getaddrinfo(host, colon + 1, &hints, &found);
        if (error) fail(host, gai_strerror(error));
        struct sockaddr_in to = *(struct sockaddr_in *)found->ai_addr;
        freeaddrinfo(found);
        b->group |= IN_MULTICAST(ntohl(to.sin_addr.s_addr));
        b->leaves |= ntohl(to.sin_addr.s_addr) >> 24 != IN_LOOPBACKNET;
        for (int i = 0; i < (b->group ? 1 : s->workers); i++) {
            if (b->to_count == PEERS_MAX)
                option_error("bus", "more than 64 peers");
            to.sin_port = htons((uint16_t)(port + i));
            b->to[b->to_count++] = to;
        }
    }
    free(list);
    if (b->group) b->leaves = strcmp(s->option['i'], "lo") != 0;
}

/* Opens a worker's socket; -1: there is no bus. Bound to a group's address, no
 * other datagram comes in. A list of peers may be the same on every machine: we
 * are the one whose address can be bound. Where none can (the address belongs
 * to a gateway in front of us), it is the first one's port on all addresses. */
static int bus_socket(struct server *s, int worker) {
    struct bus *b = &s->bus;
    int size = 4 * MIB, first = b->group ? 0 : worker;
    if (b->to_count == 0) return -1;
    int fd = must(socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0),
                  "bus: socket");
    /* A burst finds room: more than the machine's limit, where we may. */
    if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof size))
        setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof size);
    if (b->group) bus_join_group(s, fd);
    for (int i = first; i < b->to_count; i += s->workers)
        if (!bind(fd, (struct sockaddr *)&b->to[i], sizeof *b->to)) return fd;
    struct sockaddr_in any = {.sin_family = AF_INET,
                              .sin_port = b->to[first].sin_port};
    must(bind(fd, (struct sockaddr *)&any, sizeof any), "bus: bind");
    return fd;
}

static void bus_open(struct server *s, int fd) {
    struct bus *b = &s->bus;
    b->fd = fd;
    if (fd < 0 && s->nats.state == OFF) return;
    /* What came before was for the worker in whose place we are. It may be
     * from one that died as well: it would seem to be there, and what others
     * remember of it would not be asked for. */
    for (int i = 0; i < 1 << 16 && recv(fd, NULL, 0, 0) >= 0; i++);
    if (!log_open(&b->self.log, bus_log_size(s)))
        fail("bus: mmap", strerror(errno));
    must((int)getrandom(&b->self.id, sizeof b->self.id, 0), "bus: getrandom");
    srandom((unsigned)b->self.id);
    b->beat_gap = BEAT_FIRST;
    b->catch_up_end = CATCH_UP_TIME; /* from the start */
}

/* Do all live peers have all that we posted? */
static bool bus_drained(const struct server *s) {
    for (struct peer *p = s->bus.self.next; p; p = p->next)
        if (p->alive && p->acked < s->bus.self.log.head) return false;
    return true;
}

static void bus_close(struct server *s) {
    if (!s->bus.self.log.ring) return;
    bus_send_status(s, LEAVE); /* with NATS, to nobody */
    while (s->bus.self.next) peer_forget(s, s->bus.self.next);
    log_close(&s->bus.self.log);
    close(s->bus.fd);
}

/* ---- 11. NATS, the other bus ---------------------------------------------
 * For those who outgrow one network: the instances meet at a NATS server, or
 * at a cluster of them. To us it is one more client; what we post is in the
 * bus's log, and goes out from there as commands:
 *
 *   we say   CONNECT {...}  SUB chat.> 1  PUB chat.text.NAME ID SIZE, payload
 *   it says  INFO {...}     PING   -ERR   MSG chat.text.NAME 1 ID SIZE, payload
 *
 * Lines and payloads end with CRLF. For binary messages, "binary" stands for
 * "text". NAME is the channel's, as %XX all but letters, digits, "-" and "_";
 * the nameless channel is chat.text: so "nats pub chat.text hi" works. ID,
 * where NATS has the subject for replies, is the instance's: on a new
 * connection it can meet its own words from the old one.
 *
 * A connection that ended is made anew, and goes on with the next message when
 * the others have had the time to be back as well. What was under way is
 * lost: NATS gives us neither receipts nor, for a newcomer, a history.
 */
#define NATS_LINE (32 * KIB)      /* the longest that we take */
#define NATS_PAYLOAD (64 * MIB)   /* the most that a NATS server allows */
#define NATS_BACKOFF (5 * SECOND) /* at most, between two attempts */

/* Takes apart nats://[USER:PASSWORD@|TOKEN@]HOST[:PORT]. */
static void nats_configure(struct server *s) {
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found;
    char *url = (char *)s->option['b'], *at = strrchr(url, '@');
    char *host = at ? at + 1 : url + 7, *user;
    must(asprintf(&user, "%.*s", at ? (int)(at - url) - 7 : 0, url + 7),
         "asprintf");
    char *password = user + strcspn(user, ":");
    if (*password) *password++ = '\0';
    if (percent_decode(user, strlen(user), user, false) < 0 ||
        percent_decode(password, strlen(password), password, false) < 0)
        option_error("bus", "bad %XX");
    s->option['b'] = memmove(host - 7, url, 7); /* no log shows passwords, */
    memset(url, '*', (size_t)(host - 7 - url)); /* nor does ps */
    char *port = strrchr(host, ':');
    int64_t number = port ? parse_number(port + 1) : 4222;
    if (port) *port = '\0';
    if (!*host || number < 1 || number > 65535)
        option_error("bus", "not nats://[USER:PASSWORD@]HOST[:PORT]");
    int error = getaddrinfo(host, port ? port + 1 : "4222", &hints, &found);
    if (error) fail(host, gai_strerror(error));
    if (port) *port = ':';
    s->nats = (struct nats){.state = AWAY, .found = found, .user = user,
                            .password = password,
                            .max_message = s->max_message};
}

/* Is there room for another message, as bus_room will want it? False: "not
 * now", for as long as the server gets on, and 5 s more; then it has to do
 * without the oldest. */
static bool nats_room(struct server *s, size_t size) {
    struct nats *n = &s->nats;
    struct log *log = &s->bus.self.log;
    size += sizeof(struct record) + CHANNEL_NAME_MAX;
    while (n->state != OFF && log->head + size - n->sent > log->size) {
        if (s->now - n->progress_at < ALIVE_TIME) return false;
        n->sent += record_size(log_at(log, n->sent));
        s->counters[BUS_LOST]++;
        bus_error(s, "NATS takes nothing, messages are lost");
        if (n->connection && n->connection->blocked)
            client_kill(s, n->connection);
    }
    return true;
}

/* Makes a command of the next message in the log. */
static void nats_put(struct server *s, struct buffer *out) {
    struct nats *n = &s->nats;
    struct record r;
    const char *at = (char *)log_at(&s->bus.self.log, n->sent);
    memcpy(&r, at, sizeof r);
    struct text name = {at + sizeof r, r.name_size};
    n->sent += record_size(at);
    if (r.size > s->max_message) { /* now; it would end the connection */
        s->counters[BUS_LOST]++;
        return;
    }
    buffer_print(out, "PUB chat.%s%s", r.opcode == TEXT ? "text" : "binary",
                 name.size ? "." : "");
    buffer_escape(out, name, "-_", "%%%02X");
    buffer_print(out, "%s%u\r\n", n->id, r.size);
    buffer_add(out, name.at + name.size, r.size);
    buffer_add(out, "\r\n", 2);
    s->counters[BUS_OUT]++;
}

/* Sends what was posted, as far as the server takes it. */
static void nats_flush(struct server *s) {
    struct nats *n = &s->nats;
    struct client *c = n->connection;
    uint64_t head = s->bus.self.log.head;
    bool ready = n->state == JOINED &&
                 (s->now >= n->retry_at || s->stopping);
    while (ready && !c->dead && !c->blocked && n->sent < head) {
        nats_put(s, &c->out);
        n->progress_at = s->now;
        if (n->sent == head || c->out.size >= READ_SIZE || c->out.failed)
            client_flush(s, c);
    }
    if (n->sent == head) n->progress_at = s->now;
}

/* Who is refused before it has ever let us in need not try again. */
static void nats_error(struct server *s, const char *what) {
    bool refused = strstr(what, "Violation") || strstr(what, "TLS");
    if (refused && !s->nats.met) fail(s->option['b'], what);
    bus_error(s, what);
}

/* Answers INFO. */
static void nats_greet(struct server *s, struct client *c, const char *info) {
    struct nats *n = &s->nats;
    const char *payload = strstr(info, "\"max_payload\":");
    size_t most = payload ? strtoul(payload + 14, NULL, 10) : MIB;
    s->max_message = most < n->max_message ? most : n->max_message;
    if (n->state != CALLING) return; /* its cluster has changed */
    n->state = GREETED;
    if (strstr(info, "\"tls_required\":true")) {
        nats_error(s, "the server demands TLS");
        client_kill(s, c);
    }
    buffer_print(&c->out, "CONNECT {\"verbose\":false,\"pedantic\":false,"
                 "\"protocol\":1,\"echo\":false,"
                 "\"name\":\"mini-ws-chat\",\"%s\":",
                 *n->password ? "user" : "auth_token");
    buffer_json(&c->out, text_of(n->user));
    buffer_print(&c->out, ",\"pass\":");
    buffer_json(&c->out, text_of(n->password));
    buffer_print(&c->out, "}\r\nSUB chat.> 1\r\nPING\r\n");
    c->pinged = true;
    c->deadline = s->now + REQUEST_TIME;
}

/* It has answered our first ping, so it has let us in. Those who lost it with
 * us must have found it again, or they would miss what was kept for them. */
static void nats_join(struct server *s) {
    struct nats *n = &s->nats;
    if (n->state != GREETED) return;
    fprintf(stderr, "chat: joined %s\n", s->option['b']);
    s->counters[BUS_PEERS] = 1;
    n->state = JOINED;
    n->met = true;
    n->retry_at = s->now + n->backoff;
    n->backoff = 0;
}

/* Delivers "MSG chat.text.NAME 1 [ID] SIZE". False: "not now". */
static bool nats_message(struct server *s, const char *line,
                         struct text message) {
    char kind[8] = "", name[256] = ""; /* one cut off here is too long, too */
    int opcode = 0; /* none that a message may have */
    if (strstr(line, s->nats.id)) return true; /* our own words */
    sscanf(line, "MSG chat.%7[^. ].%255s", kind, name);
    if (!strcmp(kind, "text")) opcode = TEXT;
    if (!strcmp(kind, "binary")) opcode = BINARY;
    ssize_t n = percent_decode(name, strlen(name), name, false);
    struct text channel = {name, n < 0 ? SIZE_MAX : (size_t)n};
    return bus_message(s, channel, opcode, message);
}

/* Finds a line, and what a MSG has behind it. Returns the size of all, 0 for
 * "need more", -1 for what makes no sense. */
static int64_t nats_parse(const char *bytes, size_t size, char line[NATS_LINE],
                          struct text *message) {
    const char *end = memmem(bytes, size, "\r\n", 2);
    size_t n = end ? (size_t)(end - bytes) : size;
    if (n >= NATS_LINE) return -1;
    if (!end) return 0;
    snprintf(line, NATS_LINE, "%.*s", (int)n, bytes);
    n += 2;
    if (strncmp(line, "MSG ", 4) != 0) return (int64_t)n;
    int64_t payload = parse_number(strrchr(line, ' ') + 1);
    if (payload < 0 || payload > NATS_PAYLOAD) return -1;
    *message = (struct text){end + 2, (size_t)payload};
    n += message->size + 2;
    return n <= size ? (int64_t)n : 0;
}

/* Handles one line. False when there is nothing to go on with. */
static bool nats_step(struct server *s, struct client *c, struct input *in) {
    char line[NATS_LINE];
    struct text message = {"", 0};
    int64_t size = nats_parse((char *)in->bytes + in->next,
                              in->size - in->next, line, &message);
    if (size < 0) {
        nats_error(s, "NATS sends what makes no sense");
        client_kill(s, c);
    }
    if (size <= 0) return false;
    if (!strncmp(line, "MSG ", 4) && !nats_message(s, line, message)) {
        client_wait(s, c);
        return false;
    }
    in->next += (size_t)size;
    for (char *at = line; *at; at++) /* it may end up in our log */
        if (*at < ' ' || *at > '~') *at = '?';
    if (!strncmp(line, "MSG ", 4)) s->counters[BUS_IN]++;
    else if (!strncmp(line, "INFO ", 5)) nats_greet(s, c, line);
    else if (!strcmp(line, "PING") && c->out.size < UNSENT_MAX)
        buffer_print(&c->out, "PONG\r\n");
    else if (!strcmp(line, "PONG")) nats_join(s);
    else if (strcmp(line, "+OK") != 0) nats_error(s, line);
    return !c->dead;
}

static void nats_connect(struct server *s) {
    struct nats *n = &s->nats;
    struct addrinfo *to = n->next ? n->next : n->found;
    int on = 1, size = SEND_BUFFER, patience = REQUEST_TIME;
    if (n->backoff == SECOND / 10)
        fprintf(stderr, "chat: cannot reach %s, trying on\n", s->option['b']);
    n->next = to->ai_next;
    n->backoff = n->backoff ? earlier(n->backoff * 2, NATS_BACKOFF)
                            : SECOND / 10;
    n->retry_at = s->now + n->backoff / 2 + random() % n->backoff / 2;
    snprintf(n->id, sizeof n->id, " %016llx ",
             (unsigned long long)s->bus.self.id);
    int fd = socket(to->ai_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC,
                    0);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    /* These two bound what is under way, and so lost with a connection. */
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &patience, sizeof patience);
    (void)connect(fd, to->ai_addr, to->ai_addrlen); /* epoll tells the rest */
    n->connection = client_add(s, fd, NULL);
    if (!n->connection) return;
    n->connection->nats = true;
    n->connection->pinged = true; /* it has to speak first */
    n->state = CALLING;
}

static void nats_disconnect(struct server *s) {
    if (s->nats.state == JOINED)
        fprintf(stderr, "chat: left %s\n", s->option['b']);
    s->nats.connection = NULL;
    s->nats.state = AWAY;
    s->counters[BUS_PEERS] = 0;
}

/* Connects if need be; says good-bye when all is said. Returns when it is due
 * again. */
static int64_t nats_tick(struct server *s) {
    struct nats *n = &s->nats;
    struct client *c = n->connection;
    if (n->state == OFF) return INT64_MAX;
    /* At the start, clients wait for it a moment: it says what is too big. */
    s->bus.waits = !n->met && s->now < CATCH_UP_TIME;
    if (n->state == AWAY && !s->stopping && s->now >= n->retry_at)
        nats_connect(s);
    if (s->stopping && c && s->connections == 1 && !c->blocked) {
        client_finish(s, c);
        client_flush(s, c);
    }
    return n->retry_at > s->now ? n->retry_at : INT64_MAX;
}

/* A message from one of our clients (or from /send), on its way to all.
 * False means "not now": see channel_room, bus_room and nats_room. */
static bool server_post(struct server *s, struct channel *ch, int opcode,
                        struct text message) {
    if (!nats_room(s, message.size) || !bus_room(s, message.size) ||
        !channel_room(s, ch, message.size, SLOW_TIME)) return false;
    channel_append(s, ch, opcode, message);
    bus_post(s, ch, opcode, message);
    s->counters[RECEIVED]++;
    return true;
}

/* ---- 12. HTTP: the answers ----------------------------------------------
 * The page, /send, /messages, /metrics, and with -d the files beneath DIR.
 */
__asm__(".section .rodata\n"
        "index_html: .incbin \"index.html\"\n"
        "1: .balign 8\n"
        "index_html_size: .quad 1b - index_html\n"
        ".previous\n");
extern const char index_html[];
extern const uint64_t index_html_size;

#define PAGE_POLICY                                                     \
    "Content-Security-Policy: default-src 'none'; connect-src 'self'; " \
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; "           \
    "img-src data:; base-uri 'none'; form-action 'none'; "              \
    "frame-ancestors 'none'\r\n"
#define PLAIN "text/plain; charset=utf-8"
#define HTML "text/html; charset=utf-8"

struct response {
    const char *status;  /* as in "404 Not Found" */
    const char *type;    /* NULL: no body belongs to this status */
    const char *headers; /* more of them, each with CRLF; or NULL */
    struct text body;    /* .at NULL: it follows by another way */
};

/* One line in the Common Log Format. */
static void log_request(struct server *s, struct request *r,
                        const struct response *a) {
    struct sockaddr_storage from = {0}; /* nobody's, if it has reset */
    socklen_t size = sizeof from;
    char name[INET6_ADDRSTRLEN] = "-", date[40];
    struct buffer line = {0};
    time_t now = time(NULL);
    if (s->option['q']) return;
    getpeername(r->client->fd, (struct sockaddr *)&from, &size);
    getnameinfo((struct sockaddr *)&from, size, name, sizeof name, NULL, 0,
                NI_NUMERICHOST);
    strftime(date, sizeof date, "%d/%b/%Y:%H:%M:%S %z", localtime(&now));
    buffer_escape(&line, r->line, " !#$%&'()*+,-./:;<=>?@[]^_`{|}~",
                  "\\x%02x");
    printf("%s - - [%s] \"%.*s\" %.3s %zu\n",
           strncmp(name, "::ffff:", 7) ? name : name + 7, date,
           (int)line.size, line.size ? line.bytes : "", a->status,
           a->body.size);
    buffer_clear(&line);
}

static void http_date(char date[40], time_t time) {
    struct tm broken;
    date[0] = '\0'; /* for a time before all files */
    if (time >= 0 && gmtime_r(&time, &broken))
        strftime(date, 40, "%a, %d %b %Y %H:%M:%S GMT", &broken);
}

/* Reads a date in any of its three forms (RFC 9110 5.6.7). */
static bool date_parse(const char *text, time_t *time) {
    static const char *const forms[] = {"%a, %d %b %Y %H:%M:%S GMT",
        "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"};
    for (size_t i = 0; i < sizeof forms / sizeof *forms; i++) {
        struct tm broken = {0};
        const char *end = strptime(text, forms[i], &broken);
        *time = timegm(&broken);
        if (end && *end == '\0') return true;
    }
    return false;
}

/* Queues an answer, and logs it. */
static void respond(struct server *s, struct request *r, struct response a) {
    struct client *c = r->client;
    time_t now = time(NULL);
    if (now != s->date_at) http_date(s->date, now);
    s->date_at = now;
    buffer_print(&c->out, "HTTP/1.1 %s\r\nDate: %s\r\n%s", a.status,
                 s->date, a.headers ? a.headers : "");
    if (a.type)
        buffer_print(&c->out, "Content-Type: %s\r\nContent-Length: %zu\r\n",
                     a.type, a.body.size);
    if (*a.status != '1') /* 101 brings its own Connection */
        buffer_print(&c->out, "X-Content-Type-Options: nosniff\r\n"
                     "Connection: %s\r\n",
                     r->keep_alive ? "keep-alive" : "close");
    buffer_add(&c->out, "\r\n", 2);
    if (a.body.at && !r->head) buffer_add(&c->out, a.body.at, a.body.size);
    if (*a.status != '1' && !r->keep_alive) client_finish(s, c);
    log_request(s, r, &a);
}

static void respond_text(struct server *s, struct request *r,
                         const char *status, const char *text) {
    respond(s, r, (struct response){status, PLAIN, NULL, text_of(text)});
}

/* Answers a request that cannot be read any further, and closes. */
static void respond_error(struct server *s, struct request *r, int status) {
    static const char *const texts[] = {
        "400 Bad Request", "408 Request Timeout", "413 Content Too Large",
        "414 URI Too Long", "431 Request Header Fields Too Large",
        "501 Not Implemented", "505 HTTP Version Not Supported"};
    int i = 0; /* it is one of these */
    while (strtol(texts[i], NULL, 10) != status) i++;
    r->keep_alive = false;
    respond_text(s, r, texts[i], texts[i] + 4);
}

/* Gives an answer whose headers or body stand in a buffer, and clears it. */
static void respond_buffer(struct server *s, struct request *r,
                           struct response a, struct buffer *b) {
    if (b->failed) client_kill(s, r->client);
    else respond(s, r, a);
    buffer_clear(b);
}

/* May a page from there talk to us? Its host must be ours, or allowed. (For
 * what a page merely embeds, like an image, browsers send no Origin, but
 * Sec-Fetch-Site; programs send neither.) If not, it has been answered so. */
static bool request_origin(struct server *s, struct request *r) {
    const char *origin = r->header[ORIGIN], *host = r->header[HOST];
    const char *site = r->header[SITE];
    for (int i = 0; i < s->origin_count; i++)
        if (!strcmp(s->origins[i], "*") ||
            (origin && !strcasecmp(s->origins[i], origin))) return true;
    const char *slashes = origin ? strstr(origin, "://") : NULL;
    if (origin ? slashes && host && !strcasecmp(slashes + 3, host)
               : !site || !strcmp(site, "same-origin") || !strcmp(site, "none"))
        return true;
    respond_text(s, r, "403 Forbidden", "this origin is not allowed");
    return false;
}

/* Answers /send; if the message has to wait for room, not now. */
static void answer_send(struct server *s, struct request *r) {
    char decoded[HEADER_MAX];
    struct text message = {r->body, (size_t)r->length};
    if (!request_origin(s, r)) return;
    bool post = !strcmp(r->method, "POST");
    ssize_t size = query_get(r->query, "message", decoded);
    if (size < 0 && !post) {
        respond_text(s, r, "400 Bad Request",
                     size == -1 ? "?message not provided" : "bad %XX");
        return;
    }
    if (size >= 0 && (!post || r->length == 0))
        message = (struct text){decoded, (size_t)size};
    if (message.size > s->max_message ||
        !utf8_valid(message.at, message.size)) {
        respond_text(s, r, "400 Bad Request", "not UTF-8, or too big");
        return;
    }
    struct channel *ch = channel_get(s, r->channel);
    if (!ch)
        respond_text(s, r, "503 Service Unavailable", "too many channels");
    else if (!r->head && !server_post(s, ch, TEXT, message))
        client_wait(s, r->client);
    else
        respond_text(s, r, "200 OK", "message sent");
}

static void answer_messages(struct server *s, struct request *r) {
    struct buffer b = {0};
    struct text payload;
    struct channel *ch = channel_find(s, r->channel);
    if (s->unsent > UNSENT_MAX) { /* many ask for much and read nothing */
        respond_text(s, r, "503 Service Unavailable", "too busy");
        return;
    }
    buffer_add(&b, "[", 1);
    for (uint64_t at = ch ? ch->log.tail : 0; ch && at < ch->log.head;) {
        const uint8_t *frame = log_at(&ch->log, at);
        if (at > ch->log.tail) buffer_add(&b, ",", 1);
        at += frame_read(frame, &payload);
        if ((frame[0] & 15) == TEXT) {
            buffer_json(&b, payload);
            continue;
        }
        buffer_print(&b, "{\"base64\":\"");
        buffer_base64(&b, (const uint8_t *)payload.at, payload.size);
        buffer_print(&b, "\"}");
    }
    buffer_add(&b, "]", 1);
    respond_buffer(s, r, (struct response){"200 OK", "application/json", NULL,
                   {b.bytes, b.size}}, &b);
}

static void answer_metrics(struct server *s, struct request *r) {
    static const char *const names[METRICS] = {
        "clients", "channels", "messages_received_total",
        "messages_sent_total", "bytes_received_total", "bytes_sent_total",
        "slow_clients_total", "bus_peers", "bus_datagrams_received_total",
        "bus_datagrams_sent_total", "bus_repairs_total",
        "bus_lost_messages_total", "bus_errors_total"};
    struct buffer b = {0};
    for (int i = 0; i < METRICS; i++)
        buffer_print(&b, "# TYPE chat_%s %s\nchat_%s %llu\n", names[i],
                     strstr(names[i], "_total") ? "counter" : "gauge",
                     names[i], (unsigned long long)s->counters[i]);
    respond_buffer(s, r, (struct response){"200 OK",
                   "text/plain; version=0.0.4", NULL, {b.bytes, b.size}}, &b);
}

/* Opens a file beneath a directory; the kernel sees to it that neither ".."
 * nor a link leads out (openat2(2), Linux 5.6). Not blocking, because a FIFO
 * must not hold us up. Returns -1 and errno like open(). */
static int open_beneath(int dir, const char *path) {
    struct { /* struct open_how; RESOLVE_BENEATH is 8, NO_MAGICLINKS 2 */
        uint64_t flags, mode, resolve;
    } how = {O_RDONLY | O_NONBLOCK | O_CLOEXEC | O_NOCTTY, 0, 8 | 2};
    int fd, tries = 0;
    do { /* a rename anywhere, while ".." of a link is followed, is EAGAIN */
        fd = (int)syscall(SYS_openat2, dir, path, &how, sizeof how);
    } while (fd < 0 && errno == EAGAIN && ++tries < 100);
    return fd;
}

static const char *mime_type(const char *path) {
    static const char *const types[][2] = {
        {".html", HTML}, {".htm", HTML}, {".txt", PLAIN}, {".md", PLAIN},
        {".css", "text/css; charset=utf-8"}, {".json", "application/json"},
        {".js", "text/javascript; charset=utf-8"}, {".svg", "image/svg+xml"},
        {".mjs", "text/javascript; charset=utf-8"}, {".png", "image/png"},
        {".jpg", "image/jpeg"}, {".jpeg", "image/jpeg"},
        {".gif", "image/gif"}, {".webp", "image/webp"},
        {".ico", "image/vnd.microsoft.icon"}, {".woff2", "font/woff2"},
        {".wasm", "application/wasm"}, {".pdf", "application/pdf"},
        {".mp3", "audio/mpeg"}, {".mp4", "video/mp4"}};
    const char *dot = strrchr(path, '.');
    for (size_t i = 0; dot && i < sizeof types / sizeof *types; i++)
        if (!strcasecmp(dot, types[i][0])) return types[i][1];
    return "application/octet-stream";
}

static int is_visible(const struct dirent *entry) {
    return entry->d_name[0] != '.';
}

/* Lists a directory. scandir() takes a path, and the one safe path is "."
 * of a directory held open, so for the moment that is where we are. */
static void answer_listing(struct server *s, struct request *r, int dir) {
    struct dirent **entries;
    struct buffer b = {0};
    int count = -1;
    if (!fchdir(dir)) count = scandir(".", &entries, is_visible, alphasort);
    must(fchdir(s->home), "fchdir");
    if (count < 0) {
        respond_text(s, r, "404 Not Found", "not found");
        return;
    }
    buffer_print(&b, "<!doctype html>\n<meta charset=\"utf-8\">\n<title>");
    buffer_escape(&b, text_of(r->path), "/.-_", "&#%d;");
    buffer_print(&b, "</title>\n<ul>\n<li><a href=\"../\">..</a>\n");
    for (int i = 0; i < count; i++) {
        struct text name = text_of(entries[i]->d_name);
        const char *slash = entries[i]->d_type == DT_DIR ? "/" : "";
        buffer_print(&b, "<li><a href=\"./");
        buffer_escape(&b, name, ".-_", "%%%02X");
        buffer_print(&b, "%s\">", slash);
        buffer_escape(&b, name, ".-_", "&#%d;");
        buffer_print(&b, "%s</a>\n", slash);
        free(entries[i]);
    }
    free(entries);
    buffer_print(&b, "</ul>\n");
    respond_buffer(s, r, (struct response){"200 OK", HTML, NULL,
                   {b.bytes, b.size}}, &b);
}

/* Gives an answer whose body is a file, which from here on is the client's. */
static void respond_file(struct server *s, struct request *r,
                         struct response a, int fd) {
    struct client *c = r->client;
    c->file = fd;
    c->cursor = 0;
    c->boundary = a.body.size;
    if (r->head || a.body.size == 0) client_close_file(s, c);
    respond(s, r, a);
}

static void answer_page(struct server *s, struct request *r) {
    respond_file(s, r, (struct response){"200 OK", HTML, PAGE_POLICY,
                 {NULL, index_html_size}}, s->page);
}

/* Answers with an open regular file, which from here on is the client's. */
static void answer_open_file(struct server *s, struct request *r, int fd,
                             const char *path, const struct stat *status) {
    char date[40], headers[80] = "";
    time_t changed = status->st_mtime, now = time(NULL), since;
    if (changed > now) changed = now; /* RFC 9110 8.8.2.1 */
    http_date(date, changed);
    if (*date) snprintf(headers, sizeof headers, "Last-Modified: %s\r\n", date);
    struct response a = {"304 Not Modified", NULL, headers, {0}};
    if (!r->header[SINCE] || r->none_match ||
        !date_parse(r->header[SINCE], &since) || since < changed)
        a = (struct response){"200 OK", mime_type(path), headers,
                              {NULL, (size_t)status->st_size}};
    respond_file(s, r, a, fd);
}

/* A directory's address ends with a slash, so that the links in its page
 * lead into it. ("//host" would lead elsewhere: one slash in front.) */
static void answer_redirect(struct server *s, struct request *r) {
    struct buffer headers = {0};
    buffer_print(&headers, "Location: /");
    buffer_escape(&headers, text_of(r->path + strspn(r->path, "/")), "/.-_~",
                  "%%%02X");
    buffer_print(&headers, "/%s%s\r\n", *r->query ? "?" : "", r->query);
    respond_buffer(s, r, (struct response){"301 Moved Permanently", PLAIN,
                   headers.bytes, text_of("moved")}, &headers);
}

/* A name that begins with a dot (".." or hidden) is not there. */
static void answer_file(struct server *s, struct request *r) {
    const char *path = r->path + strspn(r->path, "/");
    struct stat status = {0};
    errno = ENOENT;
    int fd = strstr(r->path, "/.") ? -1
                                   : open_beneath(s->dir, *path ? path : ".");
    bool full = fd < 0 && (errno == EMFILE || errno == ENFILE);
    if (fd >= 0) fstat(fd, &status); /* cannot fail, because it is open */
    if (S_ISDIR(status.st_mode) && r->path[strlen(r->path) - 1] != '/') {
        answer_redirect(s, r);
        close(fd);
        return;
    }
    if (S_ISDIR(status.st_mode)) {
        char index[HEADER_MAX + sizeof "index.html"];
        int dir = fd;
        snprintf(index, sizeof index, "%sindex.html", path);
        fd = open_beneath(s->dir, index); /* its link may lead up a folder */
        if (fd < 0) answer_listing(s, r, dir);
        close(dir);
        if (fd < 0) return;
        fstat(fd, &status);
        path = "index.html";
    }
    if (S_ISREG(status.st_mode)) {
        answer_open_file(s, r, fd, path, &status);
        return;
    }
    if (fd >= 0) close(fd);
    if (full) respond_text(s, r, "503 Service Unavailable", "too busy");
    else respond_text(s, r, "404 Not Found", "not found");
}

/* ---- 13. WebSocket: conversations ---------------------------------------
 * RFC 6455: the opening handshake (4.2), messages in and out, control
 * frames between their fragments, and the closing handshake (7).
 */
static void websocket_send(struct client *c, int opcode, struct text payload) {
    uint8_t header[FRAME_HEADER_MAX];
    size_t size = frame_header(header, opcode, payload.size);
    buffer_add(&c->out, header, size);
    buffer_add(&c->out, payload.at, payload.size);
}

/* Finds where the last `wanted` messages begin; returns how many there are. */
static int64_t history_find(const struct log *log, int64_t wanted,
                            uint64_t *offset) {
    struct text payload;
    int64_t count = 0;
    for (uint64_t at = log->tail; at < log->head; count++)
        at += frame_read(log_at(log, at), &payload);
    *offset = log->tail;
    for (; count > wanted; count--)
        *offset += frame_read(log_at(log, *offset), &payload);
    return count;
}

/* A key is the base64 of 16 bytes (RFC 6455 4.1). */
static bool key_valid(const char *key) {
    return key && strspn(key, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789+/"
                              "abcdefghijklmnopqrstuvwxyz") == 22 &&
           !strcmp(key + 22, "==");
}

/* Upgrades the connection and puts the client into its channel, with so many
 * messages of its history; -1: it did not ask. */
static void websocket_begin(struct server *s, struct request *r,
                            struct channel *ch, int64_t history) {
    static const char guid[] = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    char text[80];
    uint8_t digest[SHA1_SIZE];
    struct buffer headers = {0};
    struct client *c = r->client;
    snprintf(text, sizeof text, "%s%s", r->header[WS_KEY], guid);
    sha1_end(sha1_start, text, strlen(text), digest);
    buffer_print(&headers, "Upgrade: websocket\r\nConnection: Upgrade\r\n"
                           "Sec-WebSocket-Accept: ");
    buffer_base64(&headers, digest, sizeof digest);
    buffer_print(&headers, "\r\n");
    respond_buffer(s, r, (struct response){"101 Switching Protocols", NULL,
                   headers.bytes, {0}}, &headers);
    uint64_t offset = ch->log.head;
    if (history >= 0) {
        int64_t count = history_find(&ch->log, history, &offset);
        snprintf(text, sizeof text, "{\"history\":%lld}", (long long)count);
        websocket_send(c, TEXT, text_of(text));
    }
    c->websocket = true;
    s->counters[CLIENTS]++;
    c->deadline = s->now + PING_TIME;
    channel_join(s, ch, c, offset);
}

static void websocket_open(struct server *s, struct request *r) {
    char number[HEADER_MAX];
    const char *version = r->header[WS_VERSION];
    ssize_t size = query_get(r->query, "history", number);
    bool asked = size != -1;
    bool whole = asked && (ssize_t)strlen(number) == size; /* no NUL in it */
    int64_t history = whole ? parse_number(number) : -1;
    if (!version || strcmp(version, "13") != 0) {
        respond(s, r, (struct response){"426 Upgrade Required", PLAIN,
            "Sec-WebSocket-Version: 13\r\nUpgrade: websocket\r\n"
            "Connection: Upgrade\r\n",
            text_of("this server speaks version 13")});
    } else if (!r->upgrade || !key_valid(r->header[WS_KEY]) ||
               r->old || (asked && history < 0)) {
        respond_text(s, r, "400 Bad Request", "not a WebSocket handshake");
    } else if (request_origin(s, r)) {
        struct channel *ch = channel_get(s, r->channel);
        if (ch) websocket_begin(s, r, ch, history);
        else respond_text(s, r, "503 Service Unavailable", "too busy");
    }
}

/* Sends the messages so far (or, with private bytes stuck before them, none),
 * then a close frame. 1005: one without a code. */
static void websocket_close(struct server *s, struct client *c, int code) {
    uint8_t payload[2];
    put_number(payload, (uint64_t)code, 2);
    client_flush(s, c); /* what is queued must not come after the log */
    if (c->out.size == 0) c->boundary = c->channel->log.head;
    websocket_send(c, CLOSE,
                   (struct text){(char *)payload, code == 1005 ? 0 : 2});
    client_finish(s, c);
}

/* Begins a frame whose header is there, or handles a whole control frame.
 * False if more is needed first, or if it closed the connection. */
static bool websocket_frame(struct server *s, struct client *c,
                            struct input *in) {
    struct frame f;
    uint8_t *at = in->bytes + in->next, *payload;
    size_t left = in->size - in->next;
    int size = frame_parse(at, left, &f);
    int error = size < 0 ? -size : 0;
    if (size == 0) return false;
    bool control = f.opcode >= CLOSE;
    if (!error && !control && (f.opcode == CONTINUATION) != (in->opcode != 0))
        error = 1002; /* 5.4: a message within another, or none to continue */
    if (!error && !control && f.size + in->done > s->max_message) error = 1009;
    if (error) {
        websocket_close(s, c, error);
        return false;
    }
    payload = at + size;
    if (control) {
        if (left - (size_t)size < f.size) return false;
        in->next += (size_t)size + f.size;
        unmask(payload, payload, f.size, f.mask);
        if (f.opcode == CLOSE)
            websocket_close(s, c, close_code(payload, f.size));
        if (f.opcode == PING)
            websocket_send(c, PONG, (struct text){(char *)payload, f.size});
        return true;
    }
    in->next += (size_t)size;
    in->in_frame = true;
    in->frame = f;
    if (f.opcode != CONTINUATION) in->opcode = f.opcode;
    return true;
}

/* Takes what is there of a frame's payload. False if that is nothing. */
static bool websocket_payload(struct server *s, struct client *c,
                              struct input *in) {
    size_t n = in->size - in->next;
    uint8_t *end = in->bytes + in->done;
    if (n > in->frame.size) n = in->frame.size;
    unmask(end, in->bytes + in->next, n, in->frame.mask);
    in->done += n;
    in->next += n;
    in->frame.size -= n;
    in->in_frame = in->frame.size > 0;
    bool complete = !in->in_frame && in->frame.fin;
    if (in->opcode == TEXT && (!utf8_check(&in->utf8, end, n) ||
                               (complete && in->utf8.left > 0))) {
        websocket_close(s, c, 1007);
        return false;
    }
    return n > 0 || !in->in_frame;
}

/* One step on: a message posted, a frame begun, a payload taken in. False
 * when there is nothing to go on with. */
static bool websocket_step(struct server *s, struct client *c,
                           struct input *in) {
    if (in->in_frame) return websocket_payload(s, c, in);
    if (!in->frame.fin) return websocket_frame(s, c, in);
    struct text message = {(char *)in->bytes, in->done};
    if (!server_post(s, c->channel, in->opcode, message)) {
        client_wait(s, c);
        return false;
    }
    /* Who talks is served first: while the others get this round's messages
     * it has the time to answer, and the next round comes full. */
    struct channel *ch = c->channel;
    channel_remove(c);
    channel_insert(ch, c);
    in->done = 0;
    in->opcode = 0;
    in->frame.fin = false;
    return true;
}

/* ---- 14. The event loop --------------------------------------------------
 * A round: wait, read who has something to say, then let out what came of
 * it. Handlers only mark a client dead; server_reap frees, when no event of
 * the round can name it any more.
 */
/* Which function answers which path. */
static void client_answer(struct server *s, struct request *r) {
    bool send = !strcmp(r->path, "/send"), get = !strcmp(r->method, "GET");
    if (s->stopping) r->keep_alive = false;
    if (!get && !r->head && !(send && !strcmp(r->method, "POST")))
        respond(s, r, (struct response){"405 Method Not Allowed", PLAIN,
            send ? "Allow: GET, HEAD, POST\r\n" : "Allow: GET, HEAD\r\n",
            text_of("method not allowed")});
    else if (get && r->websocket)
        websocket_open(s, r);
    else if (send)
        answer_send(s, r);
    else if (!strcmp(r->path, "/messages"))
        answer_messages(s, r);
    else if (!strcmp(r->path, "/metrics") && s->option['M'])
        answer_metrics(s, r);
    else if (s->dir >= 0)
        answer_file(s, r);
    else if (!strcmp(r->path, "/"))
        answer_page(s, r);
    else
        respond_text(s, r, "404 Not Found", "not found");
}

/* Handles one request. False when there is nothing to go on with. */
static bool client_request(struct server *s, struct client *c,
                           struct input *in) {
    struct request r;
    const char *bytes = (const char *)in->bytes + in->next;
    size_t left = in->size - in->next;
    if (left >= 2 && !memcmp(bytes, "\r\n", 2)) { /* RFC 9112 2.2 */
        in->next += 2;
        return true;
    }
    int size = left > 0 ? request_parse(bytes, left, &r) : 0;
    r.client = c;
    if (size == 0) return false;
    if (size < 0 || r.length > (int64_t)s->max_message) {
        respond_error(s, &r, size < 0 ? -size : 413);
        return false;
    }
    if (left - r.size < (size_t)r.length) { /* the body is still to come */
        c->deadline = s->now + REQUEST_TIME;
        if (r.expects && !r.old && left == r.size)
            buffer_print(&c->out, "HTTP/1.1 100 Continue\r\n\r\n");
        return false;
    }
    client_answer(s, &r);
    if (!c->waiting) in->next += r.size + (size_t)r.length;
    return !c->waiting;
}

/* No further input is looked at until what is due has gone out. */
static bool client_busy(const struct client *c) {
    return c->dead || c->closing || c->waiting || c->file >= 0 ||
           (c->out.size >= READ_SIZE && !c->nats) || c->out.failed;
}

/* Keeps what is unfinished for the next time, and no memory where nothing
 * is: most clients own none. */
static void client_keep(struct server *s, struct client *c, struct input *in) {
    size_t left = in->size - in->next;
    memmove(in->bytes + in->done, in->bytes + in->next, left);
    in->next = in->done;
    in->size = in->done + left;
    bool empty = c->closing || (in->size == 0 && in->opcode == 0);
    if (in == c->in && empty) {
        free(in);
        c->in = NULL;
    } else if (in != c->in && !empty) {
        c->in = malloc(sizeof *in + in->size * 2 + 256);
        if (!c->in) {
            client_kill(s, c);
            return;
        }
        memcpy(c->in, in, sizeof *in + in->size);
        c->in->capacity = in->size * 2 + 256;
    }
}

static bool client_step(struct server *s, struct client *c, struct input *in) {
    if (c->websocket) return websocket_step(s, c, in);
    if (c->nats) return nats_step(s, c, in);
    return client_request(s, c, in);
}

/* Goes through its unfinished input (or what was read into the shared
 * buffer) as far as it goes, and sends what comes of it. */
static void client_process(struct server *s, struct client *c) {
    struct input *in = c->in ? c->in : s->input;
    bool more = true;
    while (more && !c->dead) {
        while (more && !client_busy(c)) more = client_step(s, c, in);
        /* What it gets from a dirty channel goes out at the round's end. */
        bool later = c->channel && c->channel->dirty && c->out.size == 0;
        if (!later || client_busy(c)) client_flush(s, c);
        more = more && !client_busy(c);
    }
    if (!c->dead) client_keep(s, c, in);
    if (!c->websocket && c->in && c->deadline > s->now + REQUEST_TIME)
        c->deadline = s->now + REQUEST_TIME; /* the next one has begun */
    *s->input = (struct input){.capacity = READ_SIZE};
    client_watch(s, c);
}

/* Reads once, and handles what came. */
static void client_read(struct server *s, struct client *c) {
    struct input *in = c->in ? c->in : s->input;
    /* Of a record of TLS nothing may stay behind, where epoll cannot see it. */
    size_t room = c->tls ? TLS_RECORD : 1;
    if (in->capacity - in->size < room) { /* only ever its own */
        size_t capacity = in->capacity * 2 + room;
        struct input *grown = realloc(in, sizeof *in + capacity);
        if (!grown) {
            client_kill(s, c);
            return;
        }
        c->in = in = grown;
        in->capacity = capacity;
    }
    ssize_t n = socket_recv(c, in->bytes + in->size, in->capacity - in->size);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EINTR))
        client_kill(s, c);
    client_watch(s, c); /* TLS may have to write before it can read */
    if (n <= 0 || c->shut) return; /* what comes after the end is nothing */
    s->counters[BYTES_IN] += (uint64_t)n;
    in->size += (size_t)n;
    c->pinged = false;
    if (c->channel || c->nats) c->deadline = s->now + PING_TIME;
    client_process(s, c);
}

static void client_event(struct server *s, struct client *c, uint32_t events) {
    if (c->dead) return;
    if (events & EPOLLOUT) {
        c->blocked = false;
        if (c->channel) c->channel->swept = false;
        client_process(s, c);
    }
    bool readable = events & EPOLLIN || (c->tls && events & EPOLLOUT);
    if (readable && c->interest & EPOLLIN && !c->dead)
        client_read(s, c);
    else if (events & (EPOLLHUP | EPOLLERR))
        client_kill(s, c);
}

/* Its deadline has come: a silent one is asked for a sign of life, a half
 * request is answered, else that was it. */
static void client_timeout(struct server *s, struct client *c) {
    struct request r = {.client = c};
    bool sending = c->out.size > 0 || c->file >= 0;
    bool silent = c->channel || c->nats ? c->pinged : sending || !c->in;
    if (c->closing || silent) {
        client_kill(s, c);
        return;
    }
    c->pinged = true;
    c->deadline = s->now + PING_TIME;
    if (c->websocket) websocket_send(c, PING, (struct text){"", 0});
    else if (c->nats) buffer_print(&c->out, "PING\r\n");
    else respond_error(s, &r, 408);
    client_flush(s, c);
}

static void server_accept(struct server *s) {
    for (int i = 0; i < 64 && s->connections < s->max_clients; i++) {
        int fd = accept4(s->listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd >= 0) {
            client_add(s, fd, s->tls);
            continue;
        }
        if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
            errno == ENOMEM) s->accept_at = s->now + SECOND; /* do not spin */
        return;
    }
}

/* Watches the listener or not: who finds no place waits in its backlog. */
static void server_watch_listener(struct server *s) {
    bool accept = !s->stopping && !s->catching_up && s->now >= s->accept_at &&
                  s->connections < s->max_clients;
    struct epoll_event event = {.events = accept ? EPOLLIN : 0,
                                .data.fd = s->listener};
    if (accept == s->accepting || s->stopping) return;
    epoll_ctl(s->epoll, EPOLL_CTL_MOD, s->listener, &event);
    s->accepting = accept;
}

static void server_stop(struct server *s) {
    if (s->stopping) return;
    s->stopping = true;
    s->stop_at = s->now + CLOSE_TIME;
    /* Closing alone would not end its events: a parent has it open, too. */
    epoll_ctl(s->epoll, EPOLL_CTL_DEL, s->listener, NULL);
    close(s->listener);
    for (size_t fd = 0; fd < s->clients_end; fd++) {
        struct client *c = s->clients[fd];
        if (!c || c->closing || c->dead || c->nats) continue;
        if (c->websocket) websocket_close(s, c, 1001);
        else if (!c->in && !c->out.size && c->file < 0) client_kill(s, c);
        client_flush(s, c);
    }
}

/* The one place where clients end. */
static void server_reap(struct server *s) {
    while (s->dead) {
        struct client *c = s->dead;
        s->dead = c->next_dead;
        if (c->nats) nats_disconnect(s);
        channel_remove(c);
        struct client **link = &s->waiting;
        /* Who waits stands in the list, so the walk ends there.
         * NOLINTNEXTLINE(clang-analyzer-core.NullDereference) */
        while (c->waiting && *link != c) link = &(*link)->next_waiting;
        if (c->waiting) *link = c->next_waiting;
        if (c->waiting && !*link) s->waiting_end = link;
        s->clients[c->fd] = NULL;
        socket_close(c);
        client_close_file(s, c);
        s->unsent -= c->counted;
        buffer_clear(&c->out);
        free(c->in);
        s->connections--;
        s->counters[CLIENTS] -= c->websocket;
        free(c);
    }
}

/* Those who wait try again, in their order; who got on and waits again goes
 * to the end, so that each has its turn. */
static void server_retry(struct server *s) {
    struct client *queue = s->waiting, *moved = NULL, **moved_end = &moved;
    s->waiting = NULL;
    s->waiting_end = &s->waiting;
    for (struct client *c = queue; c; c = queue) {
        struct client **end = s->waiting_end;
        uint64_t before = s->counters[RECEIVED];
        queue = c->next_waiting;
        c->waiting = false;
        if (!c->dead) client_process(s, c);
        if (!c->waiting || s->counters[RECEIVED] == before) continue;
        *end = NULL;
        s->waiting_end = end;
        *moved_end = c;
        moved_end = &c->next_waiting;
    }
    if (!moved) return;
    *s->waiting_end = moved;
    s->waiting_end = moved_end;
}

/* The line that says where we are, for people and for tests. It comes when
 * we know what the others know: from then on, they need not stay. */
static void server_announce(struct server *s) {
    const char *address = s->option['a'] ? s->option['a'] : "localhost";
    bool v6 = strchr(address, ':'), group = s->bus.group;
    fprintf(stderr, "chat: listening on http%s://%s%s%s:%s/, bus %s%s%s\n",
            s->tls ? "s" : "", v6 ? "[" : "", address, v6 ? "]" : "", s->port,
            s->option['b'], group ? " on " : "", group ? s->option['i'] : "");
    s->announced = true;
}

/* Lets out what came of this round, and does what is due by time. (What is
 * posted after the flush goes out in the next round.) Returns how long epoll
 * may wait. */
static int server_round_end(struct server *s) {
    bool more = false;
    server_retry(s);
    bus_deliver(s);
    bus_flush(s);
    for (struct channel *ch = s->channels; ch; ch = ch->next) {
        if (ch->dirty || ch->at) channel_flush(s, ch);
        more |= ch->dirty || ch->at;
    }
    nats_flush(s);
    int64_t next = bus_tick(s);
    if (s->now >= s->tick_at) {
        int due = 0;
        for (size_t fd = 0; fd < s->clients_end && due < TIMEOUTS_MAX; fd++)
            if (s->clients[fd] && s->now >= s->clients[fd]->deadline) {
                client_timeout(s, s->clients[fd]);
                due++;
            }
        s->tick_at = due < TIMEOUTS_MAX ? s->now + SECOND : s->now;
    }
    server_reap(s);
    /* After it, as a connection that ended is made anew. */
    next = earlier(next, nats_tick(s));
    s->catching_up = s->catching_up && s->bus.waits;
    if (!s->catching_up && !s->announced) server_announce(s);
    server_watch_listener(s);
    fflush(stdout); /* here alone we wait for somebody: the log's reader */
    next = earlier(next, s->tick_at);
    if (s->stopping) next = earlier(next, s->stop_at);
    if (s->waiting) next = earlier(next, s->now + 100); /* a lap ends */
    return more || next < s->now ? 0 : (int)(next - s->now);
}

static void server_event(struct server *s, const struct epoll_event *event) {
    struct signalfd_siginfo signal;
    int fd = event->data.fd;
    if (fd == s->listener && !s->stopping) server_accept(s);
    else if (fd == s->bus.fd) bus_readable(s);
    else if (fd == s->signals && read(fd, &signal, sizeof signal) > 0) {
        if (signal.ssi_signo == SIGHUP) tls_load(s);
        else server_stop(s);
    }
    else if (s->clients[fd]) client_event(s, s->clients[fd], event->events);
}

/* A round begins where the last one ends: that says how long to wait. */
static void server_run(struct server *s) {
    static struct epoll_event events[EVENTS_MAX];
    int64_t start = clock_us(CLOCK_MONOTONIC);
    for (;;) {
        int timeout = server_round_end(s);
        bool done = !s->connections && bus_drained(s);
        if (s->stopping && (done || s->now >= s->stop_at)) return;
        int n = epoll_pwait(s->epoll, events, EVENTS_MAX, timeout, NULL);
        s->now = (clock_us(CLOCK_MONOTONIC) - start) / 1000;
        for (int i = 0; i < n; i++) server_event(s, &events[i]);
    }
}

/* ---- 15. Options and main ------------------------------------------------
 * One table makes the options, their defaults and the text of -h. Options
 * without a short form have a letter as well, which getopt is not told.
 */
static const struct {
    struct option option; /* as getopt_long wants it */
    const char *argument, *value, *help;
} option_table[] = {
    {{"port", 1, NULL, 'p'}, "PORT", "8080", "0 takes a free port"},
    {{"address", 1, NULL, 'a'}, "ADDR", NULL, "all, IPv6 and IPv4"},
    {{"dir", 1, NULL, 'd'}, "DIR", NULL, "serve the files beneath DIR"},
    {{"bus", 1, NULL, 'b'}, "BUS", "239.255.80.80:8081",
     "a multicast group, HOST:PORT,..., nats://HOST or none"},
    {{"interface", 1, NULL, 'i'}, "NAME", "lo", "where the bus is, if a group"},
    {{"ttl", 1, NULL, 't'}, "N", NULL, "routers to pass; 0 on lo, else 1"},
    {{"secret", 1, NULL, 's'}, "FILE", NULL,
     "of the bus; or CHAT_SECRET; \"none\" for none"},
    {{"workers", 1, NULL, 'j'}, "N", NULL,
     "1; processes that share the port and meet on the bus"},
    {{"max-message", 1, NULL, 'm'}, "SIZE", "64K", "to 16M"},
    {{"history", 1, NULL, 'H'}, "SIZE", "256K",
     "of history a channel, 4 x max-message or more"},
    {{"max-clients", 1, NULL, 'c'}, "N", NULL, "what RLIMIT_NOFILE allows"},
    {{"origin", 1, NULL, 'o'}, "ORIGIN", NULL, "may be repeated; * allows all"},
    {{"metrics", 0, NULL, 'M'}, "", NULL, "serve /metrics"},
    {{"cert", 1, NULL, 'C'}, "FILE", NULL,
     "https and wss, with --key (needs make TLS=1)"},
    {{"key", 1, NULL, 'K'}, "FILE", NULL,
     "its private key; SIGHUP loads both again"},
    {{"quiet", 0, NULL, 'q'}, "", NULL, "no request log"},
    {{"help", 0, NULL, 'h'}, "", NULL, "this text"},
    {{"version", 0, NULL, 'V'}, "", NULL, "the version"},
};
enum { OPTIONS = sizeof option_table / sizeof *option_table };
static const char short_options[] = "p:a:d:b:i:s:j:m:H:c:o:qhV";

static void usage(void) {
    printf("Usage: chat [OPTION]...\n"
           "What one browser sends, every browser shows.\n\n");
    for (int i = 0; i < OPTIONS; i++) {
        const struct option *o = &option_table[i].option;
        const char *value = option_table[i].value;
        if (strchr(short_options, o->val)) printf("  -%c, ", o->val);
        else printf("      ");
        printf("--%s %-*s  %s%s%s\n", o->name, 17 - (int)strlen(o->name),
               option_table[i].argument, value ? value : "",
               value ? "; " : "", option_table[i].help);
    }
    printf("\nSizes take K and M.\n");
    exit(0);
}

static const char *option_name(int letter) {
    int i = 0; /* it is one of these */
    while (option_table[i].option.val != letter) i++;
    return option_table[i].option.name;
}

/* The value of an option as a number from low to high; sizes take K and M;
 * 0 if it was not given. */
static size_t option_number(struct server *s, int letter, int64_t low,
                            int64_t high) {
    const char *value = s->option[letter];
    if (!value) return 0;
    char *end;
    int64_t unit = 1, number = strtoll(value, &end, 10); /* large: the most */
    if (strchr("mH", letter) && (*end == 'K' || *end == 'M'))
        unit = *end++ == 'K' ? KIB : MIB;
    if (!isdigit((unsigned char)*value) || *end || number > high / unit ||
        number * unit < low) option_error(option_name(letter), "bad value");
    return (size_t)(number * unit);
}

static void options_parse(struct server *s, int argc, char **argv) {
    struct option table[OPTIONS + 1] = {0};
    for (int i = 0; i < OPTIONS; i++) {
        table[i] = option_table[i].option;
        s->option[table[i].val] = option_table[i].value;
    }
    for (int c = 0; c != -1;) {
        c = getopt_long(argc, argv, short_options, table, NULL);
        if (c == '?') exit(2); /* it has said why */
        if (optarg && !*optarg) option_error(option_name(c), "empty value");
        if (c > 0) s->option[c] = optarg ? optarg : "";
        if (c == 'o' && s->origin_count == 16)
            option_error("origin", "too many");
        if (c == 'o') s->origins[s->origin_count++] = optarg;
    }
    if (s->option['h']) usage();
    if (s->option['V']) exit(printf("chat 1.0\n") < 0);
    if (!s->option['C'] != !s->option['K'])
        option_error(s->option['C'] ? "cert" : "key", "needs --cert and --key");
    if (optind < argc) option_error(argv[optind], "not an option");
    option_number(s, 'p', 0, 65535);
    option_number(s, 't', 0, 255);
    s->workers = (int)option_number(s, 'j', 1, WORKERS_MAX);
    if (s->workers == 0) s->workers = 1;
    if (s->workers > 1 && !strcmp(s->option['b'], "none"))
        option_error("workers", "more than one need a bus");
    s->max_message = option_number(s, 'm', 1, MESSAGE_MAX);
    s->history = option_number(s, 'H', 1, 1024 * MIB);
    s->max_clients = option_number(s, 'c', 1, 1 << 20);
    if (s->history < 4 * s->max_message) s->history = 4 * s->max_message;
}

/* Listens on the address given, else on all of IPv6 and IPv4, or of IPv4 on
 * a machine without IPv6. With -j, also others of the same user may listen
 * there; the kernel then shares out the connections. */
static int server_listen(struct server *s) {
    struct addrinfo hints = {.ai_flags = AI_PASSIVE, .ai_family = AF_UNSPEC,
                             .ai_socktype = SOCK_STREAM}, *found;
    const char *address = s->option['a'] ? s->option['a'] : "::";
    int on = 1, off = 0, size = SEND_BUFFER;
    int probe = socket(AF_INET6, SOCK_STREAM, 0);
    if (probe < 0 && !s->option['a']) address = "0.0.0.0";
    close(probe);
    int error = getaddrinfo(address, s->option['p'], &hints, &found);
    if (error) fail(address, gai_strerror(error));
    int fd = must(socket(found->ai_family, SOCK_STREAM | SOCK_NONBLOCK |
                         SOCK_CLOEXEC, 0), "socket");
    /* What is set here, the accepted connections inherit. */
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    if (s->option['j'])
        setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &on, sizeof on);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    must(bind(fd, found->ai_addr, found->ai_addrlen), "bind");
    must(listen(fd, SOMAXCONN), "listen");
    freeaddrinfo(found);
    struct sockaddr_in6 at = {0}; /* its port stands where IPv4 has it */
    socklen_t at_size = sizeof at;
    getsockname(fd, (struct sockaddr *)&at, &at_size);
    snprintf(s->port, sizeof s->port, "%d", ntohs(at.sin6_port));
    s->option['p'] = s->port; /* for the other workers, where it was 0 */
    return fd;
}

/* As many descriptors as the machine allows, less what is not a client. */
static void server_limits(struct server *s) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit); /* cannot fail */
    limit.rlim_cur = limit.rlim_max < 1 << 20 ? limit.rlim_max : 1 << 20;
    setrlimit(RLIMIT_NOFILE, &limit);
    s->clients_size = limit.rlim_cur;
    size_t most = s->clients_size > 64 ? s->clients_size - 32 : 32;
    if (!s->max_clients || s->max_clients > most) s->max_clients = most;
    s->clients = calloc(s->clients_size, sizeof(struct client *));
    s->input = malloc(sizeof *s->input + READ_SIZE);
    if (!s->clients || !s->input) fail("start", "out of memory");
    *s->input = (struct input){.capacity = READ_SIZE};
}

static void server_watch(struct server *s, int fd) {
    struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
    must(epoll_ctl(s->epoll, EPOLL_CTL_ADD, fd, &event), "epoll_ctl");
}

/* All that can fail for a reason that its user can mend. */
static void server_configure(struct server *s) {
    s->page = must(memfd_create("page", MFD_CLOEXEC), "memfd_create");
    must((int)write(s->page, index_html, index_html_size), "write");
    s->home = must(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC), "open");
    s->dir = -1;
    if (s->option['d'])
        s->dir = must(open(s->option['d'], O_PATH | O_DIRECTORY | O_CLOEXEC),
                      s->option['d']);
    setenv("TZ", ":/etc/localtime", 0); /* so that it is read only once, ... */
    tzset();                            /* ... and now, while we may */
    if (s->option['C'] && !tls_load(s)) exit(1);
    if (!strncmp(s->option['b'], "nats://", 7)) nats_configure(s);
    else bus_configure(s);
    if (s->bus.to_count > 0) bus_secret(s);
    for (int i = 0; i < s->workers; i++) {
        s->worker[i].listener = server_listen(s);
        s->worker[i].bus = bus_socket(s, i);
    }
    sigset_t signals;
    signal(SIGPIPE, SIG_IGN);
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    if (s->tls) sigaddset(&signals, SIGHUP);
    if (s->workers > 1) sigaddset(&signals, SIGCHLD);
    signal(SIGCHLD, SIG_DFL); /* whoever started us may have ignored it */
    sigprocmask(SIG_BLOCK, &signals, NULL); /* they come as events */
    s->signals = must(signalfd(-1, &signals, SFD_CLOEXEC), "signalfd");
}

static void server_open(struct server *s, int worker) {
    for (int i = 0; i < s->workers; i++) {
        if (i == worker) continue;
        close(s->worker[i].listener);
        close(s->worker[i].bus);
    }
    s->listener = s->worker[worker].listener;
    s->epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    s->waiting_end = &s->waiting;
    server_limits(s);
    bus_open(s, s->worker[worker].bus);
    if (s->nats.state != OFF) s->max_clients++; /* for its connection */
    server_watch(s, s->signals);
    server_watch(s, s->listener);
    if (s->bus.fd >= 0) server_watch(s, s->bus.fd);
    s->accepting = true;
    s->catching_up = true; /* the first client finds a history */
}

static void server_close(struct server *s) {
    for (size_t fd = 0; fd < s->clients_end; fd++)
        if (s->clients[fd]) client_kill(s, s->clients[fd]);
    server_reap(s);
    bus_close(s);
    while (s->channels) channel_free(s, &s->channels);
    free(s->clients);
    free(s->input);
    close(s->epoll);
    close(s->signals);
    if (s->dir >= 0) close(s->dir);
    close(s->home);
    close(s->page);
}

/* The numbers of linux/audit.h, linux/filter.h and linux/seccomp.h, which not
 * every libc brings along. */
#if defined NO_SANDBOX /* for tools that need more calls than the chat */
#elif defined __x86_64__
#define MACHINE 0xC000003E
#elif defined __aarch64__
#define MACHINE 0xC00000B7
#elif defined __riscv && __riscv_xlen == 64
#define MACHINE 0xC00000F3
#endif

enum { LOAD = 0x20, IF_EQUAL = 0x15, RETURN = 6, ALLOW = 0x7FFF0000,
       REFUSE = 0x50000 | EPERM, SET_FILTER = 1, SPECULATION_ALLOWED = 4 };

struct instruction {
    uint16_t code;
    uint8_t then, otherwise; /* instructions to skip */
    uint32_t value;
};

/* From here on the kernel refuses all system calls but these (seccomp(2)):
 * who finds a hole in us can start no program, open no socket and, without
 * -d and --cert, no file. A libc that tries more is told EPERM, and copes.
 * Best effort, as this is a second wall: a kernel without it will do. Code
 * that needs another call has to list it here. */
static void server_confine(struct server *s) {
#ifdef MACHINE
    static const uint32_t calls[] = {
        SYS_sendto, SYS_recvfrom, SYS_epoll_pwait, SYS_epoll_ctl, SYS_accept4,
        SYS_read, SYS_write, SYS_writev, SYS_sendfile, SYS_close, SYS_shutdown,
        SYS_brk, SYS_mmap, SYS_munmap, SYS_mremap, SYS_madvise,
        SYS_memfd_create, SYS_ftruncate, SYS_getpeername, SYS_clock_gettime,
        SYS_futex, SYS_getrandom, SYS_restart_syscall, SYS_exit_group,
        /* for NATS: */
        SYS_socket, SYS_setsockopt, SYS_connect,
        /* for files: */
        SYS_openat2, SYS_openat, SYS_fstat, SYS_newfstatat, SYS_pread64,
        SYS_getdents64, SYS_fchdir, SYS_lseek, SYS_fcntl,
        SYS_getpid, /* OpenSSL's random numbers: still the same process? */
#ifdef SYS_open
        SYS_open,
#endif
    };
    enum { CALLS = sizeof calls / sizeof *calls };
    struct instruction filter[5 + 2 * CALLS] = {
        {LOAD, 0, 0, 4}, {IF_EQUAL, 1, 0, MACHINE}, {RETURN, 0, 0, REFUSE},
        {LOAD, 0, 0, 0}}, *end = filter + 4;
    for (size_t i = 0; i < CALLS; i++) {
        if (calls[i] == SYS_socket && !s->nats.state) i += 3; /* its line */
        if (calls[i] == SYS_openat2 && s->dir < 0 && !s->tls) break;
        *end++ = (struct instruction){IF_EQUAL, 0, 1, calls[i]};
        *end++ = (struct instruction){RETURN, 0, 0, ALLOW};
    }
    *end++ = (struct instruction){RETURN, 0, 0, REFUSE};
    struct {
        unsigned short size;
        struct instruction *filter;
    } program = {(unsigned short)(end - filter), filter};
    prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
    syscall(SYS_seccomp, SET_FILTER, SPECULATION_ALLOWED, &program);
#else
    (void)s;
#endif
}

/* With -j, the first process only looks after the workers. This starts those
 * that are missing. Returns -1, and in a worker its number. */
static int workers_start(struct server *s) {
    pid_t parent = getpid();
    for (int i = 0; i < s->workers; i++) {
        if (s->worker[i].pid) continue;
        s->worker[i].pid = must(fork(), "fork");
        s->running++;
        if (s->worker[i].pid) continue;
        prctl(PR_SET_PDEATHSIG, SIGTERM); /* none lives on without us */
        if (getppid() != parent) exit(1);
        return i;
    }
    return -1;
}

static void workers_signal(struct server *s, int signal) {
    bool stop = signal == SIGINT || signal == SIGTERM;
    for (int i = 0; i < s->workers; i++) {
        if (stop && !s->stopping)
            close(s->worker[i].listener); /* so that theirs really close */
        if (s->worker[i].pid) kill(s->worker[i].pid, signal);
    }
    s->stopping |= stop;
}

/* Takes note of those that have ended. A worker that saw no way to start is
 * the end of all, unless one has been replaced: then it is tried again. */
static void workers_reap(struct server *s) {
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        int i = 0;
        while (i < s->workers && s->worker[i].pid != pid) i++;
        if (i == s->workers) continue; /* process 1 gets others', too */
        s->worker[i].pid = 0;
        s->running--;
        if (s->stopping) continue;
        if (WIFEXITED(status) && WEXITSTATUS(status) && !s->replaced) exit(1);
        fprintf(stderr, "chat: worker %d died, replaced\n", (int)pid);
        s->replaced = true;
    }
    if (!s->stopping) usleep(100 * 1000); /* who dies at once must not spin */
}

/* Starts the workers, replaces those that die and passes signals on. The
 * connections of a dead one wait in its sockets, which are ours as well.
 * Returns only in a worker: its number. */
static int workers_run(struct server *s) {
    struct signalfd_siginfo signal;
    static char line[64 * KIB];
    setvbuf(stdout, line, _IOLBF, sizeof line); /* so that none is torn */
    while (!s->stopping || s->running > 0) {
        int worker = s->stopping ? -1 : workers_start(s);
        s->announced |= worker != 0; /* the first worker does it, once */
        if (worker >= 0) return worker;
        must((int)read(s->signals, &signal, sizeof signal), "read");
        if (signal.ssi_signo == SIGCHLD) workers_reap(s);
        else if (signal.ssi_signo != SIGHUP || tls_load(s))
            workers_signal(s, (int)signal.ssi_signo);
    }
    exit(0);
}

int main(int argc, char **argv) {
    static struct server server;
    options_parse(&server, argc, argv);
    server_configure(&server);
    server_open(&server, server.workers > 1 ? workers_run(&server) : 0);
    server_confine(&server);
    server_run(&server);
    server_close(&server);
    return 0;
}
