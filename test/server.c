/* SPDX-License-Identifier: MIT
 *
 * server.c: the real program as a black box, in parts that run side by side
 * (main, at the end, has the list):
 *
 *     make build/server && CHAT=./chat build/server [PART...]
 *
 * What needs other limits takes $BUILD/chat-short, whose times are a fifth, or
 * $BUILD/chat-large: the Makefile has what they are.
 */
#include "harness.h"
#include <glob.h>

#define START(program) "exec ./" program " -p 0 -b none "

/* ---- http -------------------------------------------------------------- */

/* Requests that have to get the same answer. In them "\n" stands for CRLF,
 * "\b" for a bare LF, "\1" for NUL, "\a" for `tag`, and "\2", a number and a
 * character for as many of it as make the request so long. */
struct group {
    int status;
    const char *want; /* a line each: "Name: value", "Name", "!Name" for a
                       * field that is not there, "=BODY", "~REGEX" in it */
    const char *before, *after; /* what all of them begin and end with */
    const char *const *requests;
};

static char tag[200];
static size_t expanded(const char *in, char *out) {
    char *at = out, *rest;
    for (; *in; in++) {
        if (*in == '\2') {
            long size = strtol(in + 1, &rest, 10);
            while (at < out + size) *at++ = *rest;
            in = rest;
        } else if (*in == '\n') at = stpcpy(at, "\r\n");
        else if (*in == '\a') at = stpcpy(at, tag);
        else *at++ = *in == '\b' ? '\n' : *in == '\1' ? '\0' : *in;
    }
    return (size_t)(at - out);
}

static void expect_wanted(const struct response *r, const char *want) {
    char copy[1000], *rest = copy;
    snprintf(copy, sizeof copy, "%s", want ? want : "");
    for (char *line; (line = strsep(&rest, "\n")) && *line;) {
        if (*line == '=') expect_body(r, line + 1);
        else if (*line == '!')
            expect(!header(r, line + 1), "%s is there", line + 1);
        else if (*line == '~')
            expect(r->body && matches(r->body, line + 1), "body without %s: %s",
                   line + 1, shown(r->body, r->length));
        else {
            const char *name = strsep(&line, ":"), *value = header(r, name);
            expect(value && (!line || !strcmp(value, line + 1)),
                   "%s: %s, expected%s", name, value ? value : "(none)",
                   line ? line : " any");
        }
    }
}

/* Sends a request, byte by byte if there is a clock, and reads the answer (with
 * a body, behind 100) and the end. An error says in a line what is wrong. */
static struct response exchange(int port, struct peer *clock, const char *bytes,
                                size_t n) {
    struct peer *p = peer_open(port);
    bool head = !strncmp(bytes, "HEAD ", 5);
    if (clock) send_chopped(p, clock, bytes, n);
    else peer_send(p, bytes, n);
    struct response r = read_response(p, head);
    if (r.status == 100 && bytes[n - 1] != '\n') r = read_response(p, head);
    char *date = strcasestr(r.head, "\r\nDate: ");
    if (date) memset(date + 8, '-', strcspn(date + 8, "\r"));
    if (r.status > 101) expect_end(p);
    if (r.status >= 400 && !head) {
        expect_wanted(&r, "Content-Type: text/plain; charset=utf-8");
        expect(r.length > 3 && r.length < 200, "the body of an error: %s",
               shown(r.body, r.length));
    }
    expect(!r.body || !memmem(r.body, r.length, "SECRET", 6), "a secret");
    peer_close(p);
    return r;
}

/* Runs a table: each request in one piece, if it is short byte by byte, and if
 * it is an ordinary GET also as HEAD, which gives the same without a body. */
static void run_groups(const char *options, const struct group *g, size_t n) {
    struct server s = server_start(START("chat") "%s", options);
    struct peer *clock = ws_open(s.port, "/?channel=clock");
    for (const struct group *end = g + n; g < end; g++)
        for (const char *const *text = g->requests; *text; text++) {
            char request[1000], space[140000], *bytes = space + 1;
            struct response r;
            sprintf(request, "%s%s%s", g->before, *text, g->after);
            n = expanded(request, bytes);
            begin("%d: %s%s", g->status, shown(g->before, strlen(g->before)),
                  shown(*text, strlen(*text)));
            for (int k = 0; k < (n < 1000 ? 2 : 1); k++) {
                r = exchange(s.port, k ? clock : NULL, bytes, n);
                expect(r.status == g->status, "status %d%s", r.status,
                       k ? ", byte by byte" : "");
                expect_wanted(&r, g->want);
            }
            if (!strncmp(bytes, "GET /", 5) && n < 1000 &&
                (r.status == 200 || r.status == 404)) {
                struct response head =
                    exchange(s.port, NULL, memcpy(space, "HEAD", 4), n + 1);
                expect(!strcmp(r.head, head.head), "%s but for HEAD %s", r.head,
                       head.head);
            }
            finish();
        }
    peer_close(clock);
    begin("a clean end of chat %s", options);
    finish_stop(&s);
}

/* clang-format off */
#define LIST(...) (const char *const[]){ __VA_ARGS__, NULL }
#define HOST    " HTTP/1.1\nHost: a\n"
#define PLAIN   "Content-Type: text/plain; charset=utf-8"
#define HTML    "Content-Type: text/html; charset=utf-8"
#define GETS    "Allow: GET, HEAD"
#define ASK     "GET ", HOST "\n"
#define U       "Upgrade: websocket\n"
#define C       "Connection: Upgrade\n"
#define K       "Sec-WebSocket-Key: " WS_KEY "\n"
#define V       "Sec-WebSocket-Version: 13\n"
#define NAME64  "0123456789abcdef0123456789abcdef" \
                "0123456789abcdef0123456789abcdef"

/* A page may talk to us whose Origin is the Host, the scheme's own port left
 * out or written, or which is listed: then it may read the answers, too. */
#define JOIN     "GET /?channel=o HTTP/1.1\nOrigin: ", "\n" U C K V "\n"
#define SEND     "GET /send?message=x HTTP/1.1\nOrigin: ", "\n\n"
#define MESSAGES "GET /messages HTTP/1.1\nOrigin: ", "\n\n"
#define MAY_READ "Access-Control-Allow-Origin"
#define OWN LIST("http://a\nHost: a", "http://a:80\nHost: a", \
    "https://a\nHost: a:443", "https://a:443\nHost: a", "http://b\nHost:b:80", \
    "http://a.b:8080\nHost: A.b:8080", "https://A.b:81\nHost: a.b:81", \
    "https://[::1]\nHost: [::1]:443", "http://a.\nHost: a.")
#define STRANGE LIST("http://a:443\nHost: a", "https://a:80\nHost: a", \
    "http://a\nHost: a:443", "https://a\nHost: a:80", "http://a\nHost: a:81", \
    "http://b\nHost: a", "http://a:81\nHost: a:8", "http://a:8\nHost: a:81", \
    "http://a.evil.example\nHost: a", "http://evila.b\nHost: a.b", \
    "http://a@evil.example\nHost: a", "http://evil.example/a\nHost: a", \
    "http://evil.example://a\nHost: a", "http://a/\nHost: a", "a\nHost: a", \
    "http://a, http://b\nHost: a", "http://b http://a\nHost: a", "*\nHost: a", \
    "null\nHost: a", "\nHost: a", "\nHost:")

