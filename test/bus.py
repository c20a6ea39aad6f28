#!/usr/bin/python3 -B
"""Proves what is promised of the bus, between hosts that lose datagrams, freeze, die, are lied to.
Each host is a network namespace (see harness.py); each case has hosts of its own.

    test/bus.py [CASE...]       all cases, or those named (-l lists them)
    test/bus.py --bench         datagrams a message, latency, and messages/s between two instances

LONG=1 makes the flood longer, KEEP=1 shows what the instances said. Needs ip, nft, unshare, and
root or a user namespace, else all is skipped.
"""
import contextlib, hashlib, hmac
from harness import *

GROUP, PORT, DATAGRAM_MAX = "239.255.80.80", 8081, 1200
ERROR = r"|chat: bus: .+ \(\d+ so far\)$"               # told at most once in 10 s
LOST = r"|chat: lost \d+ messages of peer \w{16}$"
STUCK = r"|chat: .*no progress"
COUNTERS = f"""table inet count {{
    counter sent {{}}; counter big {{}}
    chain out {{ type filter hook output priority -10
        oifname "eth0" udp dport {PORT} counter name sent
        oifname "eth0" udp dport {PORT} udp length > {DATAGRAM_MAX + 8} counter name big
        oifname "eth0" ip frag-off & 0x3fff != 0 counter name big; }}; }}
"""
FILTER = f"""table inet bus {{}}; delete table inet bus; table inet bus {{
    chain in {{ type filter hook input priority 0; iifname "eth0" udp dport {PORT} %s; }};
    chain out {{ type filter hook output priority 0; oifname "eth0" udp dport {PORT} %s; }}; }}
"""
NO_DATA = "@th,224,8 1 drop"                            # the kind is a datagram's byte 20

class BusHost(Host):
    def begin(self, *options, bus=None, **more):
        """`bus`: other options than those for a bus on eth0 with the lab's secret."""
        bus = ("-i", "eth0", "-s", self.lab.path("secret")) if bus is None else bus
        return super().begin(*bus, *options, **more)

    def filter(self, loss=0, rule=None, cut=False):
        """The bus loses `loss` percent of what arrives, or by an nft rule, or all both ways."""
        rule = "drop" if cut else rule or f"numgen random mod 100 < {loss} drop" * (loss > 0)
        with self:
            run("nft", "-f", "-", text=FILTER % (rule or "accept", "drop" if cut else "accept"))

    def sent(self, what="packets", counter="sent"):
        """How many datagrams the host has sent on eth0, or "bytes" (with IP and UDP headers)."""
        with self:
            listed = run("nft", "list", "counter", "inet", "count", counter)
        return int(re.search(rf"{what} (\d+)", listed)[1])

    def read(self):
        """How many datagrams the instance has read."""
        snmp = Path(f"/proc/{self.chat.process.pid}/net/snmp").read_text()
        names, values = (line.split() for line in snmp.splitlines() if line.startswith("Udp:"))
        return int(values[names.index("InDatagrams")])

    def unplug(self):
        with self:
            run("ip", "link", "del", "eth0")

    def lines(self, channel=""):
        """What the channel remembers, binary messages as bytes."""
        return [base64.b64decode(line["base64"]) if isinstance(line, dict) else line
                for line in self.history(channel)]

class BusLab(Lab):
    """Whatever happens, no datagram may be larger than DATAGRAM_MAX, or go in fragments."""
    host_type = BusHost

    def __init__(self, hosts=3, loss=0, expect=""):
        super().__init__(hosts, expect=expect)
        for host in self.hosts:
            with host:
                run("ip", "link", "set", "eth0", "mtu", "1280")
                run("nft", "-f", "-", text=COUNTERS)
        self.filter(loss)

    def __exit__(self, kind, error, trace):
        big = [host.sent(counter="big") for host in self.hosts]
        super().__exit__(kind, error, trace)
        check(kind or not any(big), f"too large datagrams, or fragments: {big}")

    def filter(self, loss=0, cut=False):
        for host in self.hosts:
            host.filter(loss, cut=cut)

    def sent(self):
        return sum(host.sent() for host in self.hosts)

    def begin(self, each=0, **more):
        """Starts all instances, and returns a client of each; each has posted so many messages."""
        self.start(**more)
        clients = [Client(host) for host in self.hosts]
        exchange(self, clients, each)
        return clients

