#!/usr/bin/python3
"""The NATS bus: proves that instances meet at the real nats-server (alone and in a cluster), that
other programs can talk with them there, and that no server, or one that is away, frozen or hostile,
disturbs the chat of an instance's own clients.

    test/nats.py [-l] [CASE...]      all cases, or those named (-l lists them)

Each server has an address of its own in 127/8. NATS_SERVER names the program.
"""
import sys
sys.dont_write_bytecode = True
import contextlib, json, os, random, re, shutil, signal, socket, threading
from urllib.parse import quote
from harness import (MESSAGE, SANITIZED, SLOWER, Client, Lab as AnyLab, check, equal, frame, main,
                     message, now, settle)

NATS = os.environ.get("NATS_SERVER") or shutil.which(
    "nats-server", path=os.environ["PATH"] + ":/usr/sbin:/usr/local/bin")
JOINED = r"|chat: (joined|lost) nats://[^@ ]+$"
ODD = r"|chat: bus: [ -~]{1,400} \(\d+ so far\)$|chat: [ -~]*nats://[^@]*$"


class Lab(AnyLab):
    """Hosts on this machine. No secret may stand in what an instance says."""
    secrets = ()

    def __init__(self, hosts=2, expect=JOINED):
        super().__init__(hosts, network=False, expect=expect)

    def examine(self, number, program):
        yield from super().examine(number, program)
        if any(secret in program.said() for secret in self.secrets):
            yield "a secret was told"

    def join(self, *urls):
        """Starts an instance on each host and waits until it has joined; returns the hosts."""
        for host, url in zip(self.hosts, urls * len(self.hosts)):
            host.start("-b", url)
            joined(host)
        return self.hosts


class Lossy(Client):
    """One that may miss messages, and counts the `gaps`; but none may come twice or too late."""
    gaps = 0

    def on_message(self, payload, opcode):
        if start := MESSAGE.match(payload):
            missed = max(int(start[2]) - self.next.get(start[1], 0), 0)
            self.gaps += missed
            self.next[start[1]] = self.next.get(start[1], 0) + missed
        super().on_message(payload, opcode)


def joined(host, times=1, seconds=15):
    host.says("(?s)" + "(chat: joined nats://.*?)" * times, seconds)


def flows(lab, one, two):
    """Waits until what `one` posts reaches `two` (again)."""
    due = len(one.sent_at)

    def reached():
        one.post(len(one.sent_at))
        return two.next.get(one.name, 0) > due
    lab.pump(reached, 20, lambda: f"it does not flow: {two.next}", 0.1)


def errors(host):
    """The counts in what it has told of errors on the bus."""
    return [int(n) for n in re.findall(r"chat: bus: .*\((\d+) so far\)", host.said())]


def own_address():
    """An address of this machine's loopback that nobody else uses, and a free port there."""
    numbers = (random.randrange(1, 255) for _ in range(3))
    with socket.create_server(("127.%d.%d.%d" % (*numbers,), 0)) as probe:
        return probe.getsockname()


class Server:
    """A nats-server."""
    def __init__(self, lab, config="", at=None, start=True):
        self.lab, self.at = lab, at or own_address()
        self.url = "nats://%s:%d" % self.at
        if start:
            self.start(config)

    def login(self, credentials):
        return self.url.replace("//", f"//{credentials}@")

    def start(self, config=""):
        file = self.lab.write(f"nats.{len(self.lab.programs)}",
                              f'listen: "{self.at[0]}:{self.at[1]}"\n{config}\n')
        self.program = self.lab.spawn(NATS, "-c", file)

        def greets():
            check(self.program.process.poll() is None, self.program.said)
            with contextlib.suppress(OSError), socket.create_connection(self.at, 5) as link:
                return link.recv(5) == b"INFO "
        self.lab.pump(greets, 15, "nats-server does not start", 0.01)

    def stop(self):
        self.program.stop(signal.SIGKILL)


class Raw:
    """A NATS client that is no chat, as `nats pub` and `nats sub` are."""
    def __init__(self, server, *subjects):
        self.socket = socket.create_connection(server.at, 10)
        self.file = self.socket.makefile("rb")
        check(self.file.readline().startswith(b"INFO "), "no INFO")
        self.say(b'CONNECT {"verbose":false,"headers":true,"protocol":1}',
                 *(b"SUB %s %d" % (subject, n) for n, subject in enumerate(subjects)), b"PING")
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


