#!/usr/bin/python3
"""https and wss: proves that $BUILD/chat-tls, the program built with TLS, talks to Python's ssl, to
Node's ws and fetch (clients.js) and to Chromium; that records of any size come through whole, by
TLS 1.2 and 1.3; that SIGHUP renews certificates; and that strangers harm nobody.

    test/tls.py [-l] [CASE...]      all cases, or those named (-l lists them)
"""
import sys
sys.dont_write_bytecode = True
import os, shutil, signal, socket, ssl, tempfile
from pathlib import Path
import clients
from harness import (BUILD, CHAT, SLOWER, Client, Host, Lab as AnyLab, Skip, check, equal, frame,
                     main, mentions, now, run, settle, upgrade)

TLS = BUILD + "/chat-tls"
VERSIONS = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
FOLDER = tempfile.TemporaryDirectory(prefix="chat-tls-")
PEMS = FOLDER.name + "/"                                # the certificates
EC = "ec", "-pkeyopt", "ec_paramgen_curve:P-256"

def certify(name, issuer, kind=EC, *more):
    """Makes NAME.key and NAME.pem for localhost."""
    run("openssl", "req", "-x509", "-noenc", "-days", "2", "-subj", f"/CN={name}", "-newkey", *kind,
        "-keyout", f"{PEMS}{name}.key", "-out", f"{PEMS}{name}.pem",
        "-addext", "subjectAltName=DNS:localhost", *more,
        *(("-CA", f"{PEMS}{issuer}.pem", "-CAkey", f"{PEMS}{issuer}.key") if issuer else ()))

def missing():
    """Makes the certificates: of a root, an intermediate and three servers."""
    if not os.path.exists(TLS):
        return f"{TLS} is not there (libssl-dev?)"
    if not shutil.which("openssl"):
        return "openssl is not installed"
    for name, issuer in ("root", None), ("middle", "root"):
        certify(name, issuer, EC, "-addext", "basicConstraints=critical,CA:TRUE")
    for name, kind in ("one", EC), ("two", EC), ("rsa", ["rsa:2048"]):
        certify(name, "middle", kind)
        with open(f"{PEMS}{name}.pem", "a") as file, open(PEMS + "middle.pem") as chain:
            file.write(chain.read())

def context(*version):
    """Of a client that checks the chain, and takes an end without close_notify for an error."""
    made = ssl.create_default_context(cafile=PEMS + "root.pem")
    made.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF       # Python's own choice
    if version:
        made.minimum_version = made.maximum_version = version[0]
    return made

class TlsHost(Host):
    program = TLS

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
                raise
            except OSError:
                pass                                    # a reset is an end, too
        return answer

    def shown(self):
        """The name in the certificate that it shows."""
        with self.connect() as link:
            return dict(pair for (pair,) in link.getpeercert()["subject"])["commonName"]

class Lab(AnyLab):
    """One host, whose instance has the certificate `one`, as live.pem and live.key."""
    host_type = TlsHost

    def __init__(self, *options, start=True, expect=""):
        super().__init__(1, network=False, expect=expect)
        host = self.host = self.hosts[0]
        host.options += "-b", "none", "-C", self.path("live.pem"), "-K", self.path("live.key")
        host.tls = context()
        host.install("one")
        if start:
            host.start(*options)

def case_options():
    """bad options and files: the exit status, and one line that names it"""
    with Lab(start=False) as lab:
        for cert, key in (("none", "one.key"), ("one.pem", "none"), ("one.key", "one.key"),
                          ("one.pem", "one.pem"), ("one.pem", "two.key"),
                          ("one.pem", "rsa.key"), (".", "one.key")):
            said = lab.host.refuses("--cert", PEMS + cert, "--key", PEMS + key)
            check(PEMS + cert in said or PEMS + key in said, f"{cert}, {key}: {said}")
        if not mentions(CHAT, b"SSL_CTX_new"):
            lab.host.program = CHAT
            check("TLS=1" in lab.host.refuses(status=2), "it does not tell of TLS=1")

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