def post(client, many, size=0):
    """Its next messages, one by one."""
    for _ in range(many):
        client.post(len(client.sent_at), size)

def exchange(lab, clients, each, seconds=5, large=None):
    """All clients post at once, as fast as they can; the message numbered `large` has 60 KB."""
    for c in clients:
        for number in range(len(c.sent_at), len(c.sent_at) + each):
            c.out += frame(message(c.name, number, 60000 * (number == large)))
            c.sent_at[number] = now()
        c.write()
    return lab.everything(clients, None, seconds)

def told_of_losses(client):
    """What a client has missed must be what its instance says was lost; returns how many."""
    missing = sum(client.next.values()) - client.count
    lost = sum(map(int, re.findall(r"chat: lost (\d+) messages", client.host.said())))
    check(lost == missing and not client.closed, f"{missing} are missing, it told of {lost}")
    return lost

# --- loss, silence, death ------------------------------------------------------------------------

def case_loss():
    """30 % loss: of 2,000 messages of each of three hosts, and 60 KB, all get all in order"""
    with BusLab(loss=30) as lab:
        clients = lab.begin()
        listeners = [Client(host, name=b"-") for host in lab.hosts]
        took = exchange(lab, clients, 2000, 40, large=1000)
        lab.everything(listeners, {c.name: 2000 for c in clients})
        return f"{took:.1f} s, {lab.sent() / 6000:.2f} datagrams a message"

def case_list():
    """a list of unicast peers: without and with loss, and after the interfaces were made again"""
    with BusLab(expect=ERROR) as lab:
        everyone = ",".join(f"{host.address}:{PORT}" for host in lab.hosts)
        clients = lab.begin(300, bus=("-b", everyone, "-s", lab.path("secret")))
        check(f"bus {everyone}\n" in lab.hosts[0].said(), lambda: f"says {lab.hosts[0].said()!r}")
        lab.filter(30)
        exchange(lab, clients, 300, 20, large=400)
        for host in lab.hosts:
            host.unplug()
            lab.plug_in(host)
        return f"together again {exchange(lab, clients, 10, 10):.1f} s after that"

def away(lab, leave, back, seconds):
    """All hosts talk; the third is away for some seconds. All must be made up on its return.
    Returns how many messages of the first one waited when it returned, and how long it took."""
    clients = lab.begin()
    for c in clients:
        lab.talk(c, 100, now() + seconds + 2, 3000)
    lab.wait(0.5)
    leave(lab.hosts[2])
    lab.wait(seconds)
    waiting = len(clients[0].sent_at) - clients[0].next[b"1"]
    back(lab.hosts[2])
    lab.pump(lambda: not lab.timers, seconds + 5)
    return waiting, lab.everything(clients, None, 15)

def case_freeze():
    """an instance is frozen for 3 s: talkers wait before it would lose something"""
    with BusLab() as lab:
        waiting, took = away(lab, lambda host: host.send_signal(signal.SIGSTOP),
                             lambda host: host.send_signal(signal.SIGCONT), 3)
        check(waiting > 10, f"the talker did not wait: {waiting} messages were not sent yet")
        check(" left" not in lab.hosts[0].said(), "it was declared dead")
        return f"{waiting} messages waited; {took:.2f} s"

def case_cut():
    """a host that is cut off for 8 s makes up everything"""
    with BusLab(expect=ERROR + STUCK) as lab:
        return "all there %.2f s after the last" % away(
            lab, lambda host: host.filter(cut=True), lambda host: host.filter(), 8)[1]

def case_overrun():
    """a cut that outlasts what is kept: what was skipped is counted, and the rest flows"""
    with BusLab(expect=LOST + ERROR + STUCK) as lab:
        talker, _, last = clients = lab.begin(10)
        last.host.filter(cut=True)
        for host, many in zip(lab.hosts, (1, 1, 2)):
            host.says(r"(?s)" + r"left$.*" * many)
        post(talker, 800, 30000)
        post(last, 20)
        lab.everything(clients[:2], {b"1": 810, b"2": 10, b"3": 10}, 20)
        last.host.filter()
        lab.pump(lambda: talker.next[b"3"] == 30, 10, "what the lonely one said did not come")
        post(talker, 40)
        lab.pump(lambda: last.next[b"1"] == 850, 10, lambda: f"nothing flows: {last.next}")
        check(len(last.problems) == 1 and told_of_losses(last), f"one gap was due: {last.problems}")
        return f"{told_of_losses(last)} of 800 messages skipped"