static const struct group http_groups[] = {
    /* resources */
    { 200, HTML "\nContent-Security-Policy\n~<input", ASK, LIST("/",
      "/?channel=earth&utm=x", "http://localhost:8080/", "HTTP://A/",
      "http://[::1]:80/", "http://a/?b") },
    { 404, PLAIN "\n~^not found\n!X-Injected", ASK, LIST("/nothing",
      "/send/?message=x", "/SEND?message=x", "/%2573end?message=x",
      "/send%3Fmessage=x", "/se+nd", "/%0d%0aX-Injected:%20y", "/\0028000x") },
    { 200, "=message sent", ASK, LIST("/%73end?message=encoded",
      "/send?message=a&channel=" NAME64) },
    { 200, "Content-Type: application/json\n=[]", ASK, LIST(
      "/messages?channel=nobody", "http://b:1/messages?channel=nobody") },
    /* methods */
    { 405, GETS, "", HOST "\n", LIST("PUT /", "DELETE /messages", "POST /",
      "get /", "GETX /", "OPTIONS /", "POST /messages", "TRACE /", "X /x") },
    { 405, "Allow: GET, HEAD, POST", "", " /send" HOST "\n", LIST("PUT",
      "OPTIONS", "head", "PATCH") },
    /* one request a connection, whatever it asks for and what follows */
    { 200, HTML, "GET / HTTP/1.", "\n\n", LIST("0", "0\nConnection: keep-alive",
      "1\nHost: a\nConnection: keep-alive", "1\nHost: a\n\nGET / HTTP/1.1") },
    { 200, "=message sent", "POST /send" HOST "Content-Length: ", "",
      LIST("1\n\nxyz", "1\n\nxGET / HTTP/1.1\n\n", "\t 3 \t\n\nabc") },
    /* what clients and proxies send besides */
    { 200, HTML, "GET /" HOST, "\n\n", LIST("X: a\tb", "X:", "X:y", "X: \t ",
      "X: \303\251\200\377", "X:: y:z", "!#$%&'*+-.^_`|~aZ09: x", "Connection:",
      "X: 1\nX: 2\nx: 3", "X-Transfer-Encoding: chunked", "Content_Length: 3",
      "Sec-Fetch-Site: cross-site", "Origin: http://evil.example",
      "Upgrade: h2c\nConnection: Upgrade, HTTP2-Settings\nHTTP2-Settings: A",
      "Range: bytes=0-1", "Expect: 100-continue", "Content-Length: 0") },
    /* Host */
    { 200, HTML, "GET / HTTP/1.1\n", "\n\n", LIST("Host:", "HOST: a:80",
      "Host: \t [2001:db8::1]:8080 \t", "Host: a\n" "X-Host: b") },
    { 400, NULL, "", "\n\n", LIST("GET / HTTP/1.1", "HEAD / HTTP/1.1", "GET /"
      HOST "Host: a", "GET /" HOST "host: b", "GET / HTTP/1.1\nX-Host: a",
      "GET / HTTP/1.0\nHost: a\nHost: a") },
    { 400, NULL, "GET / HTTP/1.1\nHost: ", "\n\n", LIST("a b", "a/b", "a, b",
      "b@a", "a?", "a#b", "http://a/", "a\001", "\xC3\xA4", "a\"") },
    /* the request line */
    { 400, NULL, "", "\nHost: a\n\n", LIST("GET /", "GET", "/ HTTP/1.1",
      "GET  / HTTP/1.1", " GET / HTTP/1.1", "GET / HTTP/1.1 ", "SSH-2.0-x",
      "GET\t/ HTTP/1.1", "GET /a b HTTP/1.1", "GET /a\tb HTTP/1.1",
      "GET messages HTTP/1.1", "GET %2F HTTP/1.1", "GET ftp://a/ HTTP/1.1",
      "GET / HTTP/1.", "GET / HTTP/1.10", "GET / HTTP/2.0", "GET / http/1.1",
      "GET: / HTTP/1.1", "G\303\211T / HTTP/1.1") },
    /* paths and parameters */
    { 400, NULL, ASK, LIST("/%00", "/%+1", "/%0x41", "/%", "/%2",
      "/send%00?message=x", "/messages?channel=%fe",
      "/messages?channel=x" NAME64) },
    { 400, NULL, "GET /send?message=", HOST "\n", LIST("%zz", "%e", "a%00b",
      "a%ff", "%ed%a0%80", "%c0%af", "%e2%82", "x&channel=%00", "x&channel=%g0",
      "a&channel=x" NAME64) },
    { 400, "=?message not provided", "GET /send", HOST "\n", LIST("", "?",
      "?messages=x&amessage=y", "?a=b;message=x", "?m%2565ssage=x") },
    { 400, NULL, "", "", LIST("HEAD /send" HOST "\n", "POST /send" HOST
      "Content-Length: 2\n\na\377") },
    /* header fields */
    { 400, NULL, "GET /" HOST, "\n\n", LIST("X : y", "X\t: y", "X Y: z",
      "Rubbish", ": y", " X: y", "X: y\n z", "X: y\n\tz", "X: y\n ", "Host : b",
      "X\303\251: z", "X(y): z", "X/Y: z", "\"X\": z", "\177X: z", "X: a\rb",
      "X: a\rTransfer-Encoding: x", "X: a\r", "Transfer-Encoding : x",
      "Transfer Encoding: x", "Origin: a\nOrigin: b") },
    /* the length of the body, which must be read in one way only */
    { 400, NULL, "POST /send" HOST "Content-Length", "\n\nabcd", LIST(" : 3",
      ":", ": +3", ": -1", ": 0x3", ": 3a", ": 3, 3", ": 1\n 0",
      ": 18446744073709551619", ": 999999999999999999999999999999",
      ": 3\nContent-Length: 3", ": 3\ncontent-length: 4") },
    { 411, "~Content-Length", "POST /send HTTP/1.", "\n\nabc", LIST(
      "1\nHost: a\nTransfer-Encoding: x\nContent-Length: 3",
      "1\nHost: a\nContent-Length: 3\nTransfer-Encoding: chunked",
      "1\nHost: a\nTransfer-Encoding: identity\nExpect: 100-continue",
      "1\nHost: a\nTransfer-Encoding:", "0\nTransfer-Encoding: chunked") },
    { 413, NULL, "POST /send" HOST "Content-Length: ", "\n\n", LIST(
      "64001", "64001\nExpect: 100-continue", "4294967299") },
    { 100, NULL, "POST /send" HOST "Content-Length: 1\n", "\n\n", LIST(
      "Expect: 100-continue", "expect: 100-Continue") },
    { 200, "=message sent", "POST /send" HOST "Content-Length: 4\n", "body",
      LIST("Expect: 100-continue\n\n") }, /* 100 Continue comes once */
    /* what is sent comes out (twice, as each request is made twice) */
    { 200, "=message sent", "GET /send?channel=s&", HOST "\n", LIST("message=1",
      "message=", "message=%2541%25", "message=a+b%2Bc", "message=%26%3d%23",
      "message=a=b==", "message=a?b/", "a=b&&c&message=2&d=", "m%65ssage=3",
      "message=%c3%A9\303\251", "message=%f0%9f%98%80", "message=4&message=5")
      },
    { 200, "=[\"1\",\"1\",\"\",\"\",\"%41%\",\"%41%\",\"a b+c\",\"a b+c\","
      "\"&=#\",\"&=#\",\"a=b==\",\"a=b==\",\"a?b/\",\"a?b/\",\"2\",\"2\",\"3\","
      "\"3\",\"\303\251\303\251\",\"\303\251\303\251\",\"\360\237\230\200\","
      "\"\360\237\230\200\",\"4\",\"4\"]", ASK, LIST("/messages?channel=s") },
    { 200, "=message sent", "POST /send?channel=p" HOST "Content-Length: ", "",
      LIST("8\n\na+b%41&=", "9\n\nmessage=x" /* curl -d */) },
    { 200, "=[\"a+b%41&=\",\"a+b%41&=\",\"message=x\",\"message=x\"]", ASK,
      LIST("/messages?channel=p") },
    { 200, "=message sent", "POST /send?channel=j" HOST "Content-Length: ", "",
      LIST("6\n\nq\"b\\/<", "4\n\n\t\033\1x") },
    { 200, "Content-Type: application/json"
      "\n~^\\[(\"q(\\\\\"|\\\\u0022)b\\\\(\\\\|u005c)/(<|\\\\u003c)\",){2}"
      "\"\\\\(t|u0009)\\\\u001[bB]\\\\u0000x\",.*]$", ASK,
      LIST("/messages?channel=j") },
    { 200, "=message sent", "POST /send?channel=big" HOST, "",
      LIST("Content-Length: 64000\n\n\00264067x") },
    { 200, "Content-Length: 64004", ASK, LIST("/messages?channel=big") },
    /* the size of a header */
    { 200, HTML, "GET /" HOST, "\n\n", LIST("X: \0028188x") },
    { 431, NULL, "GET /", "\n\n", LIST(HOST "X: \0028189x", HOST "\0029000x:",
      "\0029000x" HOST, "?\0029000x" HOST, HOST "X: \002130000x") },
    { 431, NULL, "HEAD /", "\n\n", LIST(HOST "X: \0029000x") },
    /* what can never become a request, before it has come to its end */
    { 400, NULL, "", "", LIST("GET / HTTP/1.1\b", "GET / HTTP/1.1\bHost: a\b\b",
      "GET /\1", "\026\003\1", "GET / HTTP/1.1\nHost: b\n\b",
      "GET / HTTP/1.1\nX: a\bTransfer-Encoding: x", "GET / HTTP/1.1\nX: a\1b",
      "GET / HTTP/1.1\b\rHost: a", "GET / HTTP/1.1\nX\1: b") },
    /* /send from another site, as an image or a form would ask */
    { 403, NULL, "", "\n\nx", LIST("GET /send?message=x" HOST
      "Sec-Fetch-Site: cross-site", "POST /send" HOST "Content-Length: 1\n"
      "Sec-Fetch-Site: cross-site", "POST /send" HOST "Content-Length: 1\n"
      "Origin: http://evil.example", "GET /send?message=x HTTP/1.0\n"
      "Origin: http://localhost") },
    { 200, "=message sent", "GET /send?message=x" HOST "Sec-Fetch-Site: ",
      "\n\n", LIST("same-origin", "none" /* in the address bar */) },
    { 400, NULL, ASK, LIST("/?\002126&") }, /* no room left for the Origin */
    { 101, NULL, JOIN, OWN }, { 200, "=message sent", SEND, OWN },
    { 403, "!" MAY_READ, JOIN, STRANGE }, { 403, "!" MAY_READ, SEND, STRANGE },
    { 200, "!" MAY_READ, MESSAGES, STRANGE },
};

#define LISTED "-o https://one.example --origin http://two.example:81 " \
    "-o https://three.example:443 -o http://four.example:80 " \
    "-o HTTPS://Five.Example -o capacitor://localhost -o null"
#define LISTED_ONES LIST("https://one.example\nHost: a", "null\nHost: a", \
    "http://two.example:81\nHost: a", "https://three.example\nHost: a", \
    "http://four.example\nHost: a", "https://five.example\nHost: a", \
    "capacitor://localhost\nHost: a")
static const struct group listed_groups[] = {
    { 101, NULL, JOIN, LISTED_ONES }, { 200, MAY_READ, SEND, LISTED_ONES },
    { 200, MAY_READ, MESSAGES, LISTED_ONES },
    { 200, MAY_READ ": http://two.example:81", MESSAGES,
      LIST("http://two.example:81\nHost: two.example:81") },
    { 200, "=message sent", SEND, LIST("http://a\nHost: a") },
    { 403, "!" MAY_READ, SEND, LIST("http://one.example\nHost: a",
      "http://two.example\nHost: a", "https://one.example.org\nHost: a",
      "https://a.one.example\nHost: a") },
};
static const struct group any_groups[] = {
    { 101, NULL, JOIN, STRANGE }, { 200, MAY_READ, SEND, LISTED_ONES },
};
/* clang-format on */