class Fake(threading.Thread):
    """A server that greets as it should, and then says what a case wants. `got` is what it was told
    on the connection that it has now, `count` how many there were."""
    def __init__(self):
        super().__init__(daemon=True)
        self.link, self.count = None, 0
        self.got, self.socket = bytearray(), socket.create_server(own_address())
        self.url = "nats://%s:%d" % self.socket.getsockname()
        self.start()

    def run(self):
        while link := self.socket.accept()[0]:
            self.got.clear()
            self.link, self.count = link, self.count + 1
            self.send(INFO, 7)
            with contextlib.suppress(OSError):
                while data := link.recv(1 << 16):
                    before = max(0, len(self.got) - 5)
                    self.got += data
                    self.send(b"PONG\r\n" * self.got.count(b"PING\r\n", before))

    def send(self, data, step=1 << 20):
        with contextlib.suppress(OSError):              # it may hang up: the case will see
            for at in range(0, len(data), step):
                self.link.sendall(data[at:at + step])

    def hang_up(self):
        with contextlib.suppress(OSError):
            self.link.shutdown(socket.SHUT_RDWR)


# --- with the real server -------------------------------------------------------------------------

def case_cluster():
    """three instances at a cluster of two servers post 2,000 messages each: in order, once, all"""
    with Lab(3) as lab:
        routes = [own_address() for _ in range(2)]
        config = 'cluster { name: c, listen: "%s:%d", routes: ["nats://%s:%d"] }'
        urls = [Server(lab, config % (*routes[i], *routes[1 - i])).url for i in range(2)]

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


NAMES = ("", " ", "a b", "\r\n", "x\r\nPUB chat.text 1\r\nx", "*", ">", ".", "..", "a.b", ".a", "%",
         "%41", "%2E", "/", "_INBOX.x", "\t", "\x7f", "\"{}\\", "text", "A-Za_z0", "über", "\u2028",
         "$SYS.>", "\U0001f600" * 16, "x" * 64, "%" * 64, "." * 64, "+", "&=?#")


def subject(kind, name):
    escaped = re.sub(rb"[^A-Za-z0-9_-]", lambda c: b"%%%02X" % c[0][0], name.encode())
    return b"chat." + kind + (b"." + escaped if name else b"")


def case_names():
    """odd channel names: escaped in the subject, and none leaks into another"""
    with Lab() as lab:
        server = Server(lab)
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
        server = Server(lab)
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
    """a user's password, also percent-encoded: let in, and told neither by the log nor by `ps`"""
    odd = "p@s:s%w/ü\"\\#?"
    users = json.dumps([{"user": "ann", "password": "hunter-two"},
                        {"user": "a:n n", "password": odd}], ensure_ascii=False)
    with Lab(1) as lab:
        lab.secrets = "hunter-two", odd, quote(odd, safe="")
        server = Server(lab, "authorization { users: %s }" % users)
        for credentials in "ann:hunter-two", f"a%3an%20n:{quote(odd, safe='')}":
            host = lab.join(server.login(credentials))[0]
            with open(f"/proc/{host.chat.process.pid}/cmdline") as file:
                shown = file.read()
            check(not any(secret in shown for secret in lab.secrets), f"`ps` shows {shown!r}")


def case_wrong_password():
    """a wrong password: said, but not printed; the chat works alone, and joins when it is right"""
    with Lab(2, ODD) as lab:
        lab.secrets, config = ["wrong-secret"], 'authorization { user: "ann", password: "%s" }'
        server = Server(lab, config % "hunter-two")
        for host, credentials in zip(lab.hosts, ("ann", "ann:wrong-secret")):
            host.start("-b", server.login(credentials))
            host.says("(?i)authorization")
            check("joined" not in host.said(), "it claims to be joined")
            client = Client(host)
            client.post(0)
            lab.everything([client], {client.name: 1}, 5)
        server.stop()
        server.start(config % "wrong-secret")
        joined(lab.hosts[1])