def case_kill():
    """kill -9: the others miss no word; what only one has heard, it gives to the other"""
    with BusLab(hosts=4, expect=STUCK) as lab:
        a, b, c, d = clients = lab.begin(20)
        a.host.filter(rule=f"ip saddr {c.host.address} drop")
        b.host.filter(rule=f"ip saddr {d.host.address} drop")
        post(c, 30)
        post(d, 30)
        lab.pump(lambda: a.next[b"4"] == b.next[b"3"] == 50, 5, "not even one has heard it")
        check(a.next[b"3"] == b.next[b"4"] == 20, "the test's filter lets datagrams pass")
        for host in (c.host, d.host):
            host.stop(signal.SIGKILL)
        for client in (a, b):
            lab.talk(client, 50, now() + 7)
        lab.pump(lambda: not lab.timers, 10)
        lab.everything((a, b), {x.name: len(x.sent_at) for x in clients}, 10)

# --- history -------------------------------------------------------------------------------------

CHANNELS = {"": 120, "earth%20%26%20%C3%9Cmoon": 60, "x" * 64: 6}   # and how much is said there

def converse(hosts, channel="", count=20):
    """Clients of the hosts answer one another, so there is one order; returns what was said."""
    clients, said = [Client(host, f"/?channel={channel}") for host in hosts], []
    for n in range(count):
        said.append(f"{n}: {'so ' * (n % 40)}" if n % 7 else b"\xff%d" % n)
        clients[n % len(clients)].send(said[n], 1 if n % 7 else 2)
        for c in clients:
            c.hears(said[n])
    for c in clients:
        c.end()
    return said

def caught_up(host, said, arranged=list):
    """By 2 s after its start, the instance must have all that was said; returns when it had."""
    while True:
        wrong = [channel for channel, lines in said.items()
                 if arranged(host.lines(channel)) != arranged(lines)]
        took = now() - host.started
        if not wrong:
            return took
        check(took < 2 * SLOWER, lambda: f"after 2 s it has {host.lines(wrong[0])} in a channel")
        time.sleep(0.01)

def case_history():
    """who starts has all within 2 s, in the order others saw, with opcodes and words of the dead"""
    with BusLab() as lab:
        a, b, c = lab.hosts
        lab.start()
        said = {name: converse(lab.hosts, name, count) for name, count in CHANNELS.items()}
        c.stop(signal.SIGKILL)
        c.start()                                       # its own words are those of the dead now
        Client(c, "/?history=1000").hears('{"history":%d}' % len(said[""]), *said[""])
        took = [caught_up(c, said)]
        a.stop(signal.SIGKILL)                          # the eldest; so another one tells it
        a.start()
        took.append(caught_up(a, said))
        b.stop()
        lab.filter(10)
        b.start()
        took.append(caught_up(b, said, lambda lines: sorted(map(repr, lines))))
        return "after kill -9 %.2f s, restarted %.2f s, with 10 %% loss %.2f s" % tuple(took)

def case_newcomer():
    """one that is still catching up does not stall the window of the others"""
    with BusLab() as lab:
        a, b, c = lab.hosts
        for host in (a, b):
            host.start()
        lab.meet([a, b])
        one, two = clients = [Client(a), Client(b)]
        exchange(lab, clients, 100)
        c.filter(rule=NO_DATA)                          # so it lacks all of the history
        c.start()
        for host in (a, b):
            host.says(r"(?s)joined$.*joined$")
        begun = now()
        for number in range(100, 400):                  # one after the other: a datagram each
            one.post(number)
            lab.pump(lambda: two.next[b"1"] > number, 3, f"message {number} is stuck")
        took = now() - begun
        check(took < 3 * SLOWER, f"300 messages took {took:.1f} s")
        c.filter()
        lab.everything([Client(c, "/?history=10000")], {b"1": 400, b"2": 100}, 10)
        return f"300 messages in {took:.2f} s"

def case_islands():
    """two that have talked, each alone, meet: both get all that either said, and go on together"""
    with BusLab(hosts=2, expect=ERROR) as lab:
        lab.filter(cut=True)
        clients = [Client(host.start()) for host in lab.hosts]
        for client in clients:
            exchange(lab, [client], 50)
        lab.filter()
        lab.meet(lab.hosts)
        exchange(lab, clients, 50)