static void http_part(void) {
    run_groups("", http_groups, COUNT(http_groups));
    run_groups(LISTED, listed_groups, COUNT(listed_groups));
    run_groups("-o '*'", any_groups, COUNT(any_groups));
}

/* ---- files ------------------------------------------------------------- */

/* clang-format off */
/* The files, by the shell: put TEXT FILE..., and for links NAME=TARGET. */
static const char tree[] =
    "set -e; mkdir -p outside release1 release2 www; cd www; mkfifo fifo\n"
    "mkdir -p .git .well-known dirhome/index.html home linkhome odd outhome"
    " sub/deep v1.2 'a?b#c\"d<e' 'cr\r\nX-Injected: y'\n"
    "put() { text=$1; shift; for f; do printf %s \"$text\" >\"$f\"; done; }\n"
    "put SECRET ../secret ../outside/secret .hidden ..odd .git/config sub/.x"
    " .well-known/.x .well-knownx odd/.x; put text v1.2/README; put '' none\n"
    "put odd a+%41.txt 'b\\s.txt' .well-known/a; put 'of b' sub/b.txt\n"
    "put '<p>home' index.html; put '<p>in' home/index.html; put 'of a' a.txt\n"
    "put one ../release1/a.txt; put two ../release2/a.txt; put file send\n"
    "put 0123456789 ten; truncate -s 5999999997 huge; printf end >>huge\n"
    "for end in '' .html .css .min.css .js .mjs .PNG .txt .svg .jpg .jpeg .wasm"
    " .json .mp4 .webmanifest .tar.gz . .png. .pn; do put x FILE$end; done\n"
    "for l in inside=a.txt sub/up=../a.txt twice=inside insidedir=sub"
    " out=../secret outdir=../outside etc=/etc hop=outdir/secret updir=.."
    " back=../www/a.txt root=/proc/self/root loop=loop dangling=nowhere"
    " linkhome/index.html=../home/index.html outhome/index.html=../../secret"
    " ../current=release1 ../next=release2; do ln -s ${l#*=} ${l%=*}; done\n";

/* Names that a listing has to escape, in HTML and in the link. */
static const char *const odd_names[] = {
    "<b>markup<i>", "a&amp;\"b'c", "100%41", "a b+c", "q?x#y", "javascript:x",
    "\303\251t\303\251", "\377\376odd", "tab\there", "new\nline", "back\\slash",
    "&lt;", "c:d;e=f", "~tilde", "*star*", "-v",
};

/* Of files by this name with the ending that is asked for. */
#define UTF8 "; charset=utf-8"
#define TYPE(type, ...) \
    { 200, "Content-Type: " type, "GET /FILE", HOST "\n", LIST(__VA_ARGS__) }
/* Of /ten, whose ETag is `tag`; and of /huge, which is 6 GB. */
#define TEN        "GET /ten" HOST
#define ALL_OF_IT  200, "=0123456789\n!Content-Range\nContent-Length: 10"
#define PART(what, ...) { 206, "Content-Range: bytes " what "\nETag", \
    TEN "Range: bytes=", "\n\n", LIST(__VA_ARGS__) }
static const struct group file_groups[] = {
    { 200, PLAIN "\nContent-Length: 4\n=of a\nETag", ASK, LIST("/a.txt",
      "/a.txt?v=1", "/%61%2etxt", "/inside", "/twice", "/sub/up",
      "http://b/a.txt") },
    { 200, "=of b", ASK, LIST("/sub/b.txt", "/insidedir/b.txt") },
    { 200, HTML "\n=<p>home", ASK, LIST("/", "/index.html") },
    { 200, HTML "\n=<p>in", ASK, LIST("/home/", "/linkhome/") },
    { 200, HTML "\n~b.txt", ASK, LIST("/sub/", "/insidedir/") },
    { 200, "=odd", ASK, LIST("/a+%2541.txt", "/b%5cs.txt", "/.well-known/a") },
    { 200, PLAIN "\n=text", ASK, LIST("/v1.2/README") },
    { 200, "=message sent", ASK, LIST("/send?message=x") },
    { 200, "Content-Length: 0\n=", ASK, LIST("/none") },
    { 405, GETS, "", HOST "\n", LIST("POST /a.txt", "DELETE /a.txt") },
    { 301, "Location: ./sub/", "", HOST "\n", LIST("GET /sub", "HEAD /sub",
      "GET //sub") },
    { 301, "Location: ./home/?a=b&c", ASK, LIST("/home?a=b&c") },
    { 301, "!X-Injected", ASK, LIST("/cr%0d%0aX-Injected:%20y") },
    { 301, "Location: ./a%3Fb%23c%22d%3Ce/", ASK, LIST("/a%3fb%23c%22d%3ce") },
    { 200, HTML, ASK, LIST("/outhome/", "/dirhome/") },
    { 404, "!Location", ASK, LIST("/b.txt", "/A.TXT", "/a.txt/", "/a.txt/x",
      "/a.txt%20", "/a.txt.", "/%5csub", "/.hidden", "/%2ehidden", "/..odd",
      "/.git", "/.git/", "/.git/config", "/%2egit/config", "/sub/.x", "/send/",
      "/sub//.x", "/sub%2F%2Ex", "/insidedir/.x", "/.well-known/.x", "/sub/.",
      "/.well-knownx", "/.well-known/../.hidden", "/.", "/./a.txt", "/..",
      "/sub/..", "/sub/../a.txt", "/../secret", "/sub/../../secret", "/out",
      "/../../../../../../etc/passwd", "/%2e%2e/secret", "/..%2fsecret",
      "/%252e%252e/secret", "/..\\secret", "/....//secret", "//../secret",
      "/a.txt/../../secret", "/insidedir/../../secret", "//etc/passwd",
      "/%2fetc%2fpasswd", "/outdir", "/outdir/", "/outdir/secret", "/hop",
      "/etc/passwd", "/back", "/updir/", "/updir/secret", "/root/etc/passwd",
      "/loop", "/dangling", "/fifo", "/fifo/", "/\0025000x") },
    TYPE("text/html" UTF8, ".html"), TYPE("text/css" UTF8, ".css", ".min.css"),
    TYPE("text/javascript" UTF8, ".js", ".mjs"), TYPE("image/png", ".PNG"),
    TYPE("text/plain" UTF8, "", ".txt"), TYPE("image/svg+xml", ".svg"),
    TYPE("image/jpeg", ".jpg", ".jpeg"), TYPE("application/wasm", ".wasm"),
    TYPE("application/json", ".json"), TYPE("video/mp4", ".mp4"),
    TYPE("application/manifest+json", ".webmanifest"),
    TYPE("application/octet-stream", ".tar.gz", ".", ".png.", ".pn"),
    { 304, "ETag", TEN "If-None-Match: ", "\n\n", LIST("\a", "W/\a", "*",
      "\"x\", \a", "\"x\",W/\a , \"y\"", "\a\nRange: bytes=0-1") },
    { 304, "ETag", "", "If-None-Match: \a\n\n", LIST("HEAD /ten" HOST,
      "GET /ten HTTP/1.0\n") },
    { ALL_OF_IT, TEN "If-None-Match: ", "\n\n", LIST("\"x\"", "x\a", "", "x") },
    { 200, "=of a", "GET /a.txt" HOST, "\n\n", LIST("If-None-Match: \a") },
    { ALL_OF_IT, TEN "Range: ", "\n\n", LIST("bytes=3-2", "bytes=0-1,3-4",
      "bytes=-", "bytes=1-x", "bytes=+1-2", "bytes=--1", "bytes=", "lines=0-1",
      "0-1", "bytes=9999999999999999999-", "bytes=2-3\nIf-Range: \"x\"",
      "bytes=2-3\nIf-Range: W/\a") },
    PART("0-9/10\n=0123456789", "0-", "-99"), PART("0-1/10\n=01", "0-1"),
    PART("5-9/10\n=56789", "5-", "-5"), PART("8-9/10\n=89", "8-99", "08-09"),
    PART("2-3/10\n=23", "2-3\nIf-Range: \a"),
    { 206, "Content-Range: bytes 0-1/10\n=01\nETag", TEN, "\n\n",
      LIST("RANGE: bytes=0-1 ") },
    { 200, "Content-Length: 10\n!Content-Range", "HEAD /ten" HOST "Range: ",
      "\n\n", LIST("bytes=0-1", "bytes=10-") },
    { 416, "Content-Range: bytes */10", TEN "Range: bytes=", "\n\n", LIST("10-",
      "99-100", "999999999999999999-", "-0") },
    { 416, "Content-Range: bytes */0", "GET /none" HOST "Range: bytes=", "\n\n",
      LIST("0-") },
    { 206, "Content-Range: bytes 5999999997-5999999999/6000000000\n=end",
      "GET /huge" HOST, "\n\n", LIST("Range: bytes=-3") },
    { 200, "Content-Length: 6000000000\nAccept-Ranges: bytes", "HEAD /huge",
      HOST "\n", LIST("") },
};
/* clang-format on */

static void make_file(const char *name, const void *bytes, size_t n) {
    FILE *file = fopen(name, "wb");
    if (!file || fwrite(bytes, 1, n, file) != n || fclose(file)) perror(name);
}

/* The ETag of a target goes into `tag`: is it another than before? */
static bool new_tag(int port, const char *target) {
    struct response r = http_get(port, target);
    const char *value = header(&r, "ETag");
    bool changed = value && strcmp(value, tag) != 0;
    expect(value && *value == '"', "%s: no ETag", target);
    snprintf(tag, sizeof tag, "%s", value ? value : "");
    return changed;
}

