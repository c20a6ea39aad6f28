#!/usr/bin/python3
"""Clients that nobody here wrote: proves that curl, Python's websockets and Node's ws and fetch
(clients.js) work with the chat, on one instance and on two that are joined by the bus.

    test/clients.py [-l] [CASE...]      all cases, or those named (-l lists them)
"""
import sys
sys.dont_write_bytecode = True
import asyncio, os, re, shlex, shutil, subprocess
from harness import ROOT, SLOWER, Failure, Lab, Skip, check, equal, main, own_group


def instances(count):
    """A lab with one instance, or with two that have met."""
    lab = Lab(count, network=False)
    lab.start("-b", own_group() if count > 1 else "none")
    return lab


# --- curl ----------------------------------------------------------------------------------------

# What curl is asked; what it prints with -w '%{http_code}', a pattern; its standard input. {url}
# serves the built-in page, {files} curl's own folder: `fits` holds 64,000 bytes, `more` one more,
# `mega` 1 MiB and one, `page.html` the page, `half` the beginning of that.
MEGA = (1 << 20) + 1                                    # from here on, curl says Expect
HEAD = "-s -o /dev/null -D -"
OLD = "-H Connection:Upgrade -H Upgrade:websocket -H Sec-WebSocket-Version:8"
CURL = (
    ("{url}/send?message=hello", "message sent200"),
    ("{url}/send -d message=a+b%20c", "message sent200"),
    ("{url}/send --data-binary @-", "message sent200", "two\nlines \"q\"\t\\"),
    ("-G {url}/send --data-urlencode 'message=grüße & 100% + <b> ☃'", "message sent200"),
    ("{url}/send?message=a+b%2Bc", "message sent200"),
    ("{url}/send", r"\?message not provided400"),
    ("-X POST -T - {url}/send", ".*Content-Length.*411", "chunked"),
    ("-H 'Transfer-Encoding: chunked' -d x {url}/send", ".*Content-Length.*411"),
    ("-T fits {url}/send", ".*405"), ("-T - {url}/send", ".*4(05|11)", "a PUT"),
    (f"-X DELETE {HEAD} {{url}}/", ".*\r\nAllow: GET, HEAD\r\n.*405"),
    (f"-X OPTIONS {HEAD} {{url}}/send", ".*\r\nAllow: GET, HEAD, POST\r\n.*405"),
    ("--data-binary @fits {url}/send?channel=large", "message sent200"),
    ("-v -H 'Expect: 100-continue' --data-binary @fits {url}/send?channel=large",
     ".*HTTP/1.1 100 Continue.*message sent200"),
    ("{url}/messages?channel=large", '\\["(x{64000})","\\1"\\]200'),
    ("--data-binary @more {url}/send", ".*413"),
    ("-H Expect: --data-binary @mega {url}/send", ".*413"),
    ("-v --data-binary @mega {url}/send", "(?!.* 100 Cont).*> Expect: 100-continue.*413"),
    ("{url}/ -o got", "200"), ("-0 {url}/ -o got", "200"), ("--compressed {url}/ -o got", "200"),
    ("--http2 {url}/ -o got", "200"), ("{url}/?channel=x&history=5 -o got", "200"),
    ("-I {url}/", "HTTP/1.1 200 .*Content-Length: [0-9]+\r\n.*-Options: nosniff\r\n.*200"),
    ("-I {url}/messages", "HTTP/1.1 200 .*application/json\r\n.*200"),
    ("{files}/mega -o mega.got", "200"), ("-C - -o half {files}/page.html", "206"),
    ("-C - -o got {files}/page.html", ".*416"), ("-r 900000- {files}/page.html", ".*416"),
    ("-r 0-4 {files}/page.html", "<!doc206"), ("-r -8 {files}/page.html", "script>\n206"),
    ("--etag-save etag {files}/page.html -o got", "200"),
    ("--etag-compare etag {files}/page.html", "304"),
    ("-L {files}/sub -w '%{{url}}'", ".*a%20%26%20b.*/sub/?"),
    ("{url}/none", ".*404"), ("--path-as-is {files}/sub/../../secret", ".*40[04]"),
    (f"-H 'X-Long: {'x' * 9000}' {{url}}/", ".*431"), (f"{{url}}/{'x' * 9000}", ".*431"),
    ("-H 'Origin: http://evil.example' {url}/send?message=x", ".*403"),
    ("-H 'Origin: {url}' {url}/send?channel=x&message=x", "message sent200"),
    (f"{OLD} -H 'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==' {HEAD} {{url}}/",
     ".*\r\nSec-WebSocket-Version: 13\r\n.*426"),
    ("{url}/send?channel=row&message=[1-300]", "(message sent200){300}"),
    ("--no-progress-meter -Z {url}/send?channel=row&message=[1-300]", "(message sent|200){600}"),
    ("{url6}/messages?channel=none", r"\[\]200"), ("{name}/messages?channel=none", r"\[\]200"),
)


