#!/usr/bin/python3
"""https and wss: proves that $BUILD/chat-tls, the program built with TLS, talks to Python's ssl and
websockets, openssl s_client, Node's ws (clients.js) and Chromium; that records of any size come
through whole, by TLS 1.2 and 1.3; that SIGHUP renews certificates; and that strangers harm nobody.

    test/tls.py [-l] [CASE...]      all cases, or those named (-l lists them)
"""
import sys
sys.dont_write_bytecode = True
import os, shutil, signal, socket, ssl, tempfile
import clients
from harness import (BUILD, CHAT, SLOWER, Client, Host, Lab as AnyLab, Skip, check, equal, frame,
                     main, mentions, now, run, settle, upgrade)

TLS = BUILD + "/chat-tls"
VERSIONS = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
PEMS = tempfile.mkdtemp(prefix="chat-tls-") + "/"       # the certificates


def certify(name, issuer=None, kind="ec", authority=False):
    """Makes NAME.key and NAME.pem for localhost; that of a server has its issuer's behind it."""
    run("openssl", "req", "-x509", "-noenc", "-days", "2", "-subj", f"/CN={name}", "-newkey",
        *(("ec", "-pkeyopt", "ec_paramgen_curve:P-256") if kind == "ec" else (kind,)),
        "-keyout", f"{PEMS}{name}.key", "-out", f"{PEMS}{name}.pem",
        "-addext", "subjectAltName=DNS:localhost",
        *(("-addext", "basicConstraints=critical,CA:TRUE") if authority else ()),
        *(("-CA", f"{PEMS}{issuer}.pem", "-CAkey", f"{PEMS}{issuer}.key") if issuer else ()))
    if not authority:
        with open(f"{PEMS}{name}.pem", "a") as file, open(f"{PEMS}{issuer}.pem") as more:
            file.write(more.read())


def missing():
    """Makes the certificates: of a root, an intermediate and three servers, and some bad files."""
    if not os.path.exists(TLS):
        return f"{TLS} is not there (libssl-dev?)"
    if not shutil.which("openssl"):
        return "openssl is not installed"
    certify("root", authority=True)
    certify("middle", "root", authority=True)
    certify("one", "middle")
    certify("two", "middle")
    certify("rsa", "middle", "rsa:2048")
    for name in "garbage.pem", "garbage.key":
        with open(PEMS + name, "w") as file:
            file.write("-----BEGIN CERTIFICATE-----\nnothing\n")


def context(*version):
    """Of a client that checks the chain, and takes an end without close_notify for an error."""
    made = ssl.create_default_context(cafile=PEMS + "root.pem")
    made.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF       # Python's own choice
    if version:
        made.minimum_version = made.maximum_version = version[0]
    return made


class TlsHost(Host):
    """Its instance has the certificate `one`, as live.pem and live.key of the lab."""
    program = TLS

    def begin(self, *options, **more):
        if not {"--cert", "--key"} & {*options}:
            self.install("one")
            files = "--cert", self.lab.path("live.pem"), "--key", self.lab.path("live.key")
            options = "-b", "none", *files, *options
        self.tls = context()
        return super().begin(*options, **more)

    def install(self, name, key=None):
        for source, target in (name + ".pem", "live.pem"), ((key or name) + ".key", "live.key"):
            shutil.copy(PEMS + source, self.lab.path("new"))
            os.rename(self.lab.path("new"), self.lab.path(target))

    def connect(self):
        link = super().connect()
        link.suppress_ragged_eofs = False               # an end must be a close_notify
        return link

    def open(self, *version):
        """A WebSocket client, of that version."""
        self.tls = context(*version)
        return Client(self)

    def stranger(self, data, end=True):
        """Sends bytes without TLS; returns all of the answer."""
        answer = b""
        with socket.create_connection(("127.0.0.1", self.port), 15 * SLOWER) as link:
            try:
                link.sendall(data)
                if end:
                    link.shutdown(socket.SHUT_WR)
                while piece := link.recv(1 << 16):
                    answer += piece
            except TimeoutError:
                check(False, f"no end after {data[:30]!r}")
            except OSError:
                pass                                    # a reset is an end, too
        return answer

    def shown(self):
        """The name in the certificate that it shows."""
        with self.connect() as link:
            return dict(pair for (pair,) in link.getpeercert()["subject"])["commonName"]


class Lab(AnyLab):
    host_type = TlsHost

    def __init__(self, *options, start=True, expect=""):
        super().__init__(1, network=False, expect=expect)
        self.host = self.hosts[0]
        if start:
            self.host.start(*options)