def case_bad_urls():
    """a bad URL: one line, without the password, and exit 2, or 1 if the resolver refuses it"""
    with Lab(1) as lab:
        lab.secrets = ["hunter-two"]
        for url, status in (("ann:hunter-two%4@127.0.0.1", 2), ("ann:hunter-two@127.0.0.1:x", 2),
                            ("ann:hunter-two@", 1), ("ann:hunter-two@no.such.invalid", 1)):
            lab.hosts[0].refuses("-b", "nats://" + url, status=status)


def case_localhost():
    """nats://localhost finds a server that listens at 127.0.0.1 alone"""
    with Lab(1, ODD) as lab:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            at = probe.getsockname()
        lab.join(Server(lab, at=at).url.replace("127.0.0.1", "localhost"))


def case_late():
    """no server at the start: the chat works alone after 2 s, does not spin, and joins later"""
    with Lab(2, ODD) as lab:
        server = Server(lab, start=False)
        for host in lab.hosts:
            host.start("-b", server.url)
        one, two = clients = [Lossy(host) for host in lab.hosts]
        for c in clients:
            c.post(0)
        lab.pump(lambda: one.count and two.count, 5, "the chat does not work alone")
        before = lab.hosts[0].cpu()
        lab.wait(1.5)
        spent = lab.hosts[0].cpu() - before
        check(spent < 0.3 * SLOWER, f"{spent:.2f} s of CPU time in 1.5 s without a server")
        server.start()
        for host in lab.hosts:
            joined(host)
        flows(lab, one, two)
        flows(lab, two, one)
        settle(clients)


def case_away():
    """the server goes: told, and what is posted is counted; it comes: all flows, in order, once"""
    with Lab(2, ODD) as lab:
        server = Server(lab)
        a, b = lab.join(server.url)
        one, two = Lossy(a), Lossy(b)
        for number in range(10):
            one.post(number)
        lab.everything([one, two], {b"1": 10}, 10)
        server.stop()
        a.says("(?i)lost|refused|closed|reset")
        before = (errors(a) or [0])[-1]
        for number in range(10, 110):
            one.post(number, 3000)
        lab.pump(lambda: one.count == 110, 5, "the local chat stands still")
        lab.wait(10.5)                                  # one such line in 10 s
        one.post(110)
        lab.pump(lambda: errors(a) and errors(a)[-1] >= before + 101, 5,
                 lambda: f"not all that is dropped is counted: {a.said()!r}")
        for times in 2, 3:                              # the third time, amid traffic
            server.start()
            joined(a, times)
            joined(b, times)
            lab.timers.clear()
            flows(lab, one, two)
            if times == 2:
                equal(two.gaps, 101, "messages that did not arrive")
                for c in one, two:
                    lab.talk(c, 300, now() + 3600, 2000)
                lab.wait(0.5)
                server.stop()
        for c in one, two:
            c.post(len(c.sent_at))
        due = {c.name: len(c.sent_at) for c in (one, two)}
        lab.pump(lambda: one.next == two.next == due, 10,
                 lambda: f"the last ones are missing: {one.next}, {two.next}, not {due}")
        settle([one, two])


def case_frozen():
    """a server freezes: the local chat goes on in bounded memory; it thaws: all flows again"""
    with Lab(2, ODD) as lab:
        server = Server(lab)
        a, b = lab.join(server.url)
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
        return f"{two.gaps} of {many} did not arrive, memory grew by {grown:.0f} MB"


def case_stop():
    """who stops sends what its clients have said before"""
    with Lab() as lab:
        a, b = lab.join(Server(lab).url)
        one, two = Client(a), Client(b)
        one.out += b"".join(frame(message(b"1", number)) for number in range(2000))
        one.write()
        lab.pump(lambda: one.count == 2000, 10, "its own echo is missing")
        equal(a.stop(), 0, "status")
        lab.everything([two], {b"1": 2000}, 10)


def case_slow():
    """one who reads nothing is cut off, and holds up no other channel for longer"""
    with Lab(2, JOINED + "|chat: .*slow client") as lab:
        a, b = lab.join(Server(lab).url)
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

def garbage(seed):
    pick = random.Random(seed)
    return b"".join(pick.choice((pick.randbytes(pick.randrange(200)), b"\r\n", b"abc\r\n", b"MSG ",
                                 b"MSG chat.text.r 1 3\r\n", b"-ERR '", b" 1 ", b"chat.", b"text",
                                 b"INFO {", b"99", b"PING\r\n")) for _ in range(60))