/* Another size, another file in its place, another time, be it older. */
static void versions_test(int port) {
    static const struct timespec times[] = {{0, 7}, {1, 0}, {-9, 0}};
    begin("a file's ETag changes when the file does");
    for (int i = 0; i < 4; i++) {
        make_file(i == 2 ? "www/w" : "www/v", "four", i == 0 ? 3 : 4);
        if (i == 2) rename("www/w", "www/v");
        utimensat(AT_FDCWD, "www/v", times + i / 3, 0);
        expect(new_tag(port, "/v"), "not with change %d", i);
        expect(!new_tag(port, "/v"), "without a change");
    }
    new_tag(port, "/ten");
    finish();
}

static void listing_test(int port) {
    char target[500] = "www/odd/", *link = target + 8, *text, *at;
    size_t seen = 0;
    for (size_t i = 0; i < COUNT(odd_names); i++) {
        strcpy(link, odd_names[i]);
        make_file(target, link, strlen(link));
    }
    begin("a listing: odd names are escaped, each link leads to its file");
    struct response r = http_get(port, "/odd/");
    at = text = strdup(r.body ? r.body : "");
    expect(!strstr(text, "<b>") && !strstr(text, ".x"), "%s", text);
    for (; *at; at++)
        expect(*at == '\n' || (unsigned char)*at >= ' ', "a raw %d", *at);
    for (at = text; (at = strstr(at, "href=\""));) {
        at += 6;
        snprintf(link, 400, "%.*s", (int)strcspn(at, "\""), at);
        expect(link[strcspn(link, ":/")] != ':', "a scheme: %s", link);
        expect(!strpbrk(link, " <>\\^`{|}?#&"), "not encoded: %s", link);
        if (!strncmp(link, "..", 2)) continue;
        if (!strncmp(link, "./", 2)) memmove(link, link + 2, strlen(link) - 1);
        r = http_get(port, target + 3);
        for (size_t i = 0; i < COUNT(odd_names) && r.status == 200; i++)
            seen += !strcmp(r.body, odd_names[i]);
    }
    expect(seen == COUNT(odd_names), "%zu links lead to a file", seen);
    free(text);
    finish();
}

static void big_files_test(const struct server *s) {
    static char bytes[8 << 20];
    struct peer *p[3];
    size_t n = 0;
    double before = server_memory(s);
    for (uint32_t i = 0, x = 1; i < sizeof bytes; i++)
        bytes[i] = (char)((x = x * 1664525 + 1013904223) >> 24);
    make_file("www/big", bytes, sizeof bytes);
    for (int i = 0; i < 3; i++) {
        p[i] = peer_open(s->port);
        dprintf(p[i]->fd, "GET /%s HTTP/1.1\r\nHost: a\r\n\r\n",
                i ? "big" : "huge");
        peer_more(p[i], deadline());
    }
    begin("big files: constant memory, a closed half, one that shrinks");
    for (; n < 100 << 20 && peer_more(*p, deadline()); p[0]->start = p[0]->end)
        n += p[0]->end - p[0]->start;
    expect(!p[0]->ended, "the huge one ended after %zu bytes", n);
    expect_memory(s, before, 4);
    shutdown(p[1]->fd, SHUT_WR);
    struct response r = read_response(p[1], false);
    expect(r.length == sizeof bytes && !memcmp(r.body, bytes, r.length),
           "not what the file has");
    expect_end(p[1]);
    expect(!truncate("www/big", 1000), "truncate");
    expect(peer_drain(p[2]) < sizeof bytes, "more than there was");
    for (int i = 0; i < 3; i++) peer_close(p[i]);
    finish();
}

static void leaks_test(const struct server *s) {
    static const char *const targets[] = {"/huge", "/", "/odd/", "/odd", "/x"};
    double memory = 0;
    char path[40];
    glob_t before, after;
    sprintf(path, "/proc/%d/fd/*", (int)s->pid);
    glob(path, 0, NULL, &before);
    begin("8,000 requests leave neither memory nor a descriptor");
    for (int i = 0; i < 10000; i++) {
        if (i < 2000 && server_memory(s) > memory) memory = server_memory(s);
        struct peer *p = peer_open(s->port);
        dprintf(p->fd, "GET %s HTTP/1.1\r\nHost: a\r\n\r\n", targets[i % 5]);
        if (i % 5) peer_drain(p);
        else peer_more(p, deadline());
        shutdown(p->fd, SHUT_WR); /* then a reset is an EPIPE */
        peer_close(p);
    }
    expect_memory(s, memory, 0.2);
    glob(path, 0, NULL, &after);
    expect(after.gl_pathc < before.gl_pathc + 9, "%zu descriptors, not %zu",
           after.gl_pathc, before.gl_pathc);
    globfree(&before);
    globfree(&after);
}

static void expect_file(int port, const char *target, const char *text) {
    struct response r = http_get(port, target);
    expect_wanted(&r, text);
}

static void files_part(void) {
    if (system(tree)) perror("tree");
    struct server s = server_start(START("chat") "-d www");
    versions_test(s.port);
    listing_test(s.port);
    big_files_test(&s);
    leaks_test(&s);
    finish_stop(&s);
    run_groups("-d www", file_groups, COUNT(file_groups));
    s = server_start(START("chat") "-d current/");
    begin("DIR is a link that is repointed, removed and built anew");
    expect_file(s.port, "/a.txt", "=one");
    rename("next", "current");
    expect_file(s.port, "/a.txt", "=two");
    rename("release2", "gone");
    expect_status(s.port, "/a.txt", 404);
    expect_status(s.port, "/", 404);
    mkdir("release2", 0755);
    make_file("release2/index.html", "three", 5);
    expect_file(s.port, "/", "=three");
    rename("release2/index.html", "release2/b.txt");
    expect_file(s.port, "/", HTML "\n~b.txt");
    finish_stop(&s);
}

/* ---- websocket --------------------------------------------------------- */

/* clang-format off */
#define ACCEPT 101, "Sec-WebSocket-Accept: " WS_ACCEPT
static const struct group open_groups[] = {
    { ACCEPT "\n" U C "!Content-Length\n!Sec-WebSocket-Extensions\n"
      "!Sec-WebSocket-Protocol\n!Transfer-Encoding", "GET /" HOST, "\n", LIST(
      U C K V, U "Connection: keep-alive, Upgrade\n" K V,
      U "Connection: ,, x\t,\tupgrade ,\n" K V, U C "Connection: close\n" K V,
      U "Connection: keep-alive\n" C K V, "Upgrade: h2c, websocket\n" C K V,
      "Upgrade: h2c\n" U C K V, "UPGRADE: WebSocket\nCONNECTION: UPGRADE\n"
      "SEC-WEBSOCKET-KEY: \t" WS_KEY "  \nsec-websocket-version:13\n", U C K V
      "Sec-WebSocket-Extensions: permessage-deflate\n", U C K V
      "Sec-WebSocket-Protocol: a\nSec-WebSocket-Protocol: b\n") },
    { ACCEPT, "GET ", HOST U C K V "\n", LIST("/any/where%20else?channel=a&x=y",
      "http://a:80/?channel=a", "/?channel=" NAME64, "/?history=007") },
    { 101, "Sec-WebSocket-Accept: HSmrc0sMlYUkAGmm5OPpG2HaGWk=", "GET /" HOST, U
      C V "\n", LIST("Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==\n") },
    { 400, NULL, "GET /" HOST U C V "Sec-WebSocket-Key: ", "\n\n", LIST("",
      "==", "dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ=", WS_KEY "=",
      "dGhlIHNhbXBsZSBub25j", "dGhlIHNhbXBsZSBub25jZSE=", "\"" WS_KEY "\"",
      "dGhlIHNhbXBsZSBub25jZSEhISEhISEh", "dGhlIHNhbXBsZSB-b25jZQ==",
      "dGhlIHNhbXB=ZSBub25jZQ==", "dGhlIHNhbXBs ZSBub25jZQ==", WS_KEY
      "\nSec-WebSocket-Key: " WS_KEY, WS_KEY
      "\nSec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw==") },
    { 426, V "Upgrade: websocket", "GET /" HOST U C K "Sec-WebSocket-Version: ",
      "\n\n", LIST("8", "269", "1", "013", "13, 8", "") },
    { 400, NULL, "GET /" HOST U V, "\n", LIST(C, K, K
      "Connection: Upgrades, x\n", K "Connection: no upgrade\n", K
      "Proxy-Connection: Upgrade\n", K C V, K C "Content-Length: 5\n\nhell") },
    { 426, NULL, "GET /" HOST U C K, "\n", LIST("") },
    { 400, NULL, "GET / HTTP/1.0\n" U C K V, "\n", LIST("") },
    { 200, HTML, "", C K V "\n", LIST("GET /" HOST, "HEAD /" HOST U, "GET /"
      HOST "Upgrade: websockets\n", "GET /" HOST "Upgrade: web socket\n") },
    { 400, NULL, "GET /?", HOST U C K V "\n", LIST("channel=x" NAME64,
      "channel=%c3", "channel=%zz", "channel=a%00", "history=all", "history=",
      "history=-1", "history=1x", "history=+1", "history=%zz") },
};

/* What a client gets, for each of a list that it sends; NULL: the same. A word
 * HH:PAYLOAD is a frame by its first byte (FIN, RSV, opcode), with %XX for what
 * cannot be written; *N behind repeats the payload, Nx before the frame, "16/"
 * or "64/" gives the bits of its length, "-" leaves out the mask. =CODE is a
 * close frame, "=" one without a code; !BYTES are bytes as they are. Messages
 * are what every client of the channel gets; pongs and the close go to this one
 * alone. Without a close the connection must still be good. */
