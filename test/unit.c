/* SPDX-License-Identifier: MIT
 *
 * unit.c: tests of the program's functions from within. It includes the
 * program. Parsers get copies of exactly their input's size, so that a
 * sanitizer build sees a byte read too many. The bus runs in virtual time on
 * a network that loses, doubles and reorders datagrams.
 */
#define _GNU_SOURCE
#include <netdb.h>
#include <sys/socket.h>

static ssize_t network_send(int fd, const void *bytes, size_t size, int flags,
                            const struct sockaddr *to, socklen_t to_size);
#define sendto network_send
#define main server_main
#include "../main.c"
#undef main
#undef sendto

#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- Cases -------------------------------------------------------------- */

static struct {
    char name[120], why[300]; /* of the case that runs; why: "" so far */
    int failed;
} test;

__attribute__((format(printf, 1, 2)))
static void begin(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(test.name, sizeof test.name, format, arguments);
    va_end(arguments);
    *test.why = '\0';
}

/* The first thing that is not so is reported. */
__attribute__((format(printf, 2, 3)))
static void expect(bool good, const char *format, ...) {
    va_list arguments;
    if (good || *test.why) return;
    va_start(arguments, format);
    vsnprintf(test.why, sizeof test.why, format, arguments);
    va_end(arguments);
}

static void finish(void) {
    test.failed += *test.why != '\0';
    printf("%s - %s%s%s\n", *test.why ? "FAILED" : "ok", test.name,
           *test.why ? ": " : "", test.why);
}

static void *copy_of(const void *bytes, size_t size) {
    char *copy = malloc(size ? size : 1);
    if (!copy) fail("test", "out of memory");
    if (size) memcpy(copy, bytes, size);
    return copy;
}

/* A generator with the same numbers on each run. */
static uint32_t chance(uint32_t below) {
    static uint64_t state = 88172645463325252;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (uint32_t)(state >> 32) % below;
}

/* ---- Text --------------------------------------------------------------- */

static void test_numbers(void) {
    static const struct {
        const char *text;
        int64_t want;
    } cases[] = {
        {"0", 0}, {"7", 7}, {"007", 7}, {"65535", 65535},
        {"999999999999999999", 999999999999999999}, {"", -1}, {"-1", -1},
        {"+1", -1}, {" 1", -1}, {"1 ", -1}, {"1x", -1}, {"0x10", -1},
        {"1,1", -1}, {"1.0", -1}, {"1000000000000000000", -1},
        {"18446744073709551617", -1}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        begin("parse_number '%s'", cases[i].text);
        int64_t got = parse_number(cases[i].text);
        expect(got == cases[i].want, "%lld", (long long)got);
        finish();
    }
    begin("get_number and put_number: network order, each size");
    for (int n = 1; n <= 8; n++) {
        uint8_t bytes[8];
        uint64_t value = 0x8182838485868788 >> (64 - 8 * n);
        put_number(bytes, value, n);
        expect(bytes[0] == 0x81 && bytes[n - 1] == 0x80 + n, "bytes of %d", n);
        expect(get_number(bytes, n) == value, "value of %d", n);
    }
    finish();
}

static void test_percent(void) {
    static const struct {
        const char *in;
        bool query;
        ssize_t want;
        const char *out;
    } cases[] = {
        {"", false, 0, ""}, {"abc", false, 3, "abc"}, {"a+b", true, 3, "a b"},
        {"a+b", false, 3, "a+b"}, {"%41%7a", false, 2, "Az"},
        {"%2B+", true, 2, "+ "}, {"%e4%E4", false, 2, "\xE4\xE4"},
        {"%2541", false, 3, "%41"}, {"a%00b", false, 3, "a\0b"},
        {"%", false, -1, ""}, {"%4", false, -1, ""}, {"%4g", false, -1, ""},
        {"%g4", false, -1, ""}, {"ab%", true, -1, ""}, {"%%41", true, -1, ""},
        {"% 1", false, -1, ""}, {"%+1", true, -1, ""}, {"%-1", false, -1, ""},
        {"%u0041", false, -1, ""}, {"%0x41", false, -1, ""}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t n = strlen(cases[i].in);
        char *in = copy_of(cases[i].in, n + 1), *out = malloc(n + 1);
        begin("percent_decode '%s'%s", in, cases[i].query ? " in a query" : "");
        ssize_t got = percent_decode(in, n, out, cases[i].query);
        expect(got == cases[i].want, "size %zd", got);
        if (got == cases[i].want)
            expect(!memcmp(out, cases[i].out, (size_t)(got < 0 ? 0 : got) + 1),
                   "'%s'", out);
        free(out);
        got = percent_decode(in, n, in, cases[i].query); /* in its own place */
        expect(got == cases[i].want, "in place: size %zd", got);
        free(in);
        finish();
    }
}

static void test_query(void) {
    static const struct {
        const char *query, *name;
        ssize_t want;
        const char *out;
    } cases[] = {
        {"a=1&b=2", "a", 1, "1"}, {"a=1&b=2", "b", 1, "2"},
        {"a=1&b=2", "c", -1, NULL}, {"", "a", -1, NULL}, {"a", "a", 0, ""},
        {"a=", "a", 0, ""}, {"a&b=1", "b", 1, "1"}, {"aa=1", "a", -1, NULL},
        {"A=1", "a", -1, NULL}, {"a=1&a=2", "a", 1, "1"},
        {"&&a=1&&", "a", 1, "1"}, {"a==1", "a", 2, "=1"},
        {"a=b=c&d", "a", 3, "b=c"}, {"%61=x+y%2B", "a", 4, "x y+"},
        {"b=%zz&a=1", "a", 1, "1"}, {"a=%zz", "a", -2, NULL},
        {"a=%", "a", -2, NULL}, {"a=%4&b=1", "a", -2, NULL},
        {"%=1&a=2", "a", 1, "2"}, {"%6&1=x", "a", -1, NULL},
        {"x?a=1", "a", -1, NULL}, {"a=%26%3d", "a", 2, "&="},
        {"+a=1", "a", -1, NULL}, {"b=a=1", "a", -1, NULL},
        {"a;b=1", "b", -1, NULL}, {"a=\xC3\xA4", "a", 2, "\xC3\xA4"},
        {"a%00=1", "a", -1, NULL}, {"a%00b=1&a=2", "a", 1, "2"},
        {"%00=1", "", -1, NULL}, {"a=%2541", "a", 3, "%41"},
        {"a=%00b", "a", 2, NULL}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        size_t n = strlen(cases[i].query);
        char *query = copy_of(cases[i].query, n + 1), *out = malloc(n + 1);
        begin("query_get '%s' in '%s'", cases[i].name, query);
        ssize_t got = query_get(query, cases[i].name, out);
        expect(got == cases[i].want, "size %zd", got);
        if (got >= 0 && cases[i].out)
            expect(!strcmp(out, cases[i].out), "'%s'", out);
        free(query);
        free(out);
        finish();
    }
}

static void test_lists(void) {
    static const struct {
        const char *list;
        bool want;
    } cases[] = {
        {"upgrade", true}, {"Upgrade", true}, {"keep-alive, Upgrade", true},
        {"a,b,UPGRADE", true}, {" , ,\tupgrade ,", true}, {"", false},
        {"upgrades", false}, {"upgrad", false}, {"x-upgrade", false},
        {"up, grade", false}, {"\"upgrade\"", false}, {",", false},
        {"no upgrade", false}, {"upgrade now", false}, {"upgrade;q=1", false},
        {"x,upgrade\t ,y", true}, {"upgrade,", true}, {" \t", false}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        begin("list_has '%s'", cases[i].list);
        expect(list_has(cases[i].list, "upgrade") == cases[i].want, "wrong");
        finish();
    }
}

static void test_buffers(void) {
    struct buffer b = {0};
    begin("buffers grow and keep what they have");
    for (int i = 0; i < 1000; i++) {
        buffer_print(&b, "%d,", i % 10);
        buffer_add(&b, "x", i % 2);
    }
    expect(b.size == 2500 && b.capacity > 2500 && !b.failed, "%zu", b.size);
    expect(!memcmp(b.bytes, "0,1,x2,3,x4,", 12), "%.12s", b.bytes);
    expect(!memcmp(b.bytes + 2495, "8,9,x", 5), "%.5s", b.bytes + 2495);
    buffer_clear(&b);
    expect(!b.bytes && !b.size && !b.capacity, "not cleared");
    finish();

    begin("buffer_json escapes quotes, backslashes and controls");
    buffer_json(&b, (struct text){"a\"\\\n\0\x1f\x7f\xC3\xA4/", 10});
    buffer_add(&b, "", 1);
    expect(!strcmp(b.bytes, "\"a\\\"\\\\\\u000a\\u0000\\u001f\x7f\xC3\xA4/\""),
           "%s", b.bytes);
    buffer_clear(&b);
    finish();

    begin("buffer_escape for HTML keeps UTF-8");
    buffer_escape(&b, text_of("a<b>&\"'\xC3\xA4 /"), "/", "&#%d;");
    buffer_add(&b, "", 1);
    expect(!strcmp(b.bytes, "a&#60;b&#62;&#38;&#34;&#39;\xC3\xA4&#32;/"),
           "%s", b.bytes);
    buffer_clear(&b);
    finish();

    begin("buffer_escape for addresses escapes each byte, in two digits");
    buffer_escape(&b, text_of("a b\n\xC3\xA4%/~"), "/.-_~", "%%%02X");
    buffer_add(&b, "", 1);
    expect(!strcmp(b.bytes, "a%20b%0A%C3%A4%25/~"), "%s", b.bytes);
    buffer_clear(&b);
    finish();
}

/* ---- UTF-8 -------------------------------------------------------------- */