def case_curl():
    """curl: each request of a table, and what it prints"""
    if not shutil.which("curl"):
        raise Skip("curl is not installed")
    with instances(1) as lab:
        host, wrong = lab.hosts[0], []
        page = host.get("/")
        os.mkdir(lab.path("sub"))
        for name, data in (("fits", b"x" * 64000), ("more", b"x" * 64001), ("mega", bytes(MEGA)),
                           ("page.html", page), ("half", page[:5000]), ("sub/a & b", b"")):
            with open(lab.path(name), "wb") as file:
                file.write(data)
        files = lab.add_host().start("-b", "none", "-d", lab.directory)
        urls = {kind: f"http://{name}:{port}" for kind, name, port in
                (("url", "127.0.0.1", host.port), ("url6", "[::1]", host.port),
                 ("name", "localhost", host.port), ("files", "127.0.0.1", files.port))}
        for words, expected, *stdin in CURL:
            done = subprocess.run(
                ("curl", "-q", "-sS", "--noproxy", "*", "-m", str(20 * SLOWER),
                 "-w", "%{http_code}", *(word.format(**urls) for word in shlex.split(words))),
                cwd=lab.directory, input="".join(stdin).encode(), stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT)
            if not re.fullmatch(expected, done.stdout.decode(), re.S):
                wrong.append(f"curl {words:.90}: {done.stdout[-200:]!r}, not {expected}")
        for name, data in ("half", page), ("got", page), ("mega.got", bytes(MEGA)):
            with open(lab.path(name), "rb") as file:
                if file.read() != data:
                    wrong.append(f"{name} is not what it should be")
        row = [int(text) for text in host.history("row")]
        if row[:300] != list(range(1, 301)) or sorted(row[300:]) != row[:300]:
            wrong.append(f"not each of the row once: {row}")
        check(not wrong, "; ".join(wrong))
        equal(host.history(), ["hello", "message=a+b%20c", "two\nlines \"q\"\t\\",
                               "grüße & 100% + <b> ☃", "a b+c"], "what was sent")
        return f"{len(CURL)} requests"


# --- Python's websockets -------------------------------------------------------------------------

async def talk(one, two, secure=None):
    """Conversations of a client at the URL `one` with others at `two`."""
    import websockets

    async def client(url, path="/", **options):
        return await websockets.connect(url + path, ssl=secure, max_size=None, **options)

    async def heard(expected, *clients):
        for c in clients:
            equal(await c.recv(), expected, "received")
    a, b = await client(one), await client(two)
    for data in ("hello", "", "grüße ☃ 😀\0", b"", b"\0\xff", "x" * 125, "x" * 126, b"y" * 64000,
                 "é" * 32000, "<b>"):
        await a.send(data)
        await heard(data, a, b)
    await a.send(["one ", "", "twö ", "three"])
    await heard("one twö three", a, b)
    for data in b"", b"abcd", bytes(125):
        await (await a.ping(data))
    await a.pong(b"nobody asked")
    for sends, code in ((lambda c: c.close(4999, "bye"), 4999),
                        (lambda c: c.send("x" * 64001), 1009),
                        (lambda c: c.send(["x" * 40000] * 2), 1009),
                        (lambda c: c.write_frame(True, 1, b"\xc3("), 1007)):
        c = await client(one)
        await sends(c)
        await c.wait_closed()
        equal(c.close_code, code, "close code")
    c = await client(one, "/any?channel=gr%C3%BC%C3%9Fe+%26&history=5", compression="deflate",
                     subprotocols=["chat", "superchat"])
    equal((c.extensions, c.subprotocol), ([], None), "agreed on")
    await heard('{"history":0}', c)
    d = await client(two, "/?channel=gr%C3%BC%C3%9Fe%20%26")
    sent = [f"m{i}" if i % 3 else bytes([i]) for i in range(20)]
    for data in sent:
        await d.send(data)
        await heard(data, c, d)
    e = await client(one, "/?history=7&channel=gr%c3%bc%c3%9fe%20%26")
    for data in ['{"history":7}', *sent[-7:]]:
        await heard(data, e)
    await c.send("live")
    await heard("live", c, d, e)
    try:
        await client(one, extra_headers={"Origin": "http://evil.example"})
        raise Failure("a foreign origin was let in")
    except websockets.InvalidStatusCode as refusal:
        equal(refusal.status_code, 403, "a foreign origin")
    await a.send("the end")
    await heard("the end", a, b)                        # and nothing else
    for c in a, b, c, d, e:
        await c.close()


def websockets(one, two, secure=None):
    try:
        import websockets
    except ImportError:
        raise Skip("python3-websockets is not installed") from None
    asyncio.run(asyncio.wait_for(talk(one, two, secure), 20 * SLOWER))


def node(kind, one, two, **environment):
    """clients.js, whose own lines tell."""
    if not shutil.which("node") or not os.path.isdir(ROOT + "/test/node_modules/ws"):
        raise Skip("needs node and its packages ('npm ci' in test/)")
    done = subprocess.run(("node", ROOT + "/test/clients.js", kind, one, two),
                          env={**os.environ, **environment, "SLOWER": str(SLOWER)})
    equal(done.returncode, 0, "status of clients.js")


def on(count, function, *words):
    """A case that runs the function with the URLs of one instance (twice the same) or of two."""
    def case():
        scheme = "http" if words else "ws"
        with instances(count) as lab:
            function(*words, *(f"{scheme}://localhost:{host.port}" for host in (lab.hosts * 2)[:2]))
    case.__name__ = f"case_{function.__name__}_{count}"
    case.__doc__ = ("one instance", "two instances")[count - 1]
    return case


if __name__ == "__main__":
    main("clients", (on(1, node, "one instance"), on(2, node, "two instances"), case_curl,
                     on(1, websockets), on(2, websockets)))