#define X64 "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
struct talk {
    const char *gets;
    const char *const *sends;
};
static const struct talk frame_talks[] = {
    { NULL, LIST("81:", "82:", "81:a", "81:a*125", "81:a*126", "82:%fe*127",
      "81:a*128", "82:%fe*256", "82:%80*32768", "81:a*63999", "82:%fe*64000",
      "81:a%00b", "82:%c0%af%ff%00", "82:%81%80%00%00%00%00 81:a",
      "81:a*64000 81:b*64000", "81:abc", "81:abcd", "81:abcdefgh",
      "81:abcdefghi", "81:a 82:b 81:c", "1000x81: 81:end", "500x81:a 500x82:b",
      /* UTF-8: the first and last of each row of the table in RFC 3629, 4 */
      "81:%00", "81:%7f", "81:%c2%80", "81:%df%bf", "81:%e0%a0%80",
      "81:%e0%bf%bf", "81:%e1%80%80", "81:%ec%bf%bf", "81:%ed%80%80",
      "81:%ed%9f%bf", "81:%ee%80%80", "81:%ef%bb%bfa", "81:%ef%bf%bf",
      "81:%f0%90%80%80", "81:%f0%bf%bf%bf", "81:%f1%80%80%80",
      "81:%f3%bf%bf%bf", "81:%f4%80%80%80", "81:%f4%8f%bf%bf",
      "81:1234567%f4%8f%bf%bf12345", "81:%f0%9f%98%80*16000",
      "82:%e2%82 81:%c2%a9",
      /* close codes */
      "=", "=1000", "=1001", "=1003", "=1007", "=1011", "=1014", "=3000",
      "=3999", "=4000", "=4999", "81:a =", "82:a =1000") },
    { "81:abcd", LIST("01:ab 80:cd", "01:a 00:b 80:cd", "01: 00: 80:abcd",
      "01:ab 00:cd 80:", "01:ab 8a:x 80:cd", "8a: 1000x8a:x 81:abcd",
      "01:a 3000x00: 80:bcd", "!%81%84%00%00%00%00abcd") },
    { "81:a*1000", LIST("01:a 998x00:a 80:a", "01:a*100 00:a*800 80:a*100") },
    { "81:a*126", LIST("16/81:a*126", "01:a*125 80:a") },
    { "82:a*64000", LIST("16/82:a*64000", "02:a*63000 80:a*1000") },
    { "82:%ff%fe%00", LIST("02:%ff 00:%fe 80:%00") },
    { "81:ab 82:cd", LIST("01:a 80:b 02:c 80:d") },
    { "81:abcdefghijklmnopqrst", LIST("01:abcde 00:fgh 00:ijklmnopqrs 80:t") },
    { "81:%f0%9f%98%80", LIST("01:%f0%9f 00: 00:%98%80 80:",
      "01:%f0 00:%9f%98 80:%80", "01:%f0%9f%98 80:%80") },
    /* pings */
    { "8a:", LIST("89:") }, { "8a:%00%ff%88%82", LIST("89:%00%ff%88%82") },
    { "8a:p*125", LIST("89:p*125") }, { "10x8a:x", LIST("10x89:x") },
    { "8a:1 8a:2 8a:3", LIST("89:1 89:2 89:3") },
    { "8a:x 8a:y 81:abc", LIST("01:a 89:x 00:b 89:y 80:c") },
    { "8a:pp 81:ab", LIST("!%01%81%01%02%03%04%60%89%82%10%20%30%40%60%50"
      "%80%81%05%06%07%08%67") },
    { "3000x8a: 81:ab", LIST("01:a 3000x89: 80:b") },
    { "8a:%ff 81:%e2%82%ac", LIST("01:%e2%82 89:%ff 80:%ac") },
    { "8a:p*125 81:a*64000", LIST("01:a*63900 89:p*125 80:a*100") },
    /* close, and what comes after it */
    { "=1000", LIST("88:%03%e8bye", "88:%03%e8%ce%ba", "01:a =1000",
      "=1000 89:x", "=1000 81:x", "=1000 =1001", "=1000 !%ff%ff%ff%ff%ff",
      "=1000 1000x89:x", "01:%e2 =1000") },
    { "8a:x =1000", LIST("89:x =1000") }, { "=", LIST("01:a = 80:b") },
    { "8a:p 81:ab 82:c 8a:q 81:d =4000",
      LIST("01:a 89:p 80:b 82:c 8a: 89:q 81:d =4000") },
    /* errors: bits, opcodes, masks */
    { "=1002", LIST("c1:a", "a1:a", "91:a", "f2:a", "c9:", "aa:", "98:%03%e8",
      "01:a c0:b", "41:a", "01:a 99: 80:b", "!%c1%ff", "83:a", "84:", "85:a",
      "86:a", "87:a", "8b:a", "8c:", "8d:a", "8e:a", "8f:a", "03:a", "0b:",
      "01:a 83: 80:b", "01:a 8b: 80:b", "!%83%ff%00%00%00%00%00%01%00%00mask",
      "-81:a", "-82:", "-89:", "-88:%03%e8", "01:a -80:b", "01:a -89: 80:b",
      "!%81~%00~", "83: 81:a 89:b =1000", "!GET%20/%20HTTP/1.1",
      "!%0d%0a%0d%0a",
      /* lengths */
      "!%82%ff%00%00%00%00%00%00%ff%ffmask", "16/81:", "16/81:a", "16/81:a*125",
      "64/81:", "64/82:a*126", "16/89:a", "64/82:a*63000", "16/88:%03%e8",
      "01:a 16/80:b", "89:p*126", "8a:p*126", "88:%03*126", "!%89%fe",
      "!%88%ff", "!%81%fe%00%05mask", "!%81%ff%00%00%00%00%00%00%00%05mask",
      "!%82%ff%80%00%00%00%00%00%00%05mask",
      "!%82%ff%ff%ff%ff%ff%ff%ff%ff%ffmask",
      /* fragments */
      "09:a 80:b", "0a:", "08:%03%e8", "80:a", "00:a", "01:a 81:b", "01:a 01:b",
      "01:a 82:b", "02:a 00:b 81:c", "01: 81:b", "01:a !%81%fdmask",
      /* close codes */
      "88:%03", "=1", "=999", "=1004", "=1005", "=1006", "=1015", "=1100",
      "=2999", "=5000", "=59395", "=65535") },
    { "81:a =1002", LIST("81:a -81:b", "81:a c1:b", "81:a 83:b", "81:a 80:b",
      "01: 80:a 80:c") },
    { "8a:p =1002", LIST("89:p 80:", "89:p 8b:b", "01:a 89:p 81:b") },
    { "=1009", LIST("81:a*64001", "82:a*64001", "01:a*63000 80:a*1001",
      "01:a*63000 00:a*1001", "!%81%fe%fa%01mask",
      "!%82%ff%00%00%00%01%00%00%00%05mask",
      "!%82%ff%7f%ff%ff%ff%ff%ff%ff%ffmask",
      "02:a !%80%ff%7f%ff%ff%ff%ff%ff%ff%ffmask") },
    { "81:a =1009", LIST("81:a 81:a*64001") },
    { "81:a*63000 =1007", LIST("81:a*63000 01:a 80:%ff") },
    { "=1007", LIST("88:%03%e8%ce%ba%ff", "88:%03%e8%e2%82",
      "88:%03%e8%ed%a0%80", "01:%f4 80:%90", "01:%e2%82 80:(", "01:a%ff 80:b",
      "01:%ed 00:%a0 80:%80", "81:%e2%82 81:%ac", "01:%e2%82 80:", "81:%80",
      "81:%bf", "81:%c0%80", "81:%c1%bf", "81:%f5%80%80%80",
      "81:%f8%88%80%80%80", "81:%fe", "81:%ff", "81:%c2%7f", "81:%df%ff",
      "81:%e0%80%80", "81:%e0%9f%bf", "81:%e1%7f%80", "81:%ed%a0%80",
      "81:%ed%bf%bf", "81:%ef%c0%80", "81:%f0%80%80%80", "81:%f0%8f%bf%bf",
      "81:%f0%c0%80%80", "81:%f4%90%80%80", "81:%f4%c0%80%80", "81:%e0%a0%7f",
      "81:%f0%90%7f%80", "81:%f3%bf%c0%80", "81:%f4%8f%bf%7f",
      "81:%f1%80%80%c0", "81:%c3%a9%a9", "81:12345678%ff12345678", "81:%c2",
      "81:%e0%a0", "81:%f0", "81:%f0%90%80", "81:12345678%e2%82") },
};
/* With MESSAGE_MAX=16777216, as Autobahn's 9. */
static const struct talk large_talks[] = {
    { NULL, LIST("82:" X64 "*1024", "81:" X64 "*262144",
      "82:" X64 "*262144 81:" X64) },
    { "82:" X64 "*262144", LIST("02:" X64 "*1024 254x00:" X64 "*1024 80:" X64
      "*1024") },
    { "8a: 81:" X64 "*65536", LIST("01: 65536x00:" X64 " 89: 80:") },
    { "=1009", LIST("02:" X64 "*262144 80:x") },
};
/* clang-format on */

struct bytes {
    size_t n;
    unsigned char at[17 << 20];
};

static void bytes_add(struct bytes *b, const void *more, size_t n) {
    memcpy(b->at + b->n, more, n);
    b->n += n;
}

static void frame_add(struct bytes *b, int first, bool masked, int form,
                      const void *payload, size_t n) {
    b->n += ws_encode(b->at + b->n, first, masked, form, payload, n);
}