def case_options():
    """bad options and files: the exit status, and one line that names it"""
    with Lab(start=False) as lab:
        for option, file, what in ("--cert", "one.pem", "key"), ("--key", "one.key", "cert"):
            check(what in lab.host.refuses(option, PEMS + file, status=2), f"{option} alone")
        for cert, key in (("none", "one.key"), ("one.pem", "none"), ("garbage.pem", "one.key"),
                          ("one.pem", "garbage.key"), ("one.pem", "two.key"),
                          ("one.pem", "rsa.key"), (".", "one.key")):
            said = lab.host.refuses("-b", "none", "--cert", PEMS + cert, "--key", PEMS + key)
            check(PEMS + cert in said or PEMS + key in said, f"{cert}, {key}: {said}")
        if not mentions(CHAT, b"SSL_CTX_new"):
            lab.host.program = CHAT
            said = lab.host.refuses("--cert", PEMS + "one.pem", "--key", PEMS + "one.key", status=2)
            check("TLS=1" in said, f"without TLS: {said}")


def case_records():
    """many records of 1, 7 or 16,384 bytes at once: none waits, nor minds strangers' errors"""
    with Lab() as lab:
        frames = b"".join(frame(b"%d " % n * (n % 99)) for n in range(200)) + frame(b"end", 8)
        for step in 1, 7, 16384:
            incoming, out, got = ssl.MemoryBIO(), ssl.MemoryBIO(), b""
            tls = context().wrap_bio(incoming, out, server_hostname="localhost")
            with socket.create_connection(("127.0.0.1", lab.host.port), 10 * SLOWER) as link:
                def until_read(function, *arguments):
                    while True:
                        try:
                            return function(*arguments)
                        except ssl.SSLWantReadError:
                            link.sendall(out.read())
                            incoming.write(link.recv(1 << 16))
                until_read(tls.do_handshake)
                tls.write(upgrade())
                for at in range(0, len(frames), step):
                    tls.write(frames[at:at + step])
                records = out.read()
                for part in records[:-30], records[-30:-10], records[-10:]:
                    link.sendall(part)
                    lab.host.stranger(b"garbage")       # an error between has nothing to do with us
                while b"\x88\x02" not in got:
                    got += until_read(tls.read, 1 << 16)
            equal(lab.host.history()[-1], "199 ", f"the last message, in records of {step}")