# --- paths and interfaces ------------------------------------------------------------------------

def case_halfdeaf():
    """a path for small datagrams only: nobody waits for over 5 s, it is told, and repair ends"""
    with BusLab(expect=STUCK + LOST) as lab:
        a, b, c = lab.hosts
        one, two, three = clients = lab.begin(10)
        c.filter(rule="udp length > 1008 drop")
        found, before = watch(clients), a.sent("bytes")
        post(one, 3, 60000)
        for client in clients:
            lab.talk(client, 50, now() + 8)
        lab.pump(lambda: not lab.timers, 20)
        lab.everything(clients[:2], {x.name: len(x.sent_at) for x in clients})
        repair = a.sent("bytes") - before - 3 * 60000
        slowest = max(found[1, 1])
        check(slowest < 5 + 1.5 * SLOWER, f"the talker was held up for {slowest:.1f} s")
        check(max(found[3, 1]) < 2 * SLOWER, f"the deaf one's took {max(found[3, 1]):.1f} s")
        check(repair < 10e6, f"{repair / 1e6:.1f} MB of repair")
        before = a.sent("bytes")
        lab.wait(3)
        quiet = a.sent("bytes") - before
        check(quiet < 3e6, f"{quiet / 1e3:.0f} KB of repair in 3 s in which nobody talks")
        c.filter()
        post(one, 1, 60000)
        lab.pump(lambda: three.next[b"1"] == len(one.sent_at), 10, lambda: f"got {three.next}")
        check(a.said().count("no progress") == 1, f"said not once: {a.said()!r}")
        return (f"{slowest:.1f} s, {repair / 1e6:.1f} MB of repair, then {quiet / 3e3:.0f} KB/s, "
                f"{told_of_losses(three)} lost")

def case_interface():
    """interfaces that are deleted and made again: told once, and joined again within 10 s"""
    with BusLab(hosts=2, expect=ERROR + r"|chat: bus: eth0 is (gone|back)$") as lab:
        clients = lab.begin(10)
        for host in lab.hosts:
            host.unplug()
        for host in lab.hosts:
            host.says(r"^chat: bus: eth0 is gone$")
        for host in lab.hosts:
            lab.plug_in(host)
        begun = now()
        for host in lab.hosts:
            host.says(r"^chat: bus: eth0 is back$")
        exchange(lab, clients, 10, 10)
        took = now() - begun
        told = [host.said().count(f"eth0 is {x}\n") for host in lab.hosts for x in ("gone", "back")]
        equal(told, [1, 1, 1, 1], "lines about eth0")
        for host in lab.hosts:                          # so fast that it may not be seen to be gone
            host.unplug()
            lab.plug_in(host)
        return f"together again after {took:.1f} s and {exchange(lab, clients, 10, 10):.1f} s"

def case_loopback():
    """three copies with -r on one machine and no other option share a port and a bus"""
    with BusLab(hosts=1) as lab:
        first = lab.hosts[0]
        hosts = [first, *(BusHost(lab, number, first.space) for number in (2, 3))]
        for host in hosts:
            host.options = ("-p", "8080", "-r", "-q")
            host.start(bus=())
        lab.meet(hosts)
        files = [f"/proc/{host.chat.process.pid}/fd" for host in hosts]
        before = [len(os.listdir(path)) for path in files]
        exchange(lab, [Client(first, name=b"%d" % n) for n in range(40)], 10, 10)   # at any of them
        for path, count in zip(files, before):
            check(len(os.listdir(path)) > count, "one has no clients")
        check(first.sent() == 0, f"{first.sent()} datagrams went out on eth0")

# --- secrets, clocks, strangers ------------------------------------------------------------------