def case_slow():
    """who is blocked within a record, of messages with a pong between or of a file, loses nothing"""
    with tempfile.TemporaryDirectory() as folder, Lab("-d", folder) as lab:
        fast, data = lab.host.open(), os.urandom(5 << 20)
        Path(folder, "big.bin").write_bytes(data)
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
            check(lab.host.get("/big.bin") == data, f"{version.name}: differs")
            with lab.host.connect() as link:
                link.sendall(b"GET /big.bin HTTP/1.0\r\n\r\n")
                got, turn = b"", 0
                while piece := link.recv(1 + turn * 7919 % 30011):
                    got, turn = got + piece, turn + 1
            check(got.endswith(data), f"{version.name}, slowly: differs")

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
    with Lab(expect="|chat: .*live.key: .*(mismatch|certificate)") as lab:
        host, old = lab.host, lab.host.open()
        for told, shown, files in ((0, "two", ["two"]), (1, "two", ["one", "two"]),
                                   (2, "two", ["one", "rsa"]), (2, "one", ["one"])):
            host.install(*files)
            host.stranger(b"garbage")                   # whose errors are no reason for ours
            host.send_signal(signal.SIGHUP)
            lab.pump(lambda: host.said().count("live.pem") == told and host.shown() == shown, 5,
                     lambda: f"{files}: shows {host.shown()}, says {host.said()!r}", 0.02)
        old.send("still here")
        old.hears("still here")
        settle([old])

HALF_A_HELLO = b"\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03" + bytes(99)    # of 512 bytes

def case_strangers():
    """plain HTTP, garbage, odd hellos: an end, after 10 s if not at once; nobody else minds"""
    with Lab() as lab:
        other = lab.host.open()
        for data in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", bytes(5000), os.urandom(50000),
                     b"\x16\x03\x01\xff\xff" + bytes(70000), b"\x16\x03\x01\0\0",
                     b"\x80\x2e\x01\0\2", b"\x15\x03\x03\0\2\2\x28", HALF_A_HELLO,
                     HALF_A_HELLO + bytes(413)):
            answer = lab.host.stranger(data)
            check(b"HTTP" not in answer, f"{data[:30]!r}: {answer!r:.99}")
        begun = now()
        equal(lab.host.stranger(HALF_A_HELLO, end=False), b"", "the answer to half a handshake")
        check(9 < now() - begun < 15 * SLOWER, f"cut off after {now() - begun:.1f} s")
        other.send("still here")
        other.hears("still here")

def case_nats():
    """a NATS server that says nothing is left after 10 s; with another one no TLS is spoken"""
    with socket.create_server(("127.0.0.1", 0)) as server, \
            Lab(start=False, expect=r"|chat: (bus: cannot join|joined|lost) .*") as lab:
        server.settimeout(15 * SLOWER)
        lab.host.start("-b", "nats://127.0.0.1:%d" % server.getsockname()[1])
        with server.accept()[0], server.accept()[0] as link:    # the first one stays open
            link.sendall(b"INFO {}\r\n")
            equal(link.recv(8), b"CONNECT ", "what is said to it")
            link.sendall(b"PONG\r\n")
            lab.host.says("^chat: joined nats://")

def case_node():
    """Node's ws and fetch over wss and https"""
    with Lab() as lab:
        url = f"https://localhost:{lab.host.port}"
        clients.node(url, url, NODE_EXTRA_CA_CERTS=PEMS + "root.pem")

def case_chromium():
    """the page in Chromium: it connects by wss and shows the history"""
    chromium = shutil.which("chromium")
    if not chromium:
        raise Skip("no Chromium here")
    with Lab() as lab:
        lab.host.get("/send?message=hello%20Chromium")
        command = (chromium, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom",
                   "--ignore-certificate-errors", "--virtual-time-budget=10000",
                   "--user-data-dir=" + lab.path("chromium"), f"https://localhost:{lab.host.port}/")
        # Virtual time does not wait for a WebSocket, so on a busy machine it may take some looks.
        lab.pump(lambda: "hello Chromium" in run(*command), 30, "the history is not in the page")

if __name__ == "__main__":
    main("tls", (case_strangers, case_nats, case_chromium, case_node, case_records, case_options, case_slow,
                 case_close_notify, case_renewal), missing=missing)