/* A decoder that shares nothing with the program's: whole sequences, by
 * their values (RFC 3629). */
static bool plain_utf8(const uint8_t *at, size_t size) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    for (size_t i = 0, n; i < size; i += n) {
        uint32_t c = at[i];
        n = c < 0x80 ? 1 : c >> 5 == 6 ? 2 : c >> 4 == 14 ? 3 : 4;
        if (n > size - i || (n == 4 && c >> 3 != 30)) return false;
        if (n > 1) c &= 0x7FU >> n;
        for (size_t j = 1; j < n; j++) {
            if (at[i + j] >> 6 != 2) return false;
            c = c << 6 | (at[i + j] & 63);
        }
        if (c < least[n] || c > 0x10FFFF || (c >= 0xD800 && c <= 0xDFFF))
            return false;
    }
    return true;
}

/* The same answer whole and cut in two anywhere. */
static bool utf8_agrees(const uint8_t *bytes, size_t size) {
    bool want = plain_utf8(bytes, size);
    for (size_t split = 0; split <= size; split++) {
        struct utf8 u = {0};
        bool good = utf8_check(&u, bytes, split) &&
                    utf8_check(&u, bytes + split, size - split);
        if ((good && u.left == 0) != want) return false;
    }
    return utf8_valid(bytes, size) == want;
}

static void test_utf8(void) {
    static const uint8_t edges[] = {
        0x00, 0x41, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1, 0xC2,
        0xDF, 0xE0, 0xE1, 0xEC, 0xED, 0xEE, 0xEF, 0xF0, 0xF1, 0xF3, 0xF4, 0xF5,
        0xF8, 0xFE, 0xFF};
    uint32_t n = COUNT(edges), wrong = 0, all = n * n * n * n;
    begin("utf8_check: every sequence of four edge bytes, cut anywhere");
    for (uint32_t i = 0; i < all; i++) {
        uint8_t bytes[4] = {edges[i % n], edges[i / n % n],
                            edges[i / n / n % n], edges[i / n / n / n]};
        wrong += !utf8_agrees(bytes, 4);
    }
    expect(wrong == 0, "%u of %u", wrong, all);
    finish();

    begin("utf8_check: every sequence of one, two and three bytes");
    wrong = 0;
    for (uint32_t i = 0; i < 1 << 24; i += i < 1 << 17 ? 1 : 61) {
        uint8_t bytes[3] = {(uint8_t)(i >> 16), (uint8_t)(i >> 8), (uint8_t)i};
        for (size_t size = 1; size <= 3; size++)
            wrong += utf8_valid(bytes, size) != plain_utf8(bytes, size);
    }
    expect(wrong == 0, "%u", wrong);
    finish();

    begin("utf8_check: a bad byte is seen behind any number of good ones");
    for (size_t size = 1; size < 40; size++)
        for (size_t at = 0; at < size; at++) {
            uint8_t *bytes = malloc(size);
            struct utf8 u = {0};
            memset(bytes, 'a', size);
            bytes[at] = 0xFF;
            expect(!utf8_check(&u, bytes, size), "%zu of %zu", at, size);
            free(bytes);
        }
    finish();

    begin("utf8_check: random mixtures, cut anywhere");
    static const char *const parts[] = {"a", "\xC3\xA4", "\xE2\x82\xAC",
        "\xF0\x9F\x98\x80", "12345678", "\xED\xA0\x80", "\xC3", "\x80"};
    wrong = 0;
    for (int i = 0; i < 4000; i++) {
        char text[80] = "";
        for (uint32_t j = chance(9); j > 0; j--)
            strcat(text, parts[chance(chance(4) ? 5 : COUNT(parts))]);
        uint8_t *bytes = copy_of(text, strlen(text));
        wrong += !utf8_agrees(bytes, strlen(text));
        free(bytes);
    }
    expect(wrong == 0, "%u", wrong);
    finish();
}

/* ---- Hashes ------------------------------------------------------------- */

static const char *hex_of(const uint8_t *bytes) {
    static char hex[2 * SHA1_SIZE + 1];
    for (int i = 0; i < SHA1_SIZE; i++)
        snprintf(hex + 2 * i, 3, "%02x", bytes[i]);
    return hex;
}