def case_secret():
    """off the loopback a secret is asked for; one with another secret neither reads nor writes"""
    with BusLab(expect=ERROR) as lab:
        a, b, c = lab.hosts
        secret, none, empty = lab.path("secret"), lab.path("none"), lab.write("empty", "\n", 0o600)
        exposed = lab.write("exposed", "x\n", 0o640)
        for says, status, *bus in (
                ("urandom", 2, "-i", "eth0"), ("urandom", 2, "-b", f"{a.address}:{PORT}"),
                ("others", 1, "-i", "eth0", "-s", exposed), ("empty", 1, "-i", "eth0", "-s", empty),
                (none, 1, "-i", "eth0", "-s", none), ("nope", 1, "-i", "nope", "-s", secret)):
            said = a.refuses(bus=bus, status=status)
            check(says in said, f"{bus}: it says {said!r}")
        for host in (a, b):
            host.start(bus=("-i", "eth0", "-s", "none"))
        lab.meet([a, b])
        for host in (a, b):
            host.stop()
            host.start()
        c.start(bus=("-i", "eth0", "-s", lab.path("other")))
        lab.meet([a, b])
        clients = [Client(host) for host in lab.hosts]
        for client in clients:
            post(client, 100)
        lab.wait(1.2)
        lab.everything(clients[:2])
        lab.everything(clients[2:])
        check(not c.peers(), "the one with the wrong secret has peers")
        told = [len(re.findall(ERROR[1:], host.said(), re.M)) for host in lab.hosts]
        equal(told, [1, 1, 1], "how often it is told in these seconds")

SKEWED_CLOCK = """
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *t)
{
    int result = syscall(SYS_clock_gettime, id, t);
    if (id == CLOCK_REALTIME) t->tv_sec += atoi(getenv("SKEW"));
    return result;
}
"""

def case_clock():
    """clocks an hour apart: they meet and talk all the same, and nobody falls for a recording"""
    if not shutil.which("cc"):
        raise Skip("no cc here")
    with BusLab() as lab:
        library, spy = lab.path("clock.so"), Spy(lab)
        a, b = lab.hosts
        run("cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-", text=SKEWED_CLOCK)
        sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
        skewed = {"LD_PRELOAD": library, "ASAN_OPTIONS": sanitizer}
        a.start()
        b.start(environment={**skewed, "SKEW": "3600"})
        lab.meet([a, b])
        said = converse([a, b])
        b.stop()
        a.says("left$", 2)                              # at once, not when it is missed
        recorded, spy.heard = spy.heard, []
        b.start(environment={**skewed, "SKEW": "-3600"})
        lab.meet([a, b])
        caught_up(b, {"": said})                        # so it knows the one that is recorded
        said += converse([a, b])
        listeners = [Client(host) for host in lab.hosts]
        for datagram in recorded * 2:
            spy.speak(datagram)
        lab.wait(0.5)
        for host, listener in zip(lab.hosts, listeners):
            check(not listener.others and host.lines() == said, "a recording was delivered again")
        joined = [host.said().count(" joined") for host in lab.hosts]
        equal(joined, [2, 1], "how often somebody joined")

class Spy:
    """Hears and speaks the bus's datagrams, on the lab's last host, which has no instance then."""

    def __init__(self, lab):
        self.host, self.heard, self.closed, self.spoken = lab.hosts.pop(), [], False, 0
        self.key = hashlib.sha1(Path(lab.path("secret")).read_bytes().strip()).digest()
        with self.host:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            group = socket.inet_aton(GROUP) + struct.pack("=2i", 0, socket.if_nametoindex("eth0"))
            self.socket.bind((GROUP, PORT))
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, group)
            self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 0)
        self.socket.setblocking(False)
        lab.selector.register(self.socket, selectors.EVENT_READ, self)

    def read(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self.socket.recv(65536))

    def end(self):
        self.closed = True

    def speak(self, datagram):
        with contextlib.suppress(BlockingIOError):
            self.socket.sendto(datagram, (GROUP, PORT))
            self.spoken += 1

INSANE = 0, 1, 63, 64, 8192, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1

def signed(key, body):
    """A datagram; `key` is SHA1 of the secret."""
    return hmac.digest(key, body, "sha1") + body

def status(key, sender, listed, numbers):
    """A settled peer's STATUS, of any of these numbers."""
    entries = b"".join(struct.pack("<4Q", x, *random.choices(numbers, k=3)) for x in listed)
    head = struct.pack("<BBHQQ", 2, random.randrange(8) | 1, 0, sender, int(time.time() * 1e6))
    return signed(key, head + entries)