/* The bytes of a script: all in b[0] for a client to send; what is to come
 * from the server has the messages there, and pongs and the close in b[1]. */
static void script(const char *at, bool client, struct bytes b[2]) {
    static struct bytes text, payload;
    for (; *at; at += strcspn(at, " "), at += *at == ' ') {
        bool raw = *at == '!', closes = *at == '=';
        char *end;
        int number = (int)strtol(at, &end, 10), first = CLOSE;
        int times = *end == 'x' ? number : 1, form = *end == '/' ? number : 0;
        int code = closes && at[1] > ' ' ? atoi(at + 1) : 0;
        char pair[] = {(char)(code >> 8), (char)code};
        if (*end == 'x' || form) at = end + 1;
        bool masked = client && *at != '-';
        text.n = payload.n = 0;
        at += *at == '-';
        if (!raw && !closes) first = (int)strtol(at, NULL, 16);
        at += raw || closes ? 1 : 3;
        if (closes) bytes_add(&text, pair, code ? 2 : 0);
        for (; !closes && *at && *at != '*' && *at != ' '; at++) {
            unsigned byte = (unsigned char)*at;
            if (*at == '%' && sscanf(at + 1, "%2x", &byte) == 1) at += 2;
            text.at[text.n++] = (unsigned char)byte;
        }
        for (int n = *at == '*' ? atoi(at + 1) : 1; n > 0; n--)
            bytes_add(&payload, text.at, text.n);
        struct bytes *to = &b[!client && first & 8];
        for (; times > 0; times--)
            if (raw) bytes_add(to, payload.at, payload.n);
            else frame_add(to, first, masked, form, payload.at, payload.n);
    }
}

/* Takes what comes until the answer to "the last" and all messages are there,
 * or the close, which it answers, and compares. */
static void expect_script(struct peer *p, const char *who,
                          const struct bytes *want) {
    static struct bytes got[2];
    struct frame f = {0};
    bool last = false;
    got[0].n = got[1].n = 0;
    while (f.first != CLOSE && (!last || got[0].n < want->n)) {
        if (!expect(ws_next(p, &f), "%s: %s", who,
                    p->ended ? "no close frame" : "too little in time"))
            break;
        struct bytes *to = &got[f.first >> 3 & 1];
        if (f.first == CLOSE && f.length > 2) f.length = 2;
        if (f.length == 8 && !memcmp(f.data, "the last", 8)) last = true;
        else frame_add(to, f.first, false, 0, f.data, f.length);
    }
    if (f.first == CLOSE) {
        ws_send(p, CLOSE, f.data, f.length);
        expect_end(p);
    }
    for (int i = 0; i < 2; i++)
        expect(got[i].n == want[i].n &&
                   !memcmp(got[i].at, want[i].at, got[i].n),
               "%s gets %s, expected %s", who, shown(got[i].at, got[i].n),
               shown(want[i].at, want[i].n));
}

/* Runs a table: each script is sent behind the handshake, in one piece, and if
 * it is short byte by byte. */
static void run_talks(const char *program, const struct talk *t, size_t count) {
    static const char ask[] =
        "GET /?channel=frames HTTP/1.1\r\nHost: a\r\n" WS_HEADERS "\r\n";
    static struct bytes out[2], want[2];
    size_t head = sizeof ask - 1;
    struct server s = server_start(START("%s"), program);
    struct peer *clock = ws_open(s.port, "/?channel=clock");
    for (const struct talk *end = t + count; t < end; t++)
        for (const char *const *sends = t->sends; *sends; sends++) {
            const char *gets = t->gets ? t->gets : *sends;
            begin("frames: %s -> %s", *sends, gets);
            out[0].n = 0;
            bytes_add(out, ask, head);
            script(*sends, true, out);
            for (int chop = 0; chop < (out[0].n < 500 ? 2 : 1); chop++) {
                struct peer *observer = ws_open(s.port, "/?channel=frames");
                struct peer *p = peer_open(s.port);
                want[0].n = want[1].n = 0;
                script(gets, false, want);
                peer_send(p, out[0].at, chop ? head : out[0].n);
                ws_opened(p);
                if (chop)
                    send_chopped(p, clock, out[0].at + head, out[0].n - head);
                if (!strchr(gets, '=')) ws_send(p, PING, "the last", 8);
                expect_script(p, chop ? "byte by byte, one" : "one", want);
                want[1].n = 0; /* of these the others get none */
                ws_text(observer, "the last");
                expect_script(observer, "the channel", want);
                peer_close(p);
                peer_close(observer);
            }
            finish();
        }
    peer_close(clock);
    begin("a clean end of %s, after all frames", program);
    finish_stop(&s);
}

static void websocket_part(void) {
    run_groups("", open_groups, COUNT(open_groups));
    run_talks("chat", frame_talks, COUNT(frame_talks));
    run_talks("chat-large", large_talks, COUNT(large_talks));
    struct peer *p[200];
    struct server s = server_start(START("chat-large"));
    begin("200 clients announce 16 MiB and send a byte");
    double before = server_memory(&s);
    for (int i = 0; i < 200; i++) {
        p[i] = ws_open(s.port, "/");
        peer_send(p[i], "\x82\xff\0\0\0\0\1\0\0\0maskx", 15);
    }
    peer_close(ws_open(s.port, "/"));
    expect_memory(&s, before, 20);
    for (int i = 0; i < 200; i++) peer_close(p[i]);
    finish_stop(&s);
}

/* ---- chat -------------------------------------------------------------- */

static void channel_test(int port) {
    static const char *const texts[] = {"to c1", "by GET!", "", "\303\251", ""};
    static const int wanted[][2] = {{0, 0}, {1, 1}, {5, 5}, {1000000, 5}};
    struct peer *a = ws_open(port, "/?channel=c1"), *p;
    struct peer *b = ws_open(port, "/elsewhere?x&channel=%63%31");
    begin("channels are apart; the nameless is one, however it is written");
    for (int i = 0; i < 3; i++) {
        p = ws_open(port, LIST("/?channel=c", "/?channel=", "/?history=1")[i]);
        if (i == 2) ws_expect_text(p, "{\"history\":1}");
        else ws_text(p, "to another");
        ws_expect_text(p, "to another");
        peer_close(p);
    }
    ws_text(b, "to c1");
    ws_expect_text(a, "to c1");
    expect_status(port, "/send?channel=c1&message=by+GET%21", 200);
    ws_expect_text(a, "by GET!");
    peer_close(b);
    finish();
    begin("history: of five so many, then what is live");
    for (int i = 2; i < 5; i++) ws_text(a, texts[i]);
    ws_sync(a);
    for (size_t i = 0; i < COUNT(wanted); i++) {
        char text[100];
        sprintf(text, "/?channel=c1&history=%d", wanted[i][0]);
        b = ws_open(port, text);
        sprintf(text, "{\"history\":%d}", wanted[i][1]);
        ws_expect_text(b, text);
        for (int k = 5 - wanted[i][1]; k < 5; k++) ws_expect_text(b, texts[k]);
        ws_sync(b);
        expect(b->start == b->end, "more came");
        peer_close(b);
    }
    peer_close(a);
    finish();
}

static void join_test(int port, size_t size) {
    static char text[3000];
    struct peer *a = ws_open(port, "/?channel=join"), *b;
    struct frame f;
    int number = 10000, longest = 0;
    begin("history: no gap and no repeat while messages of %zu flow", size);
    memset(text, '.', sizeof text);
    for (int round = 0; round < 100 && !test.why[0]; round++) {
        static struct bytes out[2];
        int end = number + 60, next = 0, count = -1;
        out[0].n = out[1].n = 0;
        for (int i = 0; i < 60; i++) {
            memcpy(text + sprintf(text, "%d", number++), ".", 1);
            frame_add(&out[i / 20 > 0], TEXT, true, 0, text, size);
        }
        peer_send(a, out[0].at, out[0].n);
        b = peer_open(port);
        ws_ask(b, "/?channel=join&history=15");
        peer_send(a, out[1].at, out[1].n);
        ws_opened(b);
        if (ws_next(b, &f)) count = atoi((const char *)f.data + 11);
        expect(count >= 0 && count <= 15, "history of %d", count);
        longest = count > longest ? count : longest;
        while (next < end && expect(ws_next(b, &f), "nothing at %d", next)) {
            int got = atoi((const char *)f.data);
            expect(!next || got == next, "%d, expected %d", got, next);
            next = got + 1;
        }
        while (peer_take(a)) a->start = a->end;
        peer_close(b);
    }
    expect(longest == 15, "never a history of 15, only %d", longest);
    peer_close(a);
}

static void chat_part(void) {
    int next = 0;
    struct server s = server_start(START("chat"));
    channel_test(s.port);
    join_test(s.port, 20);
    finish_stop(&s);
    s = server_start(START("chat-short"));
    join_test(s.port, 2000);
    /* and in /messages of a small log there is its end, without a gap */
    struct response r = http_get(s.port, "/messages?channel=join");
    for (const char *at = r.body; at && (at = strstr(at, "\"1")); at += 2) {
        int number = atoi(at + 1);
        expect(!next || number == next, "%d, expected %d", number, next);
        next = number + 1;
    }
    expect(next == 16000 && r.length < 65536, "it ends at %d", next);
    finish_stop(&s);
}

/* ---- limits ------------------------------------------------------------ */