static void test_sha1(void) {
    static const struct {
        const char *name, *text;
        int times;
        const char *want;
    } cases[] = {
        {"RFC 3174 1", "abc", 1, "a9993e364706816aba3e25717850c26c9cd0d89d"},
        {"RFC 3174 2",
         "abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq", 1,
         "84983e441c3bd26ebaae4aa1f95129e5e54670f1"},
        {"RFC 3174 3", "a", 1000000,
         "34aa973cd4c4daa4f61eeb2bdbad27316534016f"},
        {"RFC 3174 4", "0123456701234567012345670123456701234567012345670123456"
         "701234567", 10, "dea356a2cddd90c7a7ecedc5ebb563934f460452"},
        {"nothing", "", 1, "da39a3ee5e6b4b0d3255bfef95601890afd80709"},
        {"RFC 6455 1.3", "dGhlIHNhbXBsZSBub25jZQ=="
         "258EAFA5-E914-47DA-95CA-C5AB0DC85B11", 1,
         "b37a4f2cc0624f1690f64606cf385945b2bec4ea"},
        {"55 bytes, one block", "a", 55,
         "c1c8bbdc22796e28c0e15163d20899b65621d65a"},
        {"56 bytes, two blocks", "a", 56,
         "c2db330f6083854c99d4b5bfb6e8f29f201be699"},
        {"64 bytes", "a", 64, "0098ba824b5c16427bd7a1122a5a442a25ec644d"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buffer b = {0};
        uint8_t digest[SHA1_SIZE];
        begin("SHA-1: %s", cases[i].name);
        for (int j = 0; j < cases[i].times; j++)
            buffer_add(&b, cases[i].text, strlen(cases[i].text));
        uint8_t *copy = copy_of(b.bytes, b.size);
        sha1_end(sha1_start, copy, b.size, digest);
        expect(!strcmp(hex_of(digest), cases[i].want), "%s", hex_of(digest));
        free(copy);
        buffer_clear(&b);
        finish();
    }
}

static void test_hmac(void) {
    static const struct {
        int key, key_size; /* key: a byte, repeated; -1: 1, 2, 3 ... */
        const char *text;
        int times;
        const char *want;
    } cases[] = { /* RFC 2202 3 */
        {0x0B, 20, "Hi There", 1, "b617318655057264e28bc0b6fb378c8ef146be00"},
        {-2, 4, "what do ya want for nothing?", 1,
         "effcdf6ae5eb2fa2d27416d5f184df9c259a7c79"},
        {0xAA, 20, "\xDD", 50, "125d7342b9ac11cd91a39af48aa17b4f63f175d3"},
        {-1, 25, "\xCD", 50, "4c9007f4026250c6bc8414f9bf50c86c2d7235da"},
        {0x0C, 20, "Test With Truncation", 1,
         "4c1a03424b55e07fe7f27be1d58bb9324a9a5a04"},
        {0xAA, 80, "Test Using Larger Than Block-Size Key - Hash Key First", 1,
         "aa4ae5e15272d00e95705637ce8a3b55ed402112"},
        {0xAA, 80, "Test Using Larger Than Block-Size Key and Larger Than One "
         "Block-Size Data", 1, "e8e99d0f45237d786d6bbaa7965c7808bbff1a91"},
        {0, 0, "", 1, "fbdb1d1b18aa6c08324b7d64b71fb76370690e1d"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buffer b = {0};
        struct hmac k;
        uint8_t mac[SHA1_SIZE], *key = malloc(81);
        begin("HMAC-SHA1: RFC 2202, case %zu", i + 1);
        for (int j = 0; j < cases[i].key_size; j++)
            key[j] = (uint8_t)(cases[i].key == -1 ? j + 1 : cases[i].key);
        if (cases[i].key == -2) memcpy(key, "Jefe", 4);
        for (int j = 0; j < cases[i].times; j++)
            buffer_add(&b, cases[i].text, strlen(cases[i].text));
        hmac_key(&k, key, (size_t)cases[i].key_size);
        hmac_sign(&k, b.bytes ? b.bytes : "", b.size, mac);
        expect(!strcmp(hex_of(mac), cases[i].want), "%s", hex_of(mac));
        free(key);
        buffer_clear(&b);
        finish();
    }
}

static void test_base64(void) {
    static const char *const cases[][2] = { /* RFC 4648 10 */
        {"", ""}, {"f", "Zg=="}, {"fo", "Zm8="}, {"foo", "Zm9v"},
        {"foob", "Zm9vYg=="}, {"fooba", "Zm9vYmE="}, {"foobar", "Zm9vYmFy"},
        {"\xFB\xEF\xFF", "++//"}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct buffer b = {0};
        size_t size = strlen(cases[i][0]);
        uint8_t *in = copy_of(cases[i][0], size);
        begin("base64 of %zu bytes: '%s'", size, cases[i][1]);
        buffer_base64(&b, in, size);
        buffer_add(&b, "", 1);
        expect(!strcmp(b.bytes, cases[i][1]), "%s", b.bytes);
        free(in);
        buffer_clear(&b);
        finish();
    }
}

/* ---- HTTP requests ------------------------------------------------------ */

#define H "Host: h\r\n"

static const struct {
    const char *text;
    int want; /* 1: complete, with a body or another request behind it */
    const char *path, *query;
} requests[] = {
    {"GET / HTTP/1.1\r\n" H "\r\n", 1, "/", ""},
    {"GET / HTTP/1.0\r\n\r\n", 1, "/", ""},
    {"GET / HTTP/1.9\r\n" H "\r\n", 1, "/", ""},
    {"GET /a%20b?c=%41&d HTTP/1.1\r\n" H "\r\n", 1, "/a b", "c=%41&d"},
    {"GET /%2541 HTTP/1.1\r\n" H "\r\n", 1, "/%41", ""},
    {"GET /a?b?c HTTP/1.1\r\n" H "\r\n", 1, "/a", "b?c"},
    {"GET /a%3Fb HTTP/1.1\r\n" H "\r\n", 1, "/a?b", ""},
    {"GET http://h/x?y HTTP/1.1\r\n" H "\r\n", 1, "/x", "y"},
    {"GET HTTP://h:1 HTTP/1.1\r\n" H "\r\n", 1, "/", ""},
    {"GET http://h?q HTTP/1.1\r\n" H "\r\n", 1, "/", "q"},
    {"GET / HTTP/1.1\r\nHost:\r\n\r\n", 1, "/", ""},
    {"GET / HTTP/1.1\r\nhOST:\t h \t\r\nX-Y:\r\n\r\n", 1, "/", ""},
    {"GET / HTTP/1.1\r\n" H "\r\nGET / HTTP/1.1\r\n", 1, "/", ""},
    {"POST /send HTTP/1.1\r\n" H "Content-Length: 3\r\n\r\nabc", 1, "/send", ""},
    {"X!#$%&'*+-.^_`|~1 / HTTP/1.1\r\n" H "\r\n", 1, "/", ""},
    {"GET /\xC3\xA4 HTTP/1.1\r\n" H "X: \xE4\xFF\r\n\r\n", 1, "/\xC3\xA4", ""},
    {"GET /?channel=%C3%A4 HTTP/1.1\r\n" H "\r\n", 1, "/", "channel=%C3%A4"},
    {"", 0, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H, 0, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "\r", 0, NULL, NULL},
    {"GET / HTTP/1.1\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/2.0\r\n" H "\r\n", -505, NULL, NULL},
    {"GET / HTTP/0.9\r\n" H "\r\n", -505, NULL, NULL},
    {"GET / HTTP/1.10\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / http/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1,1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/x.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.x\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /\r\n" H "\r\n", -400, NULL, NULL},
    {"GET\r\n" H "\r\n", -400, NULL, NULL},
    {"GET  / HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /  HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1 \r\n" H "\r\n", -400, NULL, NULL},
    {" GET / HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET\t/\tHTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"G(T / HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET a HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET * HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET ?q HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET https://h/ HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /%zz HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /% HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /%4 HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /a%00b HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET %2F HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"OPTIONS * HTTP/1.1\r\n" H "\r\n", 1, "*", ""},
    {"OPTIONS * HTTP/1.1\r\n\r\n", -400, NULL, NULL},
    {"OPTIONS ** HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"CONNECT h:80 HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http:///x HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http://?q HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http:// HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http://u@h/ HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http://h:x/ HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http:/x HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET http://h/x HTTP/1.1\r\nHost: a b\r\n\r\n", -400, NULL, NULL},
    {"GET http://h/x HTTP/1.1\r\n\r\n", -400, NULL, NULL},
    {"GET http://h/x HTTP/1.0\r\n\r\n", 1, "/x", ""},
    {"GET http://[::1]:80/%41 HTTP/1.1\r\n" H "\r\n", 1, "/A", ""},
    {"GET /?channel=%FF HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /?channel=%C3 HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET /?channel=% HTTP/1.1\r\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\n" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r" H "\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\nHost: h\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X: a\rb\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X: a\x01" "b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X: a\x7F\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H " folded: x\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X: a\r\n b\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X : a\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H ": a\r\n\r\n", -400, NULL, NULL},
    {"GET / HTTP/1.1\r\n" H "X(: a\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: -1\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: +1\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 0x1\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length:\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 1, 1\r\n\r\n", -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 18446744073709551617\r\n\r\n",
     -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 1\r\nContent-Length: 1\r\n\r\n",
     -400, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
     -501, NULL, NULL},
    {"POST / HTTP/1.1\r\n" H "Content-Length: 1\r\n"
     "transfer-encoding:identity\r\n\r\n", -501, NULL, NULL},
};

/* Values of Host; the grammar is in RFC 9110 7.2 and RFC 3986 3.2.2. */
static const struct {
    const char *host;
    bool want;
} hosts[] = {
    {"", true}, {"localhost", true}, {"localhost:8080", true}, {"h:", true},
    {":80", true}, {"192.0.2.1:1", true}, {"[::1]", true}, {"[::1]:80", true},
    {"[2001:DB8::192.0.2.1]", true}, {"a_b-c.d~e", true}, {"%41", true},
    {"a!$&'()*+;=b", true},
    {"h:x", false}, {"h:80:", false}, {"h:8 0", false}, {"h:-1", false},
    {"::1", false}, {"[::1", false}, {"[::1]x", false}, {"[::1]:x", false},
    {"[]]", false}, {"[g]", false}, {"]", false}, {"a b", false},
    {"a\tb", false}, {"a,b", false}, {"a@b", false}, {"a/b", false},
    {"a?b", false}, {"a#b", false}, {"a\\b", false}, {"a\"b", false},
    {"<a>", false}, {"a|b", false}, {"a^b", false}, {"{a}", false},
    {"a`b", false}, {"\xC3\xA4", false}, {"http://h", false}};

static void test_hosts(void) {
    for (size_t i = 0; i < COUNT(hosts); i++) {
        begin("host_valid '%s'", hosts[i].host);
        expect(host_valid(hosts[i].host) == hosts[i].want, "wrong");
        finish();
    }
}

static void test_dates(void) {
    static const struct {
        const char *text;
        long long want; /* -1: it is none */
    } cases[] = {
        {"Sun, 06 Nov 1994 08:49:37 GMT", 784111777},
        {"Sunday, 06-Nov-94 08:49:37 GMT", 784111777},
        {"Sun Nov  6 08:49:37 1994", 784111777},
        {"Thu, 01 Jan 1970 00:00:00 GMT", 0},
        {"Tue, 29 Feb 2000 23:59:59 GMT", 951868799},
        {"Monday, 01-Jan-68 00:00:00 GMT", 3092601600},
        {"Thu Feb 29 12:00:00 2024", 1709208000},
        {"", -1}, {"0", -1}, {"784111777", -1}, {"yesterday", -1},
        {"Sun, 06 Nov 1994", -1}, {"Sun, 06 Nov 1994 08:49:37", -1},
        {"Sun, 06 Nov 1994 08:49:37 PST", -1},
        {"Sun, 06 Nov 1994 08:49:37 GMT x", -1},
        {"Sun, 06 Nov 1994 25:49:37 GMT", -1},
        {"Sun, 32 Nov 1994 08:49:37 GMT", -1},
        {"Sun, 06 Nox 1994 08:49:37 GMT", -1},
        {"1994-11-06T08:49:37Z", -1}, {"Sun Nov  6 08:49:37 1994 GMT", -1}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        time_t time;
        begin("date_parse '%s'", cases[i].text);
        bool good = date_parse(cases[i].text, &time);
        expect(good == (cases[i].want >= 0), "%d", good);
        expect(!good || time == cases[i].want, "%lld", (long long)time);
        finish();
    }
    begin("http_date: none for a time before all files");
    static const long long times[] = {-1, -100000, INT64_MIN, INT64_MAX};
    for (size_t i = 0; i < COUNT(times); i++) {
        char date[40];
        http_date(date, (time_t)times[i]);
        expect(!*date, "%lld is %s", times[i], date);
    }
    finish();
}

/* What the parser says of a copy of the first n bytes. */
static int parse_prefix(const char *text, size_t n, struct request *r) {
    char *copy = copy_of(text, n);
    int result = request_parse(copy, n, r);
    free(copy);
    return result;
}

static void test_request(const char *text, size_t n, int want) {
    static struct request r;
    const char *end = strstr(text, "\r\n\r\n");
    int whole = want == 1 ? (int)(end + 4 - text) : want;
    int got = parse_prefix(text, n, &r);
    expect(got == whole, "%d instead of %d", got, whole);
    for (size_t i = 1; i < n; i++) {
        bool complete = whole > 0 && i >= (size_t)whole;
        got = parse_prefix(text, i, &r);
        expect(complete ? got == whole : got == 0 || (want < 0 && got == want),
               "of the first %zu bytes it says %d", i, got);
    }
}

static void test_requests(void) {
    static struct request r;
    for (size_t i = 0; i < COUNT(requests); i++) {
        const char *text = requests[i].text;
        struct buffer name = {0};
        buffer_json(&name, (struct text){text, strcspn(text, "")});
        begin("request %.*s", (int)(name.size > 70 ? 70 : name.size),
              name.bytes);
        buffer_clear(&name);
        test_request(text, strlen(text), requests[i].want);
        if (requests[i].want == 1) {
            parse_prefix(text, strlen(text), &r);
            expect(!strcmp(r.path, requests[i].path), "path %s", r.path);
            expect(!strcmp(r.query, requests[i].query), "query %s", r.query);
        }
        finish();
    }
}

static void test_request_fields(void) {
    static struct request r;
    static const char text[] =
        "POST /send?channel=a+b&x HTTP/1.1\r\nhost: h:80\r\n"
        "Origin: http://h:80\r\nUpgrade: foo, WebSocket\r\n"
        "Connection: keep-alive\r\nConnection: x, upgrade\r\n"
        "Sec-WebSocket-Key:  a b \r\nSec-WebSocket-Version: 13\r\n"
        "Expect: 100-Continue\r\nContent-Length: 4\r\n"
        "If-Modified-Since: now\r\n\r\nbody";
    begin("request: every field is where it belongs");
    int size = request_parse(text, sizeof text - 1, &r);
    expect(size == (int)sizeof text - 5, "size %d", size);
    expect(!strcmp(r.method, "POST") && !strcmp(r.path, "/send"), "the line");
    expect(r.line.size == 33 && r.line.at == text, "line %zu", r.line.size);
    expect(r.channel.size == 3 && !memcmp(r.channel.at, "a b", 3), "channel");
    expect(!strcmp(r.header[HOST], "h:80"), "Host");
    expect(!strcmp(r.header[ORIGIN], "http://h:80"), "Origin");
    expect(!strcmp(r.header[WS_KEY], "a b"), "key '%s'", r.header[WS_KEY]);
    expect(!strcmp(r.header[WS_VERSION], "13"), "version");
    expect(!strcmp(r.header[SINCE], "now"), "If-Modified-Since");
    expect(r.upgrade && r.websocket && r.expects && r.keep_alive && !r.old,
           "flags");
    expect(r.length == 4 && !memcmp(r.body, "body", 4), "body");
    finish();

    static const struct {
        const char *target, *host;
    } forms[] = {{"/", "h"}, {"http://a", "a"}, {"http://a/b", "a"},
                 {"HTTP://a.b:81?q", "a.b:81"}, {"http://[::1]/", "[::1]"}};
    for (size_t i = 0; i < COUNT(forms); i++) {
        char text_form[100];
        begin("request: the host of %s is %s", forms[i].target, forms[i].host);
        int n = snprintf(text_form, sizeof text_form, "GET %s HTTP/1.1\r\n" H
                         "\r\n", forms[i].target);
        expect(parse_prefix(text_form, (size_t)n, &r) == n, "not parsed");
        expect(!strcmp(r.header[HOST], forms[i].host), "%s", r.header[HOST]);
        finish();
    }

    static const struct {
        const char *version, *header;
        bool keep;
    } cases[] = {
        {"1.1", "X: y", true}, {"1.1", "Connection: close", false},
        {"1.1", "Connection: a,CLOSE", false}, {"1.0", "X: y", false},
        {"1.0", "Connection: Keep-Alive", true},
        {"1.0", "Connection: keep-alive, close", false},
        {"1.1", "Connection: closed", true},
        {"1.1", "Connection: close\r\nConnection: keep-alive", false},
        {"1.1", "Connection: keep-alive\r\nConnection: close", false},
        {"1.0", "Connection: close, keep-alive", false},
        {"1.1", "Connection: not close", true},
        {"1.2", "X: y", true}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        char line[100];
        struct buffer name = {0};
        buffer_json(&name, text_of(cases[i].header));
        begin("request: HTTP/%s with %.*s is %s", cases[i].version,
              (int)name.size, name.bytes,
              cases[i].keep ? "kept alive" : "the last");
        buffer_clear(&name);
        int n = snprintf(line, sizeof line, "GET / HTTP/%s\r\nHost: h\r\n"
                         "%s\r\n\r\n", cases[i].version, cases[i].header);
        expect(parse_prefix(line, (size_t)n, &r) == n, "not parsed");
        expect(r.keep_alive == cases[i].keep, "not so");
        finish();
    }
}

/* Headers of 8 KiB in all are taken, one byte more is not. */
static void test_request_limit(void) {
    static struct request r;
    static const char line[] = "GET / HTTP/1.1\r\n" H "X: ";
    for (size_t size = HEADER_MAX - 1; size <= HEADER_MAX + 1; size++) {
        char *text = malloc(size);
        memset(text, 'x', size);
        memcpy(text, line, sizeof line - 1);
        memcpy(text + size - 4, "\r\n\r\n", 4);
        begin("request: line and headers of %zu bytes", size);
        int got = request_parse(text, size, &r);
        expect(got == (size > HEADER_MAX ? -431 : (int)size), "%d", got);
        got = parse_prefix(text, size - 1, &r);
        expect(got == (size > HEADER_MAX ? -431 : 0), "cut: %d", got);
        finish();
        free(text);
    }
    for (size_t size = HEADER_MAX - 1; size <= HEADER_MAX + 1; size++) {
        char *text = malloc(size);
        memset(text, 'x', size);
        memcpy(text, "GET /", 5);
        begin("request: %zu bytes without the line's end", size);
        int got = request_parse(text, size, &r);
        expect(got == (size < HEADER_MAX ? 0 : -414), "%d", got);
        finish();
        free(text);
    }
    begin("request: a channel's name has 64 bytes at most");
    for (int size = 63; size <= 66; size++) {
        char text[200], name[80];
        memset(name, 'n', sizeof name);
        int n = snprintf(text, sizeof text, "GET /?channel=%.*s%s HTTP/1.1\r\n"
                         H "\r\n", size - 1, name, "%6e");
        int got = parse_prefix(text, (size_t)n, &r);
        expect(got == (size > 64 ? -400 : n), "%d bytes: %d", size, got);
    }
    finish();
}

/* ---- Frames ------------------------------------------------------------- */

#define MASK 0x80
#define KEY 1, 2, 3, 4

static void test_frames(void) {
    static const struct {
        const char *name;
        uint8_t bytes[15], size;
        int want;
        uint64_t payload;
    } cases[] = {
        {"text", {0x81, MASK | 5, KEY}, 6, 6, 5},
        {"empty binary", {0x82, MASK, KEY}, 6, 6, 0},
        {"first fragment", {0x01, MASK | 125, KEY}, 6, 6, 125},
        {"continuation", {0x00, MASK | 1, KEY}, 6, 6, 1},
        {"126 bytes", {0x81, MASK | 126, 0, 126, KEY}, 8, 8, 126},
        {"65535 bytes", {0x81, MASK | 126, 255, 255, KEY}, 8, 8, 65535},
        {"65536 bytes", {0x81, MASK | 127, 0, 0, 0, 0, 0, 1, 0, 0, KEY}, 14,
         14, 65536},
        {"2^63 - 1 bytes", {0x82, MASK | 127, 127, 255, 255, 255, 255, 255,
                            255, 255, KEY}, 14, 14, INT64_MAX},
        {"close", {0x88, MASK | 2, KEY}, 6, 6, 2},
        {"ping of 125", {0x89, MASK | 125, KEY}, 6, 6, 125},
        {"pong", {0x8A, MASK, KEY}, 6, 6, 0},
        {"2^63 bytes", {0x82, MASK | 127, 128, 0, 0, 0, 0, 0, 0, 0, KEY}, 14,
         -1002, 0},
        {"126: 125 is shorter", {0x81, MASK | 126, 0, 125, KEY}, 8, -1002, 0},
        {"127: 65535 is shorter", {0x81, MASK | 127, 0, 0, 0, 0, 0, 0, 255,
                                   255, KEY}, 14, -1002, 0},
        {"no mask", {0x81, 5}, 2, -1002, 0},
        {"RSV1", {0xC1, MASK}, 2, -1002, 0},
        {"RSV2", {0xA1, MASK}, 2, -1002, 0},
        {"RSV3", {0x91, MASK}, 2, -1002, 0},
        {"opcode 3", {0x83, MASK}, 2, -1002, 0},
        {"opcode 7", {0x87, MASK}, 2, -1002, 0},
        {"opcode 11", {0x8B, MASK}, 2, -1002, 0},
        {"opcode 15", {0x8F, MASK}, 2, -1002, 0},
        {"a ping in fragments", {0x09, MASK}, 2, -1002, 0},
        {"a close in fragments", {0x08, MASK}, 2, -1002, 0},
        {"a ping of 126", {0x89, MASK | 126}, 2, -1002, 0},
        {"a close of 127", {0x88, MASK | 127}, 2, -1002, 0}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct frame f;
        begin("frame_parse: %s", cases[i].name);
        for (uint8_t n = 0; n <= cases[i].size; n++) {
            uint8_t *copy = copy_of(cases[i].bytes, n);
            int got = frame_parse(copy, n, &f);
            int want = n < cases[i].size ? 0 : cases[i].want;
            expect(got == want, "of %u bytes it says %d", n, got);
            free(copy);
        }
        if (cases[i].want > 0) {
            expect(f.size == cases[i].payload, "a payload of %llu",
                   (unsigned long long)f.size);
            expect(!memcmp(f.mask, (uint8_t[]){KEY}, 4), "another mask");
            expect(f.fin == cases[i].bytes[0] >> 7, "FIN");
            expect(f.opcode == (cases[i].bytes[0] & 15), "opcode");
        }
        finish();
    }
}

static void test_frame_header(void) {
    static const struct {
        size_t size, header;
    } cases[] = {{0, 2}, {125, 2}, {126, 4}, {65535, 4}, {65536, 10},
                 {MESSAGE_MAX, 10}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        uint8_t *out = malloc(cases[i].header);
        struct text payload;
        begin("frame_header of %zu bytes, and frame_read", cases[i].size);
        expect(frame_header(out, TEXT, cases[i].size) == cases[i].header,
               "its size");
        expect(out[0] == 0x81 && out[1] < 128, "it starts %02x %02x", out[0],
               out[1]);
        expect(frame_read(out, &payload) == cases[i].header + cases[i].size,
               "frame_read's size");
        expect(payload.size == cases[i].size &&
               payload.at == (char *)out + cases[i].header, "payload");
        free(out);
        finish();
    }
}

static void test_unmask(void) {
    begin("unmask: every size to 70, moved down by every distance to 20");
    for (size_t size = 0; size <= 70; size++)
        for (size_t shift = 0; shift <= 20; shift++) {
            uint8_t *bytes = malloc(size + shift + 1), want[70];
            uint8_t mask[4] = {0x12, 0x34, 0x56, 0x78}, turned[4];
            for (size_t i = 0; i < size; i++) {
                bytes[shift + i] = (uint8_t)chance(256);
                want[i] = bytes[shift + i] ^ mask[i % 4];
            }
            for (size_t i = 0; i < 4; i++) turned[i] = mask[(size + i) % 4];
            unmask(bytes, bytes + shift, size, mask);
            expect(!memcmp(bytes, want, size), "%zu, %zu", size, shift);
            expect(!memcmp(mask, turned, 4), "the mask after %zu", size);
            free(bytes);
        }
    finish();
    begin("unmask: in pieces the same as at once");
    for (int round = 0; round < 500; round++) {
        uint8_t bytes[200], want[200], mask[4] = {9, 8, 7, 6};
        for (size_t i = 0; i < sizeof bytes; i++) {
            bytes[i] = (uint8_t)chance(256);
            want[i] = bytes[i] ^ mask[i % 4];
        }
        for (size_t at = 0, n; at < sizeof bytes; at += n) {
            n = chance(30);
            if (n > sizeof bytes - at) n = sizeof bytes - at;
            unmask(bytes + at, bytes + at, n, mask);
        }
        expect(!memcmp(bytes, want, sizeof want), "round %d", round);
    }
    finish();
}

static void test_close_codes(void) {
    static const struct {
        int code, want;
    } cases[] = {{0, 1002}, {999, 1002}, {1000, 1000}, {1001, 1001},
        {1002, 1002}, {1003, 1003}, {1004, 1002}, {1005, 1002}, {1006, 1002},
        {1007, 1007}, {1008, 1008}, {1009, 1009}, {1010, 1010}, {1011, 1011},
        {1012, 1012}, {1014, 1014}, {1015, 1002}, {1016, 1002}, {2999, 1002},
        {3000, 3000}, {4999, 4999}, {5000, 1002}, {65535, 1002}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        uint8_t *bytes = malloc(2);
        put_number(bytes, (uint64_t)cases[i].code, 2);
        begin("close_code %d", cases[i].code);
        expect(close_code(bytes, 2) == cases[i].want, "%d",
               close_code(bytes, 2));
        free(bytes);
        finish();
    }
    begin("close_code: every code by itself");
    for (int code = 0; code < 65536; code++) {
        uint8_t bytes[2] = {(uint8_t)(code >> 8), (uint8_t)code};
        bool good = code / 1000 == 3 || code / 1000 == 4 ||
                    (code >= 1000 && code <= 1003) ||
                    (code >= 1007 && code <= 1014);
        expect(close_code(bytes, 2) == (good ? code : 1002), "%d", code);
    }
    finish();
    begin("close_code: none, half of one, with a reason, with a bad one");
    expect(close_code((uint8_t *)"", 0) == 1005, "none");
    expect(close_code((uint8_t *)"\x03", 1) == 1002, "half");
    expect(close_code((uint8_t *)"\x03\xE8\xC3\xA4", 4) == 1000, "reason");
    expect(close_code((uint8_t *)"\x03\xE8\xC3", 3) == 1007, "cut reason");
    expect(close_code((uint8_t *)"\x03\xE8\xFF", 3) == 1007, "bad reason");
    finish();
}

static void test_keys(void) {
    static const struct {
        const char *key;
        bool want;
    } cases[] = {{"dGhlIHNhbXBsZSBub25jZQ==", true}, {"", false},
        {"AAAAAAAAAAAAAAAAAAAA++/=", false}, {"AAAAAAAAAAAAAAAAAAAA+/==", true},
        {"AAAAAAAAAAAAAAAAAAAAA===", false}, {"AAAAAAAAAAAAAAAAAAAAAA=", false},
        {"AAAAAAAAAAAAAAAAAAAAAA===", false}, {"AAAAAAAAAAAAAAAAAAAAAA", false},
        {"AAAAAAAAAAAAAAAAAAA-AA==", false}, {NULL, false}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        begin("key_valid %s", cases[i].key ? cases[i].key : "(not there)");
        expect(key_valid(cases[i].key) == cases[i].want, "wrong");
        finish();
    }
}

/* ---- The log and its channels ------------------------------------------- */

static void test_log(void) {
    struct log l = {0};
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    begin("log: its size is whole pages, its memory there twice");
    expect(log_open(&l, page + 1) && l.size == 2 * page, "size %zu", l.size);
    l.ring[0] = 'a';
    l.ring[2 * l.size - 1] = 'z';
    expect(l.ring[l.size] == 'a' && l.ring[l.size - 1] == 'z', "not twice");
    finish();

    begin("log: a record over the ring's end is one piece");
    l.tail = l.head = 5 * l.size - 3;
    log_append(&l, "0123456789", 10);
    expect(l.head == 5 * l.size + 7, "head");
    expect(!memcmp(log_at(&l, 5 * l.size - 3), "0123456789", 10), "bytes");
    expect(!memcmp(log_at(&l, 5 * l.size), "3456789", 7), "its second part");
    log_close(&l);
    finish();

    begin("log: none where there is no memory for it");
    expect(!log_open(&l, (size_t)1 << 60), "2^60 bytes?");
    finish();
}

static void server_start(struct server *s) {
    *s = (struct server){.max_message = KIB, .history = 4 * KIB, .dir = -1,
                         .home = -1, .page = -1, .max_clients = 64,
                         .clients_size = 256, .now = 1,
                         .listener = -1, .signals = -1, .bus.fd = -1};
    s->waiting_end = &s->waiting;
    s->option['q'] = "";
    s->epoll = must(epoll_create1(EPOLL_CLOEXEC), "epoll_create1");
    s->clients = calloc(s->clients_size, sizeof *s->clients);
    s->input = calloc(1, sizeof *s->input + READ_SIZE);
    if (!s->clients || !s->input) fail("test", "out of memory");
    s->input->capacity = READ_SIZE;
}

static void server_end(struct server *s) {
    server_close(s);
    expect(s->connections == 0 && s->counters[CHANNELS] == 0, "some are left");
    close(s->epoll);
}

/* A client in a channel, and the far end of its connection. */
static struct client *client_make(struct server *s, struct channel *ch,
                                  uint64_t offset, int *far) {
    int pair[2], size = 1;
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK, 0, pair), "pair");
    setsockopt(pair[0], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    client_add(s, pair[0], NULL);
    struct client *c = s->clients[pair[0]];
    c->websocket = true;
    s->counters[CLIENTS]++;
    channel_join(s, ch, c, offset);
    *far = pair[1];
    return c;
}

static bool say(struct server *s, struct channel *ch, size_t size) {
    static char bytes[2 * KIB];
    struct text message = {bytes, size};
    return server_post(s, ch, BINARY, message);
}

static size_t read_all(int fd) {
    char bytes[8 * KIB];
    size_t size = 0;
    for (ssize_t n = 1; n > 0;) {
        n = recv(fd, bytes, sizeof bytes, MSG_DONTWAIT);
        size += n > 0 ? (size_t)n : 0;
    }
    return size;
}

static void test_history(void) {
    struct server s;
    struct text payload;
    uint64_t offset;
    server_start(&s);
    begin("history_find: the last N, or all there are");
    struct channel *ch = channel_get(&s, (struct text){"h", 1});
    expect(history_find(&ch->log, 9, &offset) == 0 && offset == 0, "empty");
    for (size_t i = 0; i < 5; i++) say(&s, ch, i);
    expect(history_find(&ch->log, 0, &offset) == 0 && offset == ch->log.head,
           "none wanted");
    expect(history_find(&ch->log, 2, &offset) == 2, "two wanted");
    frame_read(log_at(&ch->log, offset), &payload);
    expect(payload.size == 3, "the first of two has %zu", payload.size);
    expect(history_find(&ch->log, 9, &offset) == 5 && offset == 0, "nine");
    expect(history_find(&ch->log, INT64_MAX, &offset) == 5, "very many");
    for (size_t i = 0; i < 40; i++) say(&s, ch, 500 + i);
    expect(history_find(&ch->log, 99, &offset) == 7, "of a full log");
    expect(offset == ch->log.tail, "from its tail");
    frame_read(log_at(&ch->log, offset), &payload);
    expect(payload.size == 533, "its first has %zu", payload.size);
    server_end(&s);
    finish();
}

static void test_channels(void) {
    struct server s;
    char name[20];
    int far;
    server_start(&s);
    begin("channel_get: the one not used for longest makes room");
    struct text first = {"0", 1}, second = {"1", 1};
    for (int i = 0; i < CHANNELS_MAX; i++) {
        int n = snprintf(name, sizeof name, "%d", i);
        expect(channel_get(&s, (struct text){name, (size_t)n}), "at %d", i);
    }
    expect(channel_find(&s, first) == s.channels, "used: in front");
    struct channel *ch = channel_find(&s, second);
    client_make(&s, ch, 0, &far);
    channel_find(&s, first);
    for (int i = 0; i < 2 * CHANNELS_MAX; i++) {
        int n = snprintf(name, sizeof name, "new %d", i);
        channel_find(&s, first);
        expect(channel_get(&s, (struct text){name, (size_t)n}), "new %d", i);
    }
    expect(s.counters[CHANNELS] == CHANNELS_MAX, "their number");
    expect(channel_find(&s, first) != NULL, "the one used last is gone");
    expect(channel_find(&s, second) == ch, "one with a client is gone");
    expect(!channel_find(&s, (struct text){"2", 1}), "an old one is there");
    expect(!channel_find(&s, (struct text){"", 0}), "no name, none made");
    server_end(&s);
    close(far);
    finish();
}

static void test_readers(void) {
    struct server s;
    int far, slow_far;
    server_start(&s);
    begin("channel_room: the log waits a second for a slow reader");
    struct channel *ch = channel_get(&s, (struct text){"", 0});
    struct client *quick = client_make(&s, ch, 0, &far);
    struct client *slow = client_make(&s, ch, 0, &slow_far);
    int count = 0;
    for (; count < 1000 && say(&s, ch, 996); count++) {
        channel_flush(&s, ch);
        read_all(far);
        client_event(&s, quick, EPOLLOUT);
        read_all(far);
    }
    expect(count >= 4 && count < 30, "%d messages", count);
    expect(slow->blocked && !slow->dead && !quick->dead, "cut off at once");
    uint64_t head = ch->log.head;
    s.now += SLOW_TIME - 1;
    expect(!say(&s, ch, 996) && !slow->dead, "cut off too soon");
    expect(ch->log.head == head, "something was appended");
    s.now += 1;
    expect(say(&s, ch, 996) && slow->dead && !quick->dead, "not cut off");
    expect(s.counters[SLOW_CLIENTS] == 1, "not counted");
    server_reap(&s);
    expect(ch->client_count == 1, "%zu clients", ch->client_count);
    server_end(&s);
    finish();
    close(far);
    close(slow_far);

    server_start(&s);
    begin("channel_room: without patience slow readers go at once");
    ch = channel_get(&s, (struct text){"", 0});
    slow = client_make(&s, ch, 0, &far);
    for (int i = 0; i < 1000 && say(&s, ch, 996); i++) channel_flush(&s, ch);
    expect(!slow->dead && channel_room(&s, ch, 996, 0), "no room");
    expect(slow->dead && s.counters[SLOW_CLIENTS] == 1, "not cut off");
    server_end(&s);
    finish();
    close(far);

    server_start(&s);
    begin("channel_room: a whole log for one who comes with the history");
    ch = channel_get(&s, (struct text){"", 0});
    for (int i = 0; i < 9; i++) say(&s, ch, 996);
    s.now += 10 * SECOND;
    slow = client_make(&s, ch, ch->log.tail, &far);
    for (int i = 0; i < 1000 && say(&s, ch, 996); i++) channel_flush(&s, ch);
    expect(!slow->dead, "cut off at once");
    s.now += SLOW_TIME;
    expect(say(&s, ch, 996) && slow->dead, "the log waits on");
    server_end(&s);
    finish();
    close(far);
}

static void test_delivery(void) {
    struct server s;
    int far;
    char got[100];
    struct text message = {"hello", 5};
    server_start(&s);
    begin("clients: all that is new goes out in one piece, in order");
    struct channel *ch = channel_get(&s, (struct text){"", 0});
    server_post(&s, ch, TEXT, message);
    struct client *c = client_make(&s, ch, ch->log.head, &far);
    server_post(&s, ch, TEXT, message);
    server_post(&s, ch, BINARY, (struct text){"\0\1", 2});
    channel_flush(&s, ch);
    ssize_t n = recv(far, got, sizeof got, 0);
    expect(n == 11 && !memcmp(got, "\x81\5hello\x82\2\0\1", 11), "%zd", n);
    websocket_send(c, PONG, (struct text){"x", 1});
    server_post(&s, ch, TEXT, message);
    websocket_close(&s, c, 1001);
    client_flush(&s, c);
    n = recv(far, got, sizeof got, 0);
    if (n < 14) n += recv(far, got + n, sizeof got - (size_t)n, 0);
    expect(n == 14 && !memcmp(got, "\x8A\1x\x81\5hello\x88\2\x03\xE9", 14),
           "%zd at the end", n);
    expect(c->shut && !c->channel && recv(far, got, 1, 0) == 0, "not shut");
    expect(s.counters[BYTES_OUT] == 25, "bytes counted");
    server_end(&s);
    close(far);
    finish();
}

/* ---- The bus: datagrams and streams ------------------------------------- */

static void test_records(void) {
    static const struct {
        struct record r;
        size_t want;
    } cases[] = {
        {{1, 1, 0, TEXT, 0}, 24}, {{1, 1, 5, BINARY, 3}, 32},
        {{1, 1, MESSAGE_MAX, TEXT, 64}, 24 + 64 + MESSAGE_MAX},
        {{1, 1, MESSAGE_MAX + 1, TEXT, 0}, 0}, {{1, 1, 0, TEXT, 65}, 0},
        {{1, 1, 0, 0, 0}, 0}, {{1, 1, 0, CLOSE, 0}, 0},
        {{1, 1, 0, 0x101, 0}, 0}, {{1, 1, UINT32_MAX, TEXT, UINT16_MAX}, 0}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        const struct record *r = &cases[i].r;
        char *copy = copy_of(r, sizeof *r);
        begin("record_size: opcode %d, %u bytes, name of %d", r->opcode,
              r->size, r->name_size);
        expect(record_size(copy) == cases[i].want, "%zu", record_size(copy));
        free(copy);
        finish();
    }
}

static void test_datagrams(void) {
    static const struct {
        const char *name;
        uint32_t kind;
        uint64_t sender, offset, tail, head;
        size_t size; /* after the header */
        bool want;
    } cases[] = {
        {"a byte", DATA, 1, 0, 0, 1, 1, true},
        {"a whole block", DATA, 1, BLOCK, 0, 9 * BLOCK, BLOCK, true},
        {"a block's last byte", DATA, 1, BLOCK - 1, 0, 9999, 1, true},
        {"up to the head", DATA, 1, 90, 50, 100, 10, true},
        {"before the tail", DATA, 1, 10, 50, 100, 10, true},
        {"over a block's border", DATA, 1, BLOCK - 1, 0, 9999, 2, false},
        {"beyond the head", DATA, 1, 90, 50, 100, 11, false},
        {"from beyond the head", DATA, 1, 200, 50, 100, 1, false},
        {"from the end of all numbers", DATA, 1, UINT64_MAX, 0, 100, 1, false},
        {"no bytes", DATA, 1, 0, 0, 100, 0, false},
        {"tail after head", DATA, 1, 0, 101, 100, 1, false},
        {"head of 2^63", DATA, 1, 0, 0, (uint64_t)1 << 63, 1, false},
        {"STATUS, nobody known", STATUS, 1, 1, 0, 0, 0, true},
        {"STATUS, all known", STATUS, 1, 7, 0, 9, PEERS_MAX * 64, true},
        {"LEAVE", LEAVE, 1, 7, 0, 9, 64, true},
        {"STATUS with half an entry", STATUS, 1, 7, 0, 9, 96, false},
        {"STATUS with one byte", STATUS, 1, 7, 0, 9, 1, false},
        {"kind 0", 0, 1, 0, 0, 100, 64, false},
        {"kind 4", 4, 1, 0, 0, 100, 64, false}};
    for (size_t i = 0; i < COUNT(cases); i++) {
        struct datagram d = {.kind = cases[i].kind, .sender = cases[i].sender,
                             .offset = cases[i].offset, .tail = cases[i].tail,
                             .head = cases[i].head};
        begin("datagram_valid: %s", cases[i].name);
        size_t size = DATAGRAM_HEADER + cases[i].size;
        struct datagram *copy = copy_of(&d, size);
        expect(datagram_valid(copy, size) == cases[i].want, "wrong");
        for (size_t n = 0; n < DATAGRAM_HEADER; n += 5)
            expect(!datagram_valid(copy, n), "%zu bytes of it", n);
        free(copy);
        finish();
    }
    begin("datagrams: their layout is the one that the table shows");
    expect(DATAGRAM_HEADER == 56 && sizeof(struct entry) == 64 &&
           sizeof(struct record) == 24, "sizes");
    expect(offsetof(struct datagram, kind) == 20 &&
           offsetof(struct datagram, sender) == 24 &&
           offsetof(struct datagram, time) == 32 &&
           offsetof(struct datagram, head) == 48, "offsets");
    finish();
}

/* A sender whose log is filled, and the peer it is to a receiver. */
static struct peer *stream_start(struct server *from, struct server *to,
                                 size_t log) {
    server_start(from);
    server_start(to);
    to->history = 256 * KIB;
    from->history = 4 * KIB;
    from->bus.fd = to->bus.fd = must(open("/dev/null", O_WRONLY), "open");
    to->now = from->now = HELLO_TIME;
    if (!log_open(&from->bus.self.log, log) ||
        !log_open(&to->bus.self.log, log))
        fail("test", "out of memory");
    struct peer *p = bus_peer(to, 7, true);
    p->joined = true;
    return p;
}

static void stream_end(struct server *from, struct server *to) {
    to->bus.fd = must(dup(to->bus.fd), "dup"); /* each closes its own */
    server_end(from);
    server_end(to);
}

/* Gives the receiver [at, at + size) of the stream, cut at block borders. */
static void stream_piece(struct server *from, struct server *to,
                         struct peer *p, uint64_t at, size_t size) {
    struct log *l = &from->bus.self.log;
    while (size > 0) {
        size_t n = BLOCK - at % BLOCK;
        struct datagram d = {.kind = DATA, .sender = 7, .offset = at,
                             .tail = l->tail, .head = l->head};
        if (n > size) n = size;
        memcpy(d.bytes, log_at(l, at), n);
        bus_data_in(to, p, &d, n);
        at += n;
        size -= n;
    }
}

/* Do both servers' channels now hold the same frames? */
static bool logs_same(struct server *a, struct server *b, uint64_t *head) {
    struct channel *x = channel_get(a, (struct text){"c", 1});
    struct channel *y = channel_get(b, (struct text){"c", 1});
    *head = y->log.head;
    return x->log.head == y->log.head && y->log.tail <= x->log.tail &&
           !memcmp(log_at(&x->log, x->log.tail), log_at(&y->log, x->log.tail),
                   x->log.head - x->log.tail);
}

static void test_stream(int way) {
    static const char *const ways[] = {
        "byte by byte", "in random order, some twice",
        "with half of it lost, again and again", "beyond the window first"};
    struct server from, to;
    struct peer *p = stream_start(&from, &to, MIB);
    struct channel *ch = channel_get(&from, (struct text){"c", 1});
    uint64_t head = 0;
    begin("a stream comes %s: the same records come out", ways[way]);
    for (int i = 0; i < 300 || (way == 3 && i < 900); i++)
        expect(say(&from, ch, chance(chance(9) ? 1024 : 60)), "not posted");
    uint64_t end = from.bus.self.log.head;
    for (uint64_t i = 0; way == 0 && i < end; i++) {
        stream_piece(&from, &to, p, i, 1);
        bus_deliver(&to);
    }
    if (way == 3 && end > WINDOW)
        stream_piece(&from, &to, p, WINDOW, end - WINDOW);
    expect(way != 3 || end > WINDOW, "too short");
    for (int i = 0; way > 0 && i < 5000 && p->log.head < end; i++) {
        uint64_t at = p->log.head / BLOCK * BLOCK + chance(40) * BLOCK;
        size_t size = 1 + chance(3 * BLOCK);
        if (way == 2 && chance(2)) at = p->log.head;
        if (at >= end) at = p->log.head;
        if (size > end - at) size = end - at;
        if (way != 2 || chance(2)) stream_piece(&from, &to, p, at, size);
        if (chance(3) == 0) bus_deliver(&to);
    }
    bus_deliver(&to);
    expect(p->log.head == end && p->head == end, "%llu of %llu bytes",
           (unsigned long long)p->log.head, (unsigned long long)end);
    expect(logs_same(&from, &to, &head), "not the same, %llu",
           (unsigned long long)head);
    expect(to.counters[BUS_ERRORS] == 0 && to.counters[BUS_LOST] == 0,
           "errors");
    stream_end(&from, &to);
    finish();
}

static void test_window(void) {
    struct server from, to;
    struct peer *p = stream_start(&from, &to, 2 * MIB);
    struct channel *ch = channel_get(&from, (struct text){"c", 1});
    begin("a stream's window: what lies beyond, or before, is not taken");
    while (from.bus.self.log.head < 2 * WINDOW && say(&from, ch, 1000)) {}
    stream_piece(&from, &to, p, WINDOW, BLOCK); /* where block 0 is kept */
    expect(p->filled[0] == 0, "one block too far was taken");
    stream_piece(&from, &to, p, WINDOW - BLOCK, BLOCK);
    expect(p->filled[WINDOW_BLOCKS - 1] == BLOCK, "the last one was not");
    stream_piece(&from, &to, p, 1, BLOCK - 1);
    expect(p->filled[0] == 0, "a piece behind a gap was taken");
    stream_piece(&from, &to, p, 0, WINDOW - BLOCK);
    bus_deliver(&to);
    expect(p->log.head == WINDOW, "%llu", (unsigned long long)p->log.head);
    stream_piece(&from, &to, p, 0, WINDOW); /* again: it has all of that */
    bus_deliver(&to);
    expect(p->log.head == WINDOW && p->filled[3] == 0, "taken twice");
    stream_end(&from, &to);
    finish();

    p = stream_start(&from, &to, 2 * MIB);
    ch = channel_get(&from, (struct text){"c", 1});
    begin("a stream without sense is skipped, up to its head, and counted");
    memset(log_at(&from.bus.self.log, 0), 0xFF, 100);
    from.bus.self.log.head = 100;
    stream_piece(&from, &to, p, 0, 100);
    bus_deliver(&to);
    expect(p->log.head == 100 && to.counters[BUS_ERRORS] == 1, "not so");
    for (int i = 0; i < 3; i++) say(&from, ch, 10);
    stream_piece(&from, &to, p, 100, from.bus.self.log.head - 100);
    bus_deliver(&to);
    expect(to.channels && to.channels->log.head == 36, "what came after it");
    stream_end(&from, &to);
    finish();
}

static void test_hostile(void) {
    struct server from, to;
    struct peer *p = stream_start(&from, &to, 64 * KIB);
    struct channel *ch;
    begin("bus: a STATUS with an echo from the end of all numbers");
    struct datagram d = {.kind = STATUS, .sender = 9, .time = 1};
    d.known[0] = (struct entry){.echo = (uint64_t)1 << 63};
    to.bus.self.id = d.known[0].id = 5;
    hmac_key(&to.bus.key, "", 0);
    hmac_sign(&to.bus.key, &d.kind, DATAGRAM_HEADER + sizeof *d.known -
              SHA1_SIZE, d.mac);
    bus_datagram_in(&to, &d, DATAGRAM_HEADER + sizeof *d.known);
    expect(bus_peer(&to, 9, false) && !bus_peer(&to, 9, false)->joined,
           "taken for one that is there");
    finish();

    begin("bus: bytes that were consumed cannot be changed any more");
    p = bus_peer(&to, 8, true);
    p->joined = true;
    ch = channel_get(&from, (struct text){"c", 1});
    say(&from, ch, BLOCK - 35); /* the next begins 10 before a border */
    say(&from, ch, 500);
    for (int i = 0; i < 20; i++) say(&from, ch, KIB);
    stream_piece(&from, &to, p, 0, BLOCK + 30);
    bus_deliver(&to);
    expect(p->log.head == BLOCK + 30, "not consumed");
    uint8_t *size = log_at(&from.bus.self.log, BLOCK);
    memset(size, 0xFF, 20);
    stream_piece(&from, &to, p, BLOCK, 40);
    expect(*log_at(&p->log, BLOCK) != 0xFF, "they were");
    stream_end(&from, &to);
    finish();

    p = stream_start(&from, &to, 64 * KIB);
    begin("bus: a record of the end of all times holds nothing up");
    ch = channel_get(&from, (struct text){"c", 1});
    say(&from, ch, 10);
    say(&from, ch, 10);
    memset(log_at(&from.bus.self.log, offsetof(struct record, time)), 0xFF, 8);
    stream_piece(&from, &to, p, 0, from.bus.self.log.head);
    bus_deliver(&to);
    expect(p->log.head == from.bus.self.log.head, "it is stuck at %llu",
           (unsigned long long)p->log.head);
    stream_end(&from, &to);
    finish();
}

/* ---- The bus in virtual time -------------------------------------------- */

#define NODES 3
#define PACKETS 4096

static struct {
    struct server node[NODES];
    int64_t start[NODES]; /* when it began; its clock counts from there */
    bool up[NODES], cut[NODES], frozen[NODES];
    int64_t now;
    uint32_t loss, twice, late; /* percent */
    struct packet {
        int to; /* -1: free */
        int64_t due;
        size_t size;
        struct datagram d;
    } packets[PACKETS];
    size_t sent;
    uint64_t said[NODES];                /* messages posted */
    uint64_t heard[NODES][NODES];        /* by the first, of the second's */
    uint64_t cursor[NODES];              /* up to there its log is checked */
    uint64_t wrong;
} net;

static void packet_put(int to, const void *bytes, size_t size) {
    if (chance(100) < net.loss) return;
    for (int i = 0; i < PACKETS; i++) {
        struct packet *p = &net.packets[i];
        if (p->to >= 0) continue;
        bool late = chance(100) < net.late;
        *p = (struct packet){.to = to, .size = size,
                             .due = net.now + (late ? 5 + chance(20) : 1)};
        memcpy(&p->d, bytes, size);
        return;
    } /* no place: lost */
}

/* The program's sendto(): its bus sends once for all others. */
static ssize_t network_send(int fd, const void *bytes, size_t size, int flags,
                            const struct sockaddr *to, socklen_t to_size) {
    (void)flags, (void)to, (void)to_size;
    for (int i = 0; i < NODES; i++)
        if (net.up[i] && net.node[i].bus.fd == fd && net.cut[i])
            return (ssize_t)size;
    net.sent++;
    for (int i = 0; i < NODES; i++) {
        if (!net.up[i] || net.cut[i] || net.node[i].bus.fd == fd) continue;
        packet_put(i, bytes, size);
        if (chance(100) < net.twice) packet_put(i, bytes, size);
    }
    return (ssize_t)size;
}

static void node_start(int i) {
    struct server *s = &net.node[i];
    server_start(s);
    s->now = 0;
    s->max_message = 64 * KIB;
    s->history = 4 * MIB;
    s->bus.fd = must(open("/dev/null", O_WRONLY), "open");
    s->bus.self.id = 100 + chance(1 << 20);
    s->bus.to_count = 1;
    s->bus.beat_gap = BEAT_FIRST;
    s->bus.catch_up_end = CATCH_UP_TIME;
    hmac_key(&s->bus.key, "", 0);
    if (!log_open(&s->bus.self.log, MIB)) fail("test", "out of memory");
    net.start[i] = net.now;
    net.cursor[i] = 0;
    net.up[i] = true;
}

static void node_stop(int i) {
    net.up[i] = false;
    for (int j = 0; j < PACKETS; j++)
        if (net.packets[j].to == i) net.packets[j].to = -1;
    server_end(&net.node[i]);
}

static void network_start(uint32_t loss, uint32_t twice, uint32_t late) {
    memset(&net, 0, sizeof net);
    net.now = 1000000;
    net.loss = loss;
    net.twice = twice;
    net.late = late;
    for (int i = 0; i < PACKETS; i++) net.packets[i].to = -1;
    srandom(1);
    for (int i = 0; i < NODES; i++) node_start(i);
}

static void network_end(void) {
    for (int i = 0; i < NODES; i++)
        if (net.up[i]) node_stop(i);
}

/* Node i says the next of its numbered messages. */
static bool node_say(int i, size_t size) {
    static char bytes[64 * KIB];
    struct server *s = &net.node[i];
    if (size < 24) size = 24;
    memset(bytes, '.', size);
    snprintf(bytes, 24, "%d %llu", i, (unsigned long long)net.said[i] + 1);
    struct channel *ch = channel_get(s, (struct text){"net", 3});
    bool said = server_post(s, ch, BINARY, (struct text){bytes, size});
    net.said[i] += said;
    return said;
}

/* Reads what is new in a node's channel: each sender's numbers must follow
 * one another. */
static void node_listen(int i) {
    struct channel *ch = channel_find(&net.node[i], (struct text){"net", 3});
    struct text payload;
    while (ch && net.cursor[i] < ch->log.head) {
        net.cursor[i] += frame_read(log_at(&ch->log, net.cursor[i]), &payload);
        int sender = atoi(payload.at);
        uint64_t number = strtoull(payload.at + 2, NULL, 10);
        net.wrong += number != net.heard[i][sender] + 1;
        net.heard[i][sender] = number;
    }
}

/* A millisecond passes. */
static void network_step(void) {
    net.now++;
    for (int i = 0; i < PACKETS; i++) {
        struct packet *p = &net.packets[i];
        if (p->to < 0 || p->due > net.now || net.frozen[p->to]) continue;
        struct server *s = &net.node[p->to];
        s->now = net.now - net.start[p->to];
        if (!net.cut[p->to]) bus_datagram_in(s, &p->d, p->size);
        p->to = -1;
    }
    for (int i = 0; i < NODES; i++) {
        struct server *s = &net.node[i];
        if (!net.up[i] || net.frozen[i]) continue;
        s->now = net.now - net.start[i];
        bus_deliver(s);
        bus_flush(s);
        bus_tick(s);
        node_listen(i);
    }
}

/* Has everybody who is up heard everything? */
static bool network_done(void) {
    for (int i = 0; i < NODES; i++)
        for (int j = 0; j < NODES; j++)
            if (net.up[i] && net.heard[i][j] != net.said[j]) return false;
    return net.wrong == 0;
}

/* Lets time pass until all is heard. Returns how long it took. */
static int64_t network_settle(int64_t most) {
    int64_t begun = net.now;
    while (!network_done() && net.now < begun + most) network_step();
    return net.now - begun;
}

static void expect_all_heard(void) {
    for (int i = 0; i < NODES; i++)
        for (int j = 0; j < NODES; j++)
            expect(!net.up[i] || net.heard[i][j] == net.said[j],
                   "%d heard %llu of the %llu that %d said", i,
                   (unsigned long long)net.heard[i][j],
                   (unsigned long long)net.said[j], j);
    expect(net.wrong == 0, "%llu out of order", (unsigned long long)net.wrong);
    for (int i = 0; i < NODES; i++)
        expect(!net.up[i] || net.node[i].counters[BUS_LOST] == 0, "lost");
}

static void network_talk(int steps, uint32_t gap, size_t most) {
    for (int t = 0; t < steps; t++) {
        for (int i = 0; i < NODES; i++)
            if (net.up[i] && !net.frozen[i] && chance(gap) == 0)
                node_say(i, chance((uint32_t)most));
        network_step();
    }
}

static void test_network(uint32_t loss, uint32_t twice, uint32_t late) {
    begin("three instances, %u %% lost, %u %% twice, %u %% late: all is heard "
          "in order", loss, twice, late);
    network_start(loss, twice, late);
    network_talk(500, 50, 100);
    for (int i = 0; i < NODES; i++) node_say(i, 60 * KIB);
    network_talk(2500, 10, 100);
    int64_t took = network_settle(30 * SECOND);
    expect_all_heard();
    expect(net.said[0] > 200 && net.said[1] > 200, "too little was said");
    expect(took < 3 * SECOND, "after %lld ms", (long long)took);
    double each = (double)net.sent / (double)(net.said[0] + net.said[1] +
                                              net.said[2]);
    expect(each < 2.9, "%.1f datagrams a message", each);
    network_end();
    finish();
}

static void test_idle(void) {
    begin("an idle bus sends two datagrams a second at most");
    network_start(0, 0, 0);
    network_talk(1000, 50, 100);
    network_settle(10 * SECOND);
    for (int i = 0; i < 3000; i++) network_step();
    size_t sent = net.sent;
    for (int i = 0; i < 20 * SECOND; i++) network_step();
    expect(net.sent - sent <= 2 * 20 * NODES, "%zu in 20 s", net.sent - sent);
    expect(net.sent - sent >= 19 * NODES, "only %zu", net.sent - sent);
    network_end();
    finish();
}

static void test_late_joiner(void) {
    begin("who comes late has the history within 2 s, in order of time");
    network_start(10, 0, 0);
    node_stop(2);
    for (int i = 0; i < 40; i++) {
        int who = i % 2;
        for (int j = 0; j < 5000; j++)
            if (net.heard[who][1 - who] < net.said[1 - who]) network_step();
        node_say(who, 50); /* an answer to what it has heard */
        network_step();
    }
    network_settle(5 * SECOND);
    node_start(2);
    int64_t took = network_settle(5 * SECOND);
    expect_all_heard();
    expect(took < 2 * SECOND, "%lld ms", (long long)took);
    struct channel *ch = channel_find(&net.node[2], (struct text){"net", 3});
    struct text payload;
    uint64_t at = 0;
    for (int i = 0; ch && i < 40 && at < ch->log.head; i++) {
        at += frame_read(log_at(&ch->log, at), &payload);
        expect(*payload.at == '0' + i % 2, "message %d is %.8s", i, payload.at);
    }
    network_end();
    finish();
}

static void test_absence(void) {
    begin("one frozen for 3 s makes up everything");
    network_start(5, 0, 0);
    network_talk(500, 20, 100);
    net.frozen[2] = true;
    network_talk(3000, 20, 100);
    net.frozen[2] = false;
    network_talk(300, 20, 100);
    network_settle(10 * SECOND);
    expect_all_heard();
    network_end();
    finish();

    begin("one cut off for 8 s makes up everything, on both sides");
    network_start(5, 0, 0);
    network_talk(500, 20, 100);
    net.cut[2] = true;
    network_talk(8000, 20, 100);
    expect(net.heard[0][1] + 20 > net.said[1], "it held the others up");
    net.cut[2] = false;
    network_settle(10 * SECOND);
    expect_all_heard();
    network_end();
    finish();

    begin("after a cut that outlasts the log: what is lost is counted");
    network_start(0, 0, 0);
    network_talk(500, 20, 100);
    network_settle(5 * SECOND);
    uint64_t known = net.heard[2][0];
    net.cut[2] = true;
    network_talk(6000, 100, 100); /* it is dead for them by now */
    for (int i = 0; i < 400; i++) {
        node_say(0, 8 * KIB);
        network_step();
    }
    net.cut[2] = false;
    for (int i = 0; i < 4000; i++) network_step();
    uint64_t lost = net.node[2].counters[BUS_LOST], held = 0;
    struct channel *ch = channel_find(&net.node[2], (struct text){"net", 3});
    struct text payload;
    for (uint64_t at = ch->log.tail; at < ch->log.head;) {
        at += frame_read(log_at(&ch->log, at), &payload);
        held += *payload.at == '0' && strtoull(payload.at + 2, NULL, 10) > known;
    }
    expect(lost > 0 && net.heard[2][0] == net.said[0], "lost %llu, at %llu",
           (unsigned long long)lost, (unsigned long long)net.heard[2][0]);
    expect(known + lost + held == net.said[0], "%llu + %llu + %llu of %llu",
           (unsigned long long)known, (unsigned long long)lost,
           (unsigned long long)held, (unsigned long long)net.said[0]);
    net.wrong = 0;
    for (int i = 0; i < NODES; i++) node_say(i, 30);
    network_settle(2 * SECOND);
    expect(net.heard[2][0] == net.said[0] && !net.wrong, "what came after");
    network_end();
    finish();
}

/* The senders post as fast as they may: none loses a byte, and what one may
 * say is bounded by what the others have taken. */
static void test_flat_out(void) {
    begin("flat out at 10 %% loss: the senders wait, nothing is lost");
    network_start(10, 0, 10);
    uint64_t refused = 0;
    for (int t = 0; t < 2000; t++) {
        for (int i = 0; i < 2; i++)
            for (int j = 0; j < 20; j++) refused += !node_say(i, 1000);
        network_step();
        for (int i = 0; i < 2; i++)
            for (struct peer *p = net.node[i].bus.self.next; p; p = p->next)
                expect(p->acked >= net.node[i].bus.self.log.tail || !p->alive,
                       "overwritten before it was heard");
    }
    expect(refused > 0, "nobody had to wait");
    expect(net.said[0] > 3000, "only %llu", (unsigned long long)net.said[0]);
    network_settle(20 * SECOND);
    expect_all_heard();
    network_end();
    finish();
}

int main(void) {
    setvbuf(stdout, NULL, _IOLBF, 0);
    alarm(60); /* whatever hangs */
    test_numbers();
    test_percent();
    test_query();
    test_lists();
    test_buffers();
    test_utf8();
    test_sha1();
    test_hmac();
    test_base64();
    test_hosts();
    test_dates();
    test_requests();
    test_request_fields();
    test_request_limit();
    test_frames();
    test_frame_header();
    test_unmask();
    test_close_codes();
    test_keys();
    test_log();
    test_history();
    test_channels();
    test_readers();
    test_delivery();
    test_records();
    test_datagrams();
    for (int way = 0; way < 4; way++) test_stream(way);
    test_window();
    test_hostile();
    test_network(0, 0, 0);
    test_network(30, 0, 0);
    test_network(10, 10, 20);
    test_idle();
    test_late_joiner();
    test_absence();
    test_flat_out();
    return test.failed > 0;
}