def case_slow_reader():
    """blocked within a record, it goes on later where it was, with a pong between frames"""
    with Lab() as lab:
        fast = lab.host.open()
        for version in VERSIONS * 2:
            slow, sent = lab.host.open(version), [f"{n} " * (n * n % 9001 // 2) for n in range(40)]
            slow.listen(False)
            slow.send("in between", 9)
            for text in sent:                           # together less than a log
                fast.send(text)
                fast.hears(text)
            slow.listen()
            slow.hears(*sent)
            slow.end()


def case_files():
    """/send, and a file of 5 MB for readers fast and slow of both versions"""
    with tempfile.TemporaryDirectory() as folder, Lab("-d", folder) as lab:
        data, body = os.urandom(5 << 20), b"x" * 60000
        with open(folder + "/big.bin", "wb") as file:
            file.write(data)
        for version in VERSIONS:
            lab.host.tls = context(version)
            check(lab.host.get("/big.bin") == data, f"{version.name}: differs")
            with lab.host.connect() as slow:
                slow.sendall(b"GET /big.bin HTTP/1.0\r\n\r\n")
                got, turn = b"", 0
                while piece := slow.recv(1 + turn * 7919 % 30011):
                    got, turn = got + piece, turn + 1
            check(got.endswith(data), f"{version.name}, slowly: differs")
        lab.host.request(b"POST /send HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n" + body)
        equal(lab.host.history(), [body.decode()], "/messages")


def case_close_notify():
    """it comes at the end, whoever closes first and how"""
    with Lab() as lab:
        lab.host.get("/")                               # fails without
        polite, wrong, rude, staying = (lab.host.open() for _ in range(4))

        def ends(client, code):
            lab.pump(lambda: client.closed, 5, f"the connection does not end: {code}")
            equal((client.close_code, client.closed), (code, "closed by the server"), "the end")
        polite.send((1000).to_bytes(2, "big"), 8)
        ends(polite, 1000)
        wrong.send("", 0x40)
        ends(wrong, 1002)
        lab.selector.unregister(rude.socket)
        rude.socket.shutdown(socket.SHUT_WR)            # of TCP, without a word
        with lab.host.connect() as link:                # the client is first
            link.sendall(b"GET /messages HTTP/1.1\r\nHost: x\r\n\r\n")
            check(link.recv(4096).startswith(b"HTTP/1.1 200 "), "no answer")
            link.unwrap().close()                       # fails without
        staying.send("still here")
        staying.hears("still here")
        lab.host.send_signal(signal.SIGTERM)
        ends(staying, 1001)


def case_renewal():
    """SIGHUP: new files for new clients; bad ones are told and change nothing; the old stay"""
    with Lab(expect="|chat: .*live.(pem|key)") as lab:
        host, old = lab.host, lab.host.open()
        equal(host.shown(), "one", "at first")

        def told(name, key):
            lines = host.said().count("\n")
            host.stranger(b"garbage")                   # whose errors are no reason for ours
            host.send_signal(signal.SIGHUP)
            lab.pump(lambda: host.said().count("\n") > lines, 5, f"{name}, {key}: not told")
            equal(host.shown(), "two", f"after {name}, {key}")
        for name in "two", "one":
            host.install(name)
            host.send_signal(signal.SIGHUP)
            lab.pump(lambda: host.shown() == name, 5, f"{name} is not shown", 0.02)
            if name == "two":
                for bad in (("one", "two"), ("garbage", "one"), ("one", "garbage"), ("one", "rsa")):
                    host.install(*bad)
                    told(*bad)
                os.unlink(lab.path("live.pem"))
                told("none", "rsa")
        old.send("still here")
        old.hears("still here")
        settle([old])


HALF_A_HELLO = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99)    # of 512 bytes


def case_strangers():
    """plain HTTP, garbage, odd hellos: an end, and nobody else minds"""
    with Lab() as lab:
        other = lab.host.open()
        for data in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(5000), os.urandom(50000),
                     b"\x16\x03\x01\xff\xff" + bytes(70000), b"\x16\x03\x01\0\0",
                     b"\x80\x2e\x01\0\2", b"\x15\x03\x03\0\2\2\x28", HALF_A_HELLO,
                     HALF_A_HELLO + bytes(413)):
            answer = lab.host.stranger(data)
            check(b"HTTP" not in answer, f"{data[:30]!r}: {answer!r:.99}")
        other.send("still here")
        other.hears("still here")


def case_stalls():
    """who does not finish the handshake is cut off after 10 s"""
    with Lab() as lab:
        begun = now()
        equal(lab.host.stranger(HALF_A_HELLO, end=False), b"", "an answer")
        check(9 < now() - begun < 15 * SLOWER, f"cut off after {now() - begun:.1f} s")


def case_s_client():
    """openssl s_client, which verifies the chain, gets the page"""
    with Lab() as lab:
        page = run("openssl", "s_client", "-quiet", "-verify_return_error", "-verify_hostname",
                   "localhost", "-CAfile", PEMS + "root.pem", "-connect",
                   f"127.0.0.1:{lab.host.port}", text="GET / HTTP/1.0\r\n\r\n")
        check(page.startswith("HTTP/1.1 200 OK") and page.endswith("</script>\n"), f"{page!r:.200}")


def case_websockets():
    """Python's websockets over wss"""
    with Lab() as lab:
        url = f"wss://localhost:{lab.host.port}"
        clients.websockets(url, url, context())


def case_node():
    """Node's ws and fetch over wss and https"""
    with Lab() as lab:
        url = f"https://localhost:{lab.host.port}"
        clients.node("wss", url, url, NODE_EXTRA_CA_CERTS=PEMS + "root.pem")


def case_chromium():
    """the page in Chromium: it connects by wss and shows the history"""
    chromium = shutil.which("chromium")
    if not chromium:
        raise Skip("no Chromium here")
    with Lab() as lab:
        lab.host.get("/send?message=hello%20Chromium")
        page = run(chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   "--ignore-certificate-errors", "--virtual-time-budget=10000",
                   "--user-data-dir=" + lab.path("chromium"), f"https://localhost:{lab.host.port}/")
        check("hello Chromium" in page, f"the page: {page[-800:]}")


if __name__ == "__main__":
    try:
        main("tls", (case_stalls, case_node, case_chromium, case_options, case_records, case_files,
                     case_slow_reader, case_close_notify, case_renewal, case_strangers,
                     case_s_client, case_websockets), missing=missing)
    finally:
        shutil.rmtree(PEMS)