def mutated(datagram, sender=None):
    """What is signed of it, with other numbers in it, perhaps cut short or of another sender."""
    body = bytearray(datagram[20:])
    for _ in range(random.randrange(1, 4)):
        at = random.choice((random.randrange(len(body)), random.randrange(min(len(body), 60))))
        body[at] = random.choice((0, 1, 0x7F, 0x80, 0xFF, random.randrange(256)))
    if random.random() < 0.2:
        del body[random.randrange(len(body)):]
    if sender and len(body) >= 12:
        body[4:12] = struct.pack("<Q", sender)
    return bytes(body)

def unsigned(recorded, victims):
    """What one without the secret may send: noise, recordings, altered ones."""
    datagram, noise = random.choice(recorded), random.randbytes(random.randrange(1, 1473))
    at = random.randrange(len(datagram))
    flipped = datagram[:at] + bytes((datagram[at] ^ 1,)) + datagram[at + 1:]
    guess = status(b"guess", random.choice(victims), victims, (9,))
    return random.choice((noise, datagram, datagram[:at], datagram + noise[:40], flipped, guess))

def forged(key, recorded, victims):
    """With the right key, but of a sender that does not exist, and with insane numbers."""
    sender = random.getrandbits(64) | 1
    if random.random() < 0.5:
        return signed(key, mutated(random.choice(recorded), sender))
    listed = sender, *random.choices((*victims, 0, sender, 5), k=random.randrange(36))
    return status(key, sender, listed, INSANE)

def case_hostile():
    """two get 100,000 hostile datagrams each: no crash, no memory, without the key no effect"""
    with BusLab(expect=ERROR + LOST + STUCK) as lab:
        spy = Spy(lab)

        def attack(many, make, *arguments):
            end = spy.spoken + many
            while spy.spoken < end:
                for _ in range(200):
                    spy.speak(make(*arguments))
                spy.heard.clear()
                lab.wait(0.002)
        lab.begin(100)
        earlier, spy.heard = spy.heard, []
        for host in lab.hosts:
            host.stop()
        spy.heard = []
        clients = lab.begin(100)
        recorded = earlier + spy.heard
        check(all(signed(spy.key, d[20:]) == d for d in recorded), "they are signed otherwise")
        victims = sorted({struct.unpack("<Q", d[24:32])[0] for d in spy.heard})
        before = [(host.memory(), host.read()) for host in lab.hosts]
        for client in clients:
            lab.talk(client, 100, now() + 3)
        attack(60000, unsigned, recorded, victims)
        lab.pump(lambda: not lab.timers, 10)
        lab.everything(clients)
        for client in clients:
            check(client.host.peers() == 1 and not client.others, "a stranger was heard")
        attack(30000, forged, spy.key, recorded, victims)
        exchange(lab, clients, 100, 30)
        attack(10000, lambda: signed(spy.key, mutated(random.choice(recorded))))
        for host in lab.hosts:                          # these are in their own names: that may
            host.get()                                  # break the bus, but nothing else
        growth = max(host.memory("VmHWM") - size for host, (size, _) in zip(lab.hosts, before))
        check(growth < 64, f"memory grew by {growth:.0f} MB")
        read = min(host.read() - count for host, (_, count) in zip(lab.hosts, before))
        check(read >= spy.spoken / 2, f"of {spy.spoken} datagrams only {read} were read")
        for host in lab.hosts:
            host.stop()
        lab.begin(100)
        return f"{read} read, memory grew by {growth:.1f} MB"

# --- what it costs -------------------------------------------------------------------------------

def measure(rate, loss, seconds):
    """One of three hosts talks. Returns datagrams of all a message, p50 and p99 at the others, and
    p99 at the talker itself, which needs no bus: it tells of other work on this machine."""
    with BusLab(loss=loss) as lab:
        clients = lab.begin()
        exchange(lab, clients[:1], 1)
        found, before = watch(clients), lab.sent()
        lab.talk(clients[0], rate, now() + seconds, 84)
        lab.pump(lambda: not lab.timers, seconds + 5)
        lab.everything(clients, None, 10)
        each = (lab.sent() - before) / (len(clients[0].sent_at) - 1)
        return each, *percentiles(found[1, 2] + found[1, 3])[:2], percentiles(found[1, 1])[1]