# What a server may say to an instance that it has let in: a name, the bytes, the messages that must
# arrive on channel h (None: any), how many bytes at a time. Whatever it was, the next connection
# must work as if nothing had been.
MSG, X, BIG = b"MSG chat.text.h 1 ", b"MSG chat.text.h 1 1\r\nx\r\n", 1 << 20
HOSTILE = (
    ("single_bytes", X + b"PING\r\n" + MSG + b"0\r\n\r\n", ["x", ""], 1),
    ("split", X * 500, ["x"] * 500, 97),
    ("at_once", X * 20000, ["x"] * 20000, BIG),
    ("PINGs", b"PING\r\n" * 20000 + X, ["x"], BIG),
    ("half_a_line", b"MSG chat.te", [], BIG),
    ("wrong_end", MSG + b"5\r\nhelloXX" + X, None, BIG),
    ("endless_line", b"A" * (16 << 20), [], BIG),
    ("endless_MSG", b"MSG " + b"A" * 300000, [], BIG),
    ("huge", MSG + b"33554432\r\n" + b"\xff" * 33554432 + b"\r\n", [], BIG),
    ("size_beyond_64_bits", MSG + b"99999999999999999999\r\n", [], BIG),
    ("size_negative", MSG + b"-1\r\n", [], BIG),
    ("size_missing", MSG + b"\r\n", None, BIG),
    ("other_subject", b"MSG other.text.h 1 5\r\nhello\r\n" + X, ["x"], BIG),
    ("NUL", b"MSG chat.text.h\0 1 5\r\nhello\r\n", None, BIG),
    ("escapes", b"-ERR '\x1b[31m\x07\x7f\x9b\xff\n\rchat: joined nats://evil'\r\n" + X, ["x"], BIG),
    ("long_error", b"-ERR '" + b"long " * 6000 + b"'\r\n" + X, ["x"], BIG),
    ("empty_lines", b"\r\n" * 1000 + X, ["x"], BIG),
    ("INFO_again", INFO * 1000 + b"INFO \r\nINFO {}\r\nINFO {\"max\r\n" + X, ["x"], BIG),
    *((f"garbage{seed}", garbage(seed), None, (BIG, 7)[seed % 2]) for seed in range(6)),
)


def hostile(name, data, expected, step):
    def case():
        with Lab(1, ODD) as lab:
            fake = Fake()
            host = lab.join(fake.url)[0]
            client, before = Client(host, "/?channel=h"), host.memory("VmHWM")
            due = [*(expected or []), "still here"]
            fake.send(data, step)
            lab.pump(lambda: len(client.others) >= len(due) - 1, 10,
                     lambda: f"heard {client.others!r:.200}")
            client.send("still here")
            lab.pump(lambda: "still here" in client.others, 10,
                     lambda: f"heard {client.others!r:.200}")
            check(expected is None or client.others == due, f"heard {client.others!r:.200}")
            pings = 0 if expected is None else data.count(b"PING\r\n")
            lab.pump(lambda: fake.got.count(b"PONG\r\n") >= pings, 10, "not all PINGs are answered")
            if fake.count == 1:
                fake.hang_up()
            lab.pump(lambda: fake.count > 1 and b"PING\r\n" in fake.got, 25, "no new connection")
            client.others.clear()
            fake.send(MSG + b"3\r\nend\r\n")
            client.hears("end")
            client.send("a word")
            lab.pump(lambda: b"PUB chat.text.h 6\r\na word\r\n" in fake.got, 5, "it posts nothing")
            grown = host.memory("VmHWM") - before
            check(SANITIZED or grown < 8, f"memory grew by {grown:.0f} MB")
            settle([client])
    case.__name__, case.__doc__ = f"case_{name}", "a hostile server; the next connection works"
    return case


if __name__ == "__main__":
    main("nats", (case_away, case_outside, case_frozen, case_cluster, case_late, case_password,
                  case_wrong_password, case_slow, case_names, case_bad_urls, case_localhost,
                  case_stop, *(hostile(*row) for row in HOSTILE)),
         at_once=6, missing=lambda: None if NATS else "no nats-server here")
