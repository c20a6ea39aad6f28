#!/usr/bin/python3
"""The NATS bus: proves that instances meet at the real nats-server (alone and in a cluster), that
other programs can talk with them there, and that no server, or one that is away, frozen or hostile,
disturbs the chat of an instance's own clients.

    test/nats.py [-l] [CASE...]      all cases, or those named (-l lists them)

Each server has an address of its own in 127/8. NATS_SERVER names the program.
"""
import sys
sys.dont_write_bytecode = True
import contextlib, json, os, random, re, shutil, signal, socket
from pathlib import Path
from urllib.parse import quote
from harness import (MESSAGE, SANITIZED, SLOWER, Client, Lab as AnyLab, check, equal, frame, main,
                     message, now, settle)

NATS = os.environ.get("NATS_SERVER") or shutil.which(
    "nats-server", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/bin")
JOINED = r"|chat: (joined|lost) nats://[^@ ]+$"
ODD = r"|chat: bus: [ -~]{1,400} \(\d+ so far\)$|chat: [ -~]*nats://[^@]*$"

class Lab(AnyLab):
    def __init__(self, hosts=2, expect=JOINED):
        super().__init__(hosts, network=False, expect=expect)

    def join(self, *urls):
        """Starts an instance on each host and waits until it has joined; returns the hosts."""
        for host, url in zip(self.hosts, urls * len(self.hosts)):
            host.start("-b", url)
            joined(host)
        return self.hosts

class Lossy(Client):
    """One that may miss messages; but none may come twice or too late."""
    def on_message(self, payload, opcode):
        if start := MESSAGE.match(payload):
            self.next[start[1]] = max(self.next.get(start[1], 0), int(start[2]))
        super().on_message(payload, opcode)

    def missed(self):
        return sum(self.next.values()) - self.count

def joined(host, times=1):
    host.says("(?s)" + "(chat: joined nats://.*?)" * times, 15)

def flows(lab, one, two):
    """Waits until what `one` posts reaches `two` (again)."""
    due = len(one.sent_at)

    def reached():
        one.post(len(one.sent_at))
        return two.next.get(one.name, 0) > due
    lab.pump(reached, 20, lambda: f"it does not flow: {two.next}", 0.1)

def errors(host):
    """The counts in what it has told of errors on the bus; it does so once in 10 s."""
    return [int(n) for n in re.findall(r"chat: bus: .*\((\d+) so far\)", host.said())]

def own_address(host=None):
    """A free port, at an address of this machine's loopback that nobody else uses."""
    host = host or "127.%d.%d.%d" % (*(random.randrange(1, 255) for _ in range(3)),)
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()

class Server:
    """A nats-server."""
    def __init__(self, lab, config="", at=None):
        self.lab, self.at, self.config = lab, at or own_address(), config
        self.url = "nats://%s:%d" % self.at

    def start(self):
        file = self.lab.write(f"nats.{len(self.lab.programs)}",
                              f'listen: "{self.at[0]}:{self.at[1]}"\n{self.config}\n')
        self.program = self.lab.spawn(NATS, "-c", file)

        def greets():
            check(self.program.process.poll() is None, self.program.said)
            with contextlib.suppress(OSError), socket.create_connection(self.at, 5) as link:
                return link.recv(5) == b"INFO "
        self.lab.pump(greets, 15, "nats-server does not start", 0.01)
        return self

class Raw:
    """A NATS client that is no chat, as `nats pub` and `nats sub` are."""
    def __init__(self, server, subject):
        self.socket = socket.create_connection(server.at, 10)
        self.file = self.socket.makefile("rb")
        check(self.file.readline().startswith(b"INFO "), "no INFO")
        self.say(b'CONNECT {"verbose":false,"headers":true,"protocol":1}', b"SUB %s 1" % subject,
                 b"PING")
        equal(self.file.readline(), b"PONG\r\n", "answer to PING")

    def say(self, *lines):
        self.socket.sendall(b"".join(line + b"\r\n" for line in lines))

    def publish(self, subject, payload, reply=b""):
        self.say(b"PUB %s %s%d" % (subject, reply, len(payload)), payload)

    def next(self):
        """The next message: its subject and payload."""
        words = self.file.readline().split()
        while words == [b"PING"]:
            self.say(b"PONG")
            words = self.file.readline().split()
        check(words[:1] == [b"MSG"], f"not a message: {words}")
        return words[1], self.file.read(int(words[-1]) + 2)[:-2]

INFO = b'INFO {"server_id":"FAKE","version":"2.9.10","proto":1,"max_payload":1048576}\r\n'

class Fake:
    """A server that greets as it should, and then says what a case wants. `got`: what it hears."""
    def __init__(self):
        self.socket = socket.create_server(own_address())
        self.socket.settimeout(25 * SLOWER)
        self.url = "nats://%s:%d" % self.socket.getsockname()

    def greet(self):
        """Lets in who comes (again)."""
        self.link, self.got = self.socket.accept()[0], b""
        self.link.settimeout(10 * SLOWER)
        self.send(INFO, 7)
        self.hears(b"PING\r\n")
        self.send(b"PONG\r\n")

    def hears(self, text, times=1):
        while self.got.count(text) < times:
            piece = self.link.recv(1 << 16)
            check(piece, f"the connection ends without {text}")
            self.got += piece

    def send(self, data, step=1 << 20):
        with contextlib.suppress(OSError):              # it may hang up: the case will see
            for at in range(0, len(data), step):
                self.link.sendall(data[at:at + step])

# --- with the real server -------------------------------------------------------------------------

def case_cluster():
    """three at a cluster of two post 2,000 messages each: all in order, once, also from who stops"""
    with Lab(3) as lab:
        routes = [own_address() for _ in range(2)]
        config = 'cluster { name: c, listen: "%s:%d", routes: ["nats://%s:%d"] }'
        urls = [Server(lab, config % (*routes[i], *routes[1 - i])).start().url for i in range(2)]

        def met():                                      # that somebody subscribes is known later
            for host in lab.hosts:
                host.get(f"/send?channel=hello&message={host.number}")
            return all(len(set(host.history("hello"))) == 3 for host in lab.hosts)
        lab.join(urls[0], *urls)
        lab.pump(met, 15, "the instances do not meet", 0.05)
        clients = [Client(host) for host in lab.hosts]
        for c in clients:
            c.out += b"".join(frame(message(c.name, n, 0 if n % 100 else 60000))
                              for n in range(2000))
            c.write()
        lab.everything(clients, {c.name: 2000 for c in clients}, 60)
        last = clients.pop()
        last.out += b"".join(frame(message(last.name, n)) for n in range(2000, 4000))
        last.write()
        lab.pump(lambda: last.next[last.name] == 4000, 10, "its own echo is missing")
        equal(last.host.stop(), 0, "status")
        lab.everything(clients, {b"1": 2000, b"2": 2000, last.name: 4000}, 10)

NAMES = ("", " ", "a b", "\r\n", "x\r\nPUB chat.text 1\r\nx", "*", ">", ".", "..", "a.b", ".a", "%",
         "%41", "%2E", "/", "_INBOX.x", "\t", "\x7f", "\"{}\\", "text", "A-Za_z0", "über", "\u2028",
         "$SYS.>", "\U0001f600" * 16, "x" * 64, "%" * 64, "." * 64, "+", "&=?#")

def subject(kind, name):
    escaped = re.sub(rb"[^A-Za-z0-9_-]", lambda c: b"%%%02X" % c[0][0], name.encode())
    return b"chat." + kind + (b"." + escaped if name else b"")

def case_names():
    """odd channel names: escaped in the subject, and none leaks into another"""
    with Lab() as lab:
        server = Server(lab).start()
        hosts, spy = lab.join(server.url), Raw(server, b">")
        for name in NAMES:
            one, two = (Client(host, "/?channel=" + quote(name, safe="")) for host in hosts)
            one.send("1" + name)
            two.hears("1" + name)
            two.send("2" + name, 2)
            one.hears("1" + name, b"2" + name.encode())
            for kind, payload in (b"text", "1" + name), (b"binary", "2" + name):
                equal(spy.next(), (subject(kind, name), payload.encode()), "what the server hears")
            check(not two.others[1:], f"channel {name!r} also has {two.others}")
            lab.hang_up()

EARTH = b"chat.text.earth"
BAD = ((EARTH, b"x" * 64001), (EARTH, b"\xff"), (EARTH, b"\xed\xa0\x80"), (EARTH + b"%", b"x"),
       (b"chat.binary.earth", b"x" * 500000), (EARTH + b"%4", b"x"), (b"chat.text.%GG", b"x"),
       (b"chat.text.%FF", b"x"), (b"chat.text.\xff", b"x"), (b"chat.text.%00", b"x"),
       (b"chat.text." + b"x" * 65, b"x"), (b"chat.text." + b"%41" * 65, b"x"),
       (b"chat.texts", b"x"), (b"chat.other.earth", b"x"), (b"chat.TEXT.earth", b"x"),
       (EARTH + b"x" * 3000, b"x"))
GOOD = ((EARTH, b"hi"), (b"chat.text.%65%61rth", b"x" * 64000), (EARTH, b""))

def case_outside():
    """other programs: hear messages as they are, theirs are delivered; bad ones are counted"""
    with Lab(1, ODD) as lab:
        server = Server(lab).start()
        host, raw = lab.join(server.url)[0], Raw(server, b"chat.text.>")
        earth, nameless = Client(host, "/?channel=earth"), Client(host)
        earth.send("grüß\r\neuch")
        equal(raw.next(), (EARTH, "grüß\r\neuch".encode()), "what a subscriber hears")
        earth.hear()
        for name, payload in BAD:
            raw.publish(name, payload)
        for name, payload in GOOD:
            raw.publish(name, payload, b"_INBOX.reply ")
        raw.say(b"HPUB chat.text.earth 22 26", b"NATS/1.0\r\nBar: Baz\r\n\r\nwith")
        raw.publish(b"chat.binary.earth", b"\xff")
        raw.publish(b"chat.text", b"nameless")
        raw.publish(b"other", b"x")
        earth.hears(*(payload.decode() for _, payload in GOOD), "with", b"\xff")
        nameless.hears("nameless")
        equal(errors(host), [1], "counts told at once")
        lab.wait(10.5)                                  # one such line in 10 s
        raw.publish(b"chat.other", b"x")
        lab.pump(lambda: len(errors(host)) > 1, 5, "the next bad message is not told")
        equal(errors(host), [1, len(BAD) + 1], "counts told")
        settle([earth, nameless])

def case_password():
    """passwords, also percent-encoded, are shown nowhere; with a wrong one the chat works alone"""
    odd = "p@s:s%w/ü\"\\#?"
    secrets = "hunter-two", "wrong-secret", odd, quote(odd, safe="")
    users = ('authorization { users: '
             '[{ user: ann, password: "%s" }, { user: "a:n n", password: %s }] }')
    with Lab(4, ODD) as lab:
        server = Server(lab, users % (secrets[0], json.dumps(odd, ensure_ascii=False))).start()
        logins = "ann:wrong-secret", "ann", "ann:hunter-two", "a%3an%20n:" + secrets[3]
        for host, login in zip(lab.hosts, logins):
            host.start("-b", server.url.replace("//", f"//{login}@"))
        for host in lab.hosts[:2]:
            host.says("(?i)authorization")
            check("joined" not in host.said(), "it claims to be joined")
            client = Client(host)
            client.post(0)
            lab.everything([client])
        for host in lab.hosts[2:]:
            joined(host)
        server.program.stop(signal.SIGKILL)
        server.config = users % ("wrong-secret", '""')
        server.start()
        joined(lab.hosts[0])
        for host in lab.hosts:
            shown = Path(f"/proc/{host.chat.process.pid}/cmdline").read_text() + host.said()
            check(not any(secret in shown for secret in secrets), f"it shows {shown!r}")
        for url, status in (("ann:hunter-two%4@127.0.0.1", 2), ("ann:hunter-two@127.0.0.1:x", 2),
                            ("ann:hunter-two@", 1), ("ann:hunter-two@no.such.invalid", 1)):
            said = lab.add_host().refuses("-b", "nats://" + url, status=status)
            check("hunter-two" not in said, said)

def case_away():
    """no server: the chat works alone and counts drops; one comes, dies, comes again: all flows"""
    with Lab(2, ODD) as lab:
        server = Server(lab)
        for host in lab.hosts:
            host.start("-b", server.url)
        one, two = clients = [Lossy(host) for host in lab.hosts]
        for number in range(100):
            one.post(number, 3000)
        lab.pump(lambda: one.count == 100, 5, "the chat does not work alone")
        a, before = lab.hosts[0], lab.hosts[0].cpu()
        lab.wait(10.5)                                  # one line about drops in 10 s
        spent = a.cpu() - before
        check(spent < 0.3 * SLOWER, f"{spent:.2f} s of CPU time in 10 s without a server")
        one.post(100)
        lab.pump(lambda: len(errors(a)) > 1, 5, "what is dropped is not counted")
        check(errors(a)[-1] >= 101, f"counted: {errors(a)}")    # failures to join, too
        for times in 1, 2:
            server.start()
            for host in lab.hosts:
                joined(host, times)
            lab.timers.clear()
            flows(lab, one, two)
            flows(lab, two, one)
            if times == 1:
                equal(two.missed(), 101, "messages that did not arrive")
                for c in clients:
                    lab.talk(c, 300, now() + 3600, 2000)
                lab.wait(0.5)
                server.program.stop(signal.SIGKILL)
                a.says("chat: lost nats://")
        for c in clients:
            c.post(len(c.sent_at))
        due = {c.name: len(c.sent_at) for c in clients}
        lab.pump(lambda: one.next == two.next == due, 10,
                 lambda: f"the last ones are missing: {one.next}, {two.next}, not {due}")
        settle(clients)

def case_frozen():
    """a server freezes: the local chat goes on in bounded memory; it thaws: all flows again"""
    with Lab(2, ODD) as lab:
        server = Server(lab, at=own_address("127.0.0.1")).start()
        a, b = lab.join(server.url.replace("127.0.0.1", "localhost"))   # may be ::1, too
        one, two, many = Client(a), Lossy(b), 500
        one.post(0)
        lab.everything([one, two], {b"1": 1}, 10)
        before = a.memory("VmHWM")
        server.program.process.send_signal(signal.SIGSTOP)
        for number in range(1, many):
            one.post(number, 60000)
        lab.pump(lambda: one.count == many, 20, lambda: f"the chat stands still at {one.count}")
        check(errors(a), "no message was counted as dropped")
        grown = a.memory("VmHWM") - before
        check(SANITIZED or grown < 12, f"memory grew by {grown:.0f} MB")
        server.program.process.send_signal(signal.SIGCONT)
        flows(lab, one, two)
        settle([one, two])
        return f"{two.missed()} of {many} did not arrive, memory grew by {grown:.0f} MB"

def case_slow():
    """one who reads nothing is cut off, and holds up no other channel for longer"""
    with Lab(2, JOINED + "|chat: .*slow client") as lab:
        a, b = lab.join(Server(lab).start().url)
        busy, lazy = (Client(host, "/?channel=busy", name=b"busy") for host in (a, b))
        lazy.listen(False)
        for number in range(100):
            busy.post(number, 60000)
        one, two = Client(a), Client(b)
        lab.talk(one, 50, now() + 2)
        lab.pump(lambda: not lab.timers, 10, "the talk does not end")
        lab.everything([one, two], {b"1": len(one.sent_at)}, 10)
        b.says("slow client")
        lab.everything([busy], {b"busy": 100}, 10)

# --- with a fake one -----------------------------------------------------------------------------

# What a server may say to an instance that it has let in: a name, the bytes, the messages that must
# arrive on channel h (None: any), how many bytes at a time. Whatever it was, the next connection
# must work as if nothing had been.
MSG, X, BIG = b"MSG chat.text.h 1 ", b"MSG chat.text.h 1 1\r\nx\r\n", 1 << 20
HOSTILE = (
    ("single_bytes", X + b"PING\r\n" + MSG + b"0\r\n\r\n", ["x", ""], 1),
    ("at_once", X * 20000, ["x"] * 20000, BIG),
    ("PINGs", b"PING\r\n" * 20000 + X, ["x"], BIG),
    ("wrong_end", MSG + b"5\r\nhelloXX" + X, None, BIG),
    ("endless_line", b"A" * (16 << 20), [], BIG),
    ("huge", MSG + b"33554432\r\n" + b"\xff" * 33554432 + b"\r\n", [], BIG),
    ("size_beyond_64_bits", MSG + b"99999999999999999999\r\n", [], BIG),
    ("size_missing", MSG + b"\r\n", None, BIG),
    ("other_subject", b"MSG other.text.h 1 5\r\nhello\r\n" + X, ["x"], BIG),
    ("NUL", b"MSG chat.text.h\0 1 5\r\nhello\r\n", None, BIG),
    ("escapes", b"-ERR '\x1b[31m\x07\x7f\x9b\xff\n\rchat: joined nats://evil'\r\n" + X, ["x"], BIG),
    ("long_error", b"-ERR '" + b"long " * 6000 + b"'\r\n" + X, ["x"], BIG),
    ("empty_lines", b"\r\n" * 1000 + X, ["x"], BIG),
    ("INFO_again", INFO * 1000 + b"INFO \r\nINFO {}\r\nINFO {\"max\r\n" + X, ["x"], BIG),
)

def hostile(name, data, expected, step):
    def case():
        with Lab(1, ODD) as lab:
            fake, host = Fake(), lab.hosts[0]
            host.start("-b", fake.url)
            fake.greet()
            joined(host)
            client, before = Client(host, "/?channel=h"), host.memory("VmHWM")
            heard, due = client.others, [*(expected or []), "still here"]
            fake.send(data, step)
            lab.pump(lambda: len(heard) >= len(due) - 1, 10, lambda: f"heard {heard!r:.200}")
            client.send("still here")
            lab.pump(lambda: "still here" in heard, 10, lambda: f"heard {heard!r:.200}")
            check(expected is None or heard == due, f"heard {heard!r:.200}")
            if expected is not None:
                fake.hears(b"PONG\r\n", data.count(b"PING\r\n"))
            fake.link.close()
            fake.greet()
            heard.clear()
            fake.send(MSG + b"3\r\nend\r\n")
            client.hears("end")
            client.send("a word")
            fake.hears(b"PUB chat.text.h 6\r\na word\r\n")
            grown = host.memory("VmHWM") - before
            check(SANITIZED or grown < 8, f"memory grew by {grown:.0f} MB")
            settle([client])
    case.__name__, case.__doc__ = f"case_{name}", "a hostile server; the next connection works"
    return case

if __name__ == "__main__":
    main("nats", (case_away, case_outside, case_frozen, case_cluster, case_password, case_slow,
                  case_names, *(hostile(*row) for row in HOSTILE)),
         at_once=6, missing=lambda: None if NATS else "no nats-server here")