def case_figures():
    """200 messages/s: datagrams a message, and what 30 % loss adds to them and to p99"""
    each = measure(200, 0, 3)[0]
    check(each <= 1.3, f"{each:.2f} datagrams a message without loss")
    for attempt in range(3):                            # other work may be in the way of p99
        lossy, _, p99, own = measure(200, 30, 4)
        if lossy <= 3.5 and p99 <= 300 + 2 * own:
            break
    else:
        raise Failure(f"at 30 % loss {lossy:.2f} datagrams a message, p99 {p99:.0f} ms")
    return f"{each:.2f}; at 30 % loss {lossy:.2f} and {p99:.0f} ms"

def case_idle():
    """while nobody talks, an instance sends two datagrams a second at most and takes no CPU time"""
    with BusLab() as lab:
        lab.begin(1)
        lab.wait(1.5)                                   # until the pauses have doubled to 1 s
        before = lab.sent(), sum(host.cpu() for host in lab.hosts)
        lab.wait(4)
        sent, spent = lab.sent() - before[0], sum(host.cpu() for host in lab.hosts) - before[1]
        check(9 <= sent <= 24, f"{sent} datagrams of three instances in 4 s")
        check(spent < 0.04 * SLOWER, f"they took {spent:.3f} s of CPU time")

class Flood(Client):
    """Posts messages of 40 bytes in blobs, a few ahead of what comes back; keeps what comes."""
    going, sent, back, kept = False, 0, 0, None

    def talk(self, keep):
        self.going, self.kept = True, [] if keep else None
        self.advance()

    def advance(self):
        while self.going and self.sent - self.back < 4000 and len(self.out) < 1 << 18:
            for number in range(self.sent, self.sent + 500):
                self.out += frame((b"%s:%08d:" % (self.name, number)).ljust(40, b"."))
            self.sent += 500
            self.write()

    def on_bytes(self, data):
        self.rest += data
        whole = len(self.rest) // 42 * 42
        part = bytes(self.rest[:whole])
        del self.rest[:whole]
        self.count += whole // 42
        self.back += part.count(b"\x81\x28%s:" % self.name)
        if self.kept is not None:
            self.kept.append(part)
        self.advance()

def flood(lab, seconds, talkers, keep=False):
    """So many clients, each on a host, talk as fast as they can; returns all and the time."""
    lab.start()
    clients = [Flood(host) for host in lab.hosts]
    begun = now()
    for c in clients[:talkers]:
        c.talk(keep)
    lab.wait(seconds)
    for c in clients:
        c.going = False
    total = sum(c.sent for c in clients)
    lab.pump(lambda: all(c.count >= total or c.closed for c in clients), 20,
             lambda: f"of {total} messages the clients got {[c.count for c in clients]}")
    settle(clients)
    return clients, now() - begun

def case_flood():
    """two instances flat out: no message is lost or out of order, memory is bounded"""
    with BusLab(hosts=2) as lab:
        clients, took = flood(lab, 10 if LONG else 3, 2, keep=True)
        sent = {c.name: c.sent for c in clients}
        for c in clients:
            seen, stream = {name: 0 for name in sent}, b"".join(c.kept)
            for at in range(2, len(stream), 42):
                name, number, _ = stream[at:at + 40].split(b":")
                check(int(number) == seen[name], f"{name}: {number} where {seen[name]} was due")
                seen[name] += 1
            equal(seen, sent, "messages")
        peak, total = max(host.memory("VmHWM") for host in lab.hosts), sum(sent.values())
        check(peak < 64, f"one instance took {peak:.0f} MB")
        return (f"{total / took:.0f} messages/s, {lab.sent() / total:.3f} datagrams a message, "
                f"at most {peak:.1f} MB")

def bench():
    print("three hosts, one talks:         datagrams a message  p50, ms  p99, ms  own p99")
    for loss in (0, 1, 30):
        figures = "%20.2f %8.1f %8.1f %8.1f" % measure(200, loss, 20)
        print(f"200 messages/s, {loss:2} % loss {figures}", flush=True)
    with BusLab(hosts=2) as lab:
        clients, took = flood(lab, 10, 1)
    print(f"from instance to instance: {clients[1].count / took:.0f} messages/s of 40 bytes")

if __name__ == "__main__":
    main("bus", (case_hostile, case_halfdeaf, case_interface, case_cut, case_overrun, case_kill,
                 case_list, case_freeze, case_history, case_newcomer, case_islands, case_secret,
                 case_clock, case_idle, case_loopback),
         alone=(case_loss, case_flood, case_figures), at_once=6, network=True,
         also={"--bench": bench})