/* Of 8 MB of half messages, 7 MB of unread answers chat-short keeps 4 MiB. */
static void unfinished_test(void) {
    static const char ask[] = "GET /messages HTTP/1.1\r\nHost: a\r\n\r\n";
    static char bytes[16000];
    struct peer *p[520];
    struct server s = server_start(START("chat-short"));
    s.may_say = "unfinished";
    begin("unfinished messages and answers: the oldest go, not the newest");
    memset(bytes, '\1', sizeof bytes); /* six bytes each, as JSON */
    struct peer *newest = ws_open(s.port, "/");
    for (int i = 0; i < 4; i++) ws_send(newest, TEXT, bytes, sizeof bytes);
    for (int i = 0; i < 4; i++) ws_expect(newest, TEXT, bytes, sizeof bytes);
    double before = server_memory(&s);
    for (int i = 0; i < 520; i++) {
        bool answer = i % 26 == 0;
        if (answer) ws_sync(newest); /* or else it would be pinged */
        p[i] = answer ? peer_connect(s.port, 4096)
                      : ws_open(s.port, "/?channel=x");
        peer_text(p[i], answer ? ask : "\x82\xfe\x3e\x80mask");
        if (!answer) peer_send(p[i], bytes, sizeof bytes - 1);
    }
    ws_send(newest, BINARY, bytes, sizeof bytes);
    ws_expect(newest, BINARY, bytes, sizeof bytes);
    struct response r = http_get(s.port, "/messages");
    expect(r.status == 200 && r.length > sizeof bytes, "status %d", r.status);
    expect_memory(&s, before, 4 + 4);
    expect(peer_drain(p[0]) < 384000, "the first got its answer");
    server_says(&s, "unfinished");
    for (int i = 0; i < 520; i++) peer_close(p[i]);
    peer_close(newest);
    finish_stop(&s);
}

static void descriptors_test(void) {
    char command[99];
    sprintf(command, "ulimit -n 64; " START("chat") "-b 239.255.80.80:%d",
            1024 + getpid() % 64000);
    struct server s = server_start(command);
    struct peer *p[100];
    s.may_say = "open files";
    begin("64 descriptors, 100 clients: as some go others come; no spinning");
    for (int i = 0; i < 100; i++) {
        p[i] = peer_open(s.port);
        ws_ask(p[i], "/");
        if (i == 0) ws_opened(p[i]);
    }
    double cpu = server_cpu(&s);
    for (int i = 0; i < 50; i++, poll(NULL, 0, 20)) ws_sync(p[0]);
    cpu = server_cpu(&s) - cpu;
    expect(cpu < (test.sanitized ? 1 : 0.3), "%.1f s of CPU in 1 s", cpu);
    expect(!wait_for(p[99]->fd, POLLIN, now()), "all were let in");
    for (int i = 0; i < 100; i++) {
        if (i) ws_opened(p[i]);
        peer_close(p[i]);
    }
    finish_stop(&s);
}

static void limits_part(void) {
    descriptors_test();
    unfinished_test();
    struct server s = server_start(START("chat"));
    struct peer *p[256];
    char target[60];
    begin("256 channels with a client each: 503 for one more, not for the old");
    for (int i = 0; i < 256; i++) {
        sprintf(target, "/?channel=%d", i);
        p[i] = ws_open(s.port, target);
    }
    expect_status(s.port, "/send?channel=more&message=x", 503);
    expect_status(s.port, "/send?channel=7&message=x", 200);
    ws_expect_text(p[7], "x");
    for (int i = 0; i < 256; i++) peer_close(p[i]);
    finish();
    begin("channels without a client give way to new ones, the oldest first");
    for (int i = 0; i < 600; i++) { /* not for who reads, or says nothing */
        sprintf(target, "/send?channel=i%d&message=%d", i, i);
        if (i >= 300) sprintf(target, "/messages?channel=r%d", i);
        if (i >= 450) sprintf(target, "/send?channel=n%d", i);
        expect_status(s.port, target, i < 450 ? 200 : 400);
    }
    expect_file(s.port, "/messages?channel=i100", "=[\"100\"]");
    expect_file(s.port, "/messages?channel=i299", "=[\"299\"]");
    expect_file(s.port, "/messages?channel=i0", "=[]");
    finish_stop(&s);
}

/* ---- late, pinged ------------------------------------------------------ */

/* Though some of their bytes trickle, and while others chat. */
static void late_part(void) {
    static const char *const sent[] = {
        "GET / HTTP/1.1\r\nX: ", "GET / HTTP/1.1\r\nHost: a\r\n", "\r",
        "POST /send HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhello",
        "", /* that gets no answer */
    };
    static struct peer *p[500];
    struct server s = server_start(START("chat") "-d .");
    struct response r = {0};
    int left = 500;
    begin("500 requests that never end get 408 after 10 s, a slow reader all");
    struct peer *slow = peer_connect(s.port, 4096);
    peer_text(slow, "GET /large HTTP/1.1\r\nHost: a\r\n"
                    "Range: bytes=0-4194303\r\n\r\n");
    struct peer *one = ws_open(s.port, "/");
    double began = now(), first = 0;
    for (int i = 0; i < 500; i++) {
        p[i] = peer_open(s.port);
        peer_text(p[i], sent[i % 5]);
    }
    for (; left && now() < began + 10 + test.patience; poll(NULL, 0, 100)) {
        left = 0;
        for (int i = 0; i < 500; i++) {
            if (i % 5 == 0) peer_text(p[i], "x");
            peer_take(p[i]);
            left += !p[i]->ended;
        }
        if (left < 500 && !first) first = now() - began;
        if (peer_take(slow)) slow->start = slow->end;
        ws_sync(one);
    }
    expect(first > 9.5 && !left, "the first ended after %.1f s", first);
    expect(peer_drain(slow) > 2 << 20, "the slow reader was cut off");
    peer_close(slow);
    for (int i = 0; i < 500; i++) {
        if (*sent[i % 5]) r = read_response(p[i], false);
        expect(r.status == 408, "%s: status %d", sent[i % 5], r.status);
        peer_close(p[i]);
    }
    peer_close(one);
    finish_stop(&s);
}

static void pinged_part(void) {
    struct server s = server_start(START("chat-short"));
    struct frame f;
    int pings = 0;
    begin("a ping after PING_TIME, who does not answer ends after IDLE_TIME");
    struct peer *p = ws_open(s.port, "/"), *quiet = ws_open(s.port, "/");
    double began = now(), pinged = 0;
    for (; !quiet->ended && now() < began + 30; poll(NULL, 0, 20)) {
        if (peer_take(quiet) && !pinged) pinged = now() - began;
        peer_take(p);
        while (ws_take(p, &f)) {
            pings += f.first == PING;
            ws_send(p, PONG, f.data, f.length);
        }
    }
    expect(pinged > 3.9 && pings > 1, "pinged after %.1f s", pinged);
    expect(quiet->ended && now() - began > 11.9, "ended after %.1f s",
           now() - began);
    ws_sync(p);
    peer_close(p);
    peer_close(quiet);
    finish_stop(&s);
}

/* ---- process ----------------------------------------------------------- */

/* clang-format off */
/* The exit status, what the one line on stderr names (NULL: the argument), what
 * stands before the arguments. OPEN is a file that others may read. */
static const struct group refused[] = {
    { 2, "port", "", "", LIST("-p -1", "-p 65536", "-p ''", "--port=80x") },
    { 2, NULL, "-", "", LIST("p", "Z", "r") },
    { 2, NULL, "--", "", LIST("nonsense", "dir") },
    { 2, "quiet", "--", "", LIST("quiet=yes") },
    { 2, "--cert needs --key", "", "", LIST("--cert /x", "--key /x") },
    { 2, "origin", "-o ", "", LIST("''", "https://app.example/", "app.example",
      "'https://*.example'", "http://a,http://b", "https://", "a:b",
      "https://a:", "https://a:99999", "https://user@a", "'https://a?x'",
      "https://b\303\274cher", "'**'") },
    { 2, NULL, "", "", LIST("extra") }, { 2, "chat: ", "-b ", "", LIST("''") },
    { 2, "-s", "-b ", "", LIST("192.0.2.1:9") },
    { 2, "99999", "-b ", "", LIST("239.255.80.80:99999") },
    { 2, "--bus", "-b ", "", LIST("192.0.2.1:9,239.255.80.80:9",
      "239.255.80.80:9,192.0.2.1:9") },
    { 2, NULL, "-b ", "", LIST("239.255.80.80", "239.255.80.80:",
      "239.255.80.80:0", ":8081", "127.0.0.1:8081,") },
    { 1, NULL, "-d ", "", LIST("/nonexistent", "/dev/null") },
    { 1, NULL, "-a ", "", LIST("192.0.2.200") },
    { 1, "no address", "-a ", "", LIST("'no address'") },
    { 1, "nosuch0", "-b 239.255.80.81:9 -s none ", "", LIST("-i nosuch0") },
    { 1, NULL, "-b 239.255.80.81:9 -s ", "", LIST("/nonexistent", "OPEN") },
};

/* A request, and its line on stdout behind the address, as a regex. */
#define LINE(target, rest) "\"GET " target " HTTP/1\\.1\" " rest
static const char *const log_lines[][2] = {
    { "GET /" HOST "\n", LINE("/", "200 [0-9]{4,}") },
    { "GET /x?a=b" HOST "\n", LINE("/x\\?a=b", "404 [0-9]+") },
    { "GET /messages?%0a" HOST "\n", LINE("/messages\\?%0a", "200 2") },
    { "GET /" HOST U C K V "\n", LINE("/", "101 0") },
    { "GET /\033[31m\200" HOST "\n", LINE("/\\\\x1b\\[31m\\\\x80", "40. .*") },
    { "GET /a\"b\\c" HOST "\n", LINE("/a\\\\x22b\\\\x5cc", "404 [0-9]+") },
    { "GET /\002500x" HOST "\n", "\"GET /x{195}\" 404 [0-9]+" },
    { "HEAD / HTTP/1.0\n\n", "\"HEAD / HTTP/1\\.0\" 200 0" },
    { "rubbish\n\n", "\"rubbish\" 400 [0-9]+" },
};
/* clang-format on */

/* It ends by itself, with one line on stderr and nothing on stdout. */
static void expect_refused(const struct group *g, const char *value) {
    const char *naming = g->want ? g->want : value;
    char command[300];
    begin("exit %d: %s%s", g->status, g->before, value);
    sprintf(command, START("chat") "%s%s", g->before, value);
    struct server s = server_spawn(command);
    if (server_says(&s, "\n") && strstr(written(s.err), "listening on"))
        kill(s.pid, SIGTERM);
    int got = server_end(&s);
    const char *said = written(s.err), *end = strchr(said, '\n');
    expect(got == g->status, "exit status %d: %s", got, said);
    expect(end && !end[1] && strstr(said, naming) && !*written(s.out),
           "not one line that names %s: %s", naming, said);
    finish();
}

/* With SIGTERM some do not answer, or are in the middle of something. */
static void signal_test(int number) {
    struct server s = server_start(START("chat") "-d .");
    struct peer *p[7];
    bool stuck = number == SIGTERM;
    begin("%s: 1001 to all, exit 0", strsignal(number));
    for (int i = 0; i < 7; i++)
        p[i] = i < 5 ? ws_open(s.port, "/") : peer_open(s.port);
    if (stuck) {
        peer_send(p[4], "\x01\x85\0\0\0\0hello\x80\xe0\0\0", 15);
        peer_text(p[5], "GET / HTTP/1.1\r\nHost:");
        peer_text(p[6], "GET /large HTTP/1.1\r\nHost: a\r\n\r\n");
        peer_more(p[6], deadline());
    }
    ws_text(p[0], "the last word");
    ws_expect_text(p[0], "the last word");
    double began = now();
    kill(s.pid, number);
    for (int i = 0; i < 5; i++) {
        if (i) ws_expect_text(p[i], "the last word");
        ws_expect(p[i], CLOSE, "\3\351", 2);
        if (!stuck || i < 3) ws_send(p[i], CLOSE, "\3\351", 2);
    }
    for (int i = 0; i < 7 && !stuck; i++) peer_close(p[i]);
    expect_stop(&s, number);
    expect(now() - began < 5 + test.patience / 5, "%.1f s", now() - began);
    for (int i = 0; i < 7 && stuck; i++) peer_close(p[i]);
    finish();
}

static void process_part(void) {
    char command[100];
    for (const struct group *g = refused; g < refused + COUNT(refused); g++)
        for (int i = 0; g->requests[i]; i++) expect_refused(g, g->requests[i]);
    /* chat >&- <&-: nothing else may be taken for what these were */
    struct server s = server_start("exec <&- >&-; " START("chat"));
    begin("without descriptors 0 and 1 the log is written into nothing");
    for (int i = 0; i < 20; i++) http_get(s.port, "/send?message=kept");
    expect_file(s.port, "/messages", "Content-Length: 141"); /* 20 * 7 + 1 */
    sprintf(command, "test $(readlink /proc/%d/fd/[01] | uniq) = /dev/null",
            (int)s.pid);
    expect(!system(command), "they are not /dev/null");
    finish_stop(&s);
    begin("SIGTERM while it starts");
    s = server_spawn("exec ./chat -p 0 -b 239.255.80.81:9");
    server_says(&s, "\n");
    finish_stop(&s);
    s = server_start("trap '' HUP; " START("chat") "-a 127.0.0.1");
    begin("-a is named; with nohup SIGHUP does nothing; -V");
    server_says(&s, "listening on http://127.0.0.1:");
    kill(s.pid, SIGHUP);
    for (int i = 0; i < 2; i++) expect_status(s.port, "/", 200);
    expect_stop(&s, SIGTERM);
    s = server_spawn("exec ./chat -V");
    expect(!server_end(&s) && !strcmp(written(s.out), "chat 2.0\n"), "-V");
    finish();
    s = server_start(START("chat"));
    http_get(s.port, "/"); /* so it ends with a connection in TIME_WAIT */
    expect_stop(&s, SIGTERM);
    s = server_start("exec ./chat -b none -p %d", s.port);
    sprintf(command, "%d", s.port);
    expect_refused(&(struct group){.status = 1, .before = "-p "}, command);
    begin("a port again: at once, but not while somebody has it");
    finish_stop(&s);
}

static void log_part(void) {
    struct server s = server_start(START("chat"));
    struct server quiet = server_start(START("chat") "-q");
    char form[2000] = "^", request[600];
    begin("the request log: a line a request, at once; with -q none");
    peer_close(peer_open(s.port)); /* as health checks do: no line */
    for (size_t i = 0; i < COUNT(log_lines); i++) {
        sprintf(form + strlen(form), "127\\.0\\.0\\.1 %s\n", log_lines[i][1]);
        size_t n = expanded(log_lines[i][0], request);
        exchange(quiet.port, NULL, request, n);
        exchange(s.port, NULL, request, n);
    }
    strcat(form, "$");
    for (double until = deadline(); now() < until; poll(NULL, 0, 5))
        if (matches(written(s.out), form)) break;
    expect(matches(written(s.out), form), "%s", written(s.out));
    expect(!*written(quiet.out), "-q: %s", written(quiet.out));
    expect_stop(&quiet, SIGTERM);
    finish_stop(&s);
}

static void signals_part(void) {
    for (int i = 0; i < 3; i++)
        signal_test((const int[]){SIGTERM, SIGINT, SIGHUP}[i]);
}

/* ---- two --------------------------------------------------------------- */

/* While an instance is frozen the others' talkers wait for it, for 5 s, which
 * is longer than PING_TIME and REQUEST_TIME are in chat-short. */
static void two_part(void) {
    static struct bytes out[2];
    struct server s[3];
    struct frame f = {0};
    char line[200], bus[40];
    size_t sent = 0;
    sprintf(bus, "239.255.80.80:%d", 20000 + getpid() % 40000);
    for (int i = 0; i < 3; i++) {
        s[i] = server_start("exec ./chat-short -p 0 -b %s", bus);
        s[i].may_say = "^chat: peer [0-9a-f]{16} (joined|left)$|no progress";
    }
    begin("instances: they meet, what is said crosses, and one leaves");
    sprintf(line, "chat: listening on http://localhost:%d/, bus %s on lo\n",
            s->port, bus);
    server_says(s, line);
    for (int i = 0; i < 3; i++) server_says(&s[i], "joined\n");
    struct peer *p = ws_open(s->port, "/?channel=x");
    http_get(s[1].port, "/send?channel=x&message=sent");
    ws_expect_text(p, "sent");
    for (size_t i = 1; i <= 3; i++) ws_send(p, BINARY, "\373\357\377", i);
    for (size_t i = 1; i <= 3; i++) ws_expect(p, BINARY, "\373\357\377", i);
    expect_file(s->port, "/messages?channel=x",
                "=[\"sent\",{\"base64\":\"+w==\"},{\"base64\":\"++8=\"},"
                "{\"base64\":\"++//\"}]");
    expect_stop(&s[2], SIGTERM);
    server_says(s, "left\n");
    peer_close(p);
    finish();
    begin("a full bus: /send gets 503, who waits is not cut off as silent");
    p = peer_connect(s->port, 65536);
    ws_ask(p, "/");
    ws_opened(p);
    poll(NULL, 0, 1100); /* they have settled and told so, once a second */
    script("2000x82:p*500", true, out);
    kill(s[1].pid, SIGSTOP);
    while (sent < out->n && wait_for(p->fd, POLLOUT, now() + 0.3)) {
        ssize_t n = send(p->fd, out->at + sent, out->n - sent, 0);
        if (n < 0) break; /* it has closed the connection */
        sent += (size_t)n;
    }
    expect(sent < out->n, "all was taken");
    double began = now();
    struct response r = http_get(s->port, "/send?message=x");
    expect(r.status == 503 && now() - began > 0.5, "status %d after %.1f s",
           r.status, now() - began);
    for (int n = 0; n < 2000 && expect(ws_next(p, &f), "only %d come", n);) {
        ssize_t more = send(p->fd, out->at + sent, out->n - sent, 0);
        if (more > 0) sent += (size_t)more;
        n += f.first == BINARY;
    }
    kill(s[1].pid, SIGCONT);
    peer_close(p);
    expect_stop(&s[1], SIGTERM);
    finish_stop(s);
}

/* ---- All of it --------------------------------------------------------- */

int main(int argc, char **argv) {
    static const struct part parts[] = {
        {"http", http_part},           /* requests, answers, who may talk */
        {"files", files_part},         /* -d: types, ETag, Range, listings */
        {"websocket", websocket_part}, /* RFC 6455; as Autobahn's 1-7 and 9 */
        {"chat", chat_part},           /* channels, history, order */
        {"limits", limits_part},       /* memory, channels, descriptors */
        {"late", late_part},           /* 408 after 10 s, for 500 clients */
        {"pinged", pinged_part},       /* and the end of who is silent */
        {"two", two_part},             /* instances, and one that is frozen */
        {"process", process_part},     /* options, odd starts */
        {"log", log_part},             /* of the requests */
        {"signals", signals_part},     /* 1001 to all and exit 0 */
        {0},
    };
    char folder[] = "/tmp/chat-test-XXXXXX";
    harness_open(folder);
    if (system("echo secret >OPEN; chmod 644 OPEN; truncate -s 200M large"))
        perror("OPEN, large");
    int status = run_parts(parts, argc, argv);
    return system("rm -rf $FOLDER") ? 1 : status;
}
