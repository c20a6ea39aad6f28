#!/usr/bin/python3 -B
"""Proves what is promised of the bus, between hosts that lose datagrams, freeze, die, are lied to.
Each host is a network namespace (see harness.py); each case has hosts of its own.

    test/bus.py [-l] [CASE...]      all cases, or those named (-l lists them)

Needs ip, nft, and root or a user namespace, else all is skipped.
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
LOSS = "numgen random mod 100 < %d drop"                # what FILTER drops, and then all both ways
NO_DATA = "@th,224,8 4 drop"                            # the kind is a datagram's byte 20
CUT = "drop", "drop"

class BusHost(Host):
    def begin(self, *options, bus=None, **more):
        """`bus`: other options than those for a bus on eth0 with the lab's secret."""
        bus = ("-i", "eth0", "-s", self.lab.path("secret")) if bus is None else bus
        return super().begin(*bus, *options, **more)

    def filter(self, arrives="accept", leaves="accept"):
        """What happens to the bus's datagrams, by nft rules."""
        with self:
            run("nft", "-f", "-", text=FILTER % (arrives, leaves))

    def sent(self, what="packets", counter="sent"):
        """How many datagrams the host has sent on eth0, or "bytes" (with IP and UDP headers)."""
        with self:
            listed = run("nft", "list", "counter", "inet", "count", counter)
        return int(re.search(rf"{what} (\d+)", listed)[1])

    def unplug(self):
        with self:
            run("ip", "link", "del", "eth0")

class BusLab(Lab):
    """Whatever happens, no datagram may be larger than DATAGRAM_MAX, or go in fragments."""
    host_type = BusHost

    def __init__(self, hosts=3, expect=""):
        super().__init__(hosts, expect=expect)
        for host in self.hosts:
            with host:
                run("ip", "link", "set", "eth0", "mtu", "1280")
                run("nft", "-f", "-", text=COUNTERS)

    def __exit__(self, kind, error, trace):
        big = [host.sent(counter="big") for host in self.hosts]
        super().__exit__(kind, error, trace)
        check(kind or not any(big), f"too large datagrams, or fragments: {big}")

    def filter(self, *rules):
        for host in self.hosts:
            host.filter(*rules)

    def sent(self):
        return sum(host.sent() for host in self.hosts)

    def begin(self, each=0, **more):
        """Starts all instances, and returns a client of each; each has posted so many messages."""
        self.start(**more)
        clients = [Client(host) for host in self.hosts]
        exchange(self, clients, each)
        return clients

    def talks(self):
        """Waits until all that talk have come to their end."""
        self.pump(lambda: not self.timers, 20, "the talk does not end")

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

def latencies(sender, *receivers):
    """The seconds that its numbered messages took, sorted."""
    return sorted(c.came_at[sender.name, number] - at for c in receivers
                  for number, at in sender.sent_at.items() if (sender.name, number) in c.came_at)

def told_of_losses(client):
    """What a client has missed must be what its instance says was lost; returns how many."""
    missing = sum(client.next.values()) - client.count
    lost = sum(map(int, re.findall(r"chat: lost (\d+) messages", client.host.said())))
    check(lost == missing and not client.closed, f"{missing} are missing, it told of {lost}")
    return lost

# --- loss, silence, death ------------------------------------------------------------------------

def case_loss():
    """30 % loss, by multicast and by a list: of 2,000 messages of each of three, all get all"""
    figures = []
    for unicast in False, True:
        with BusLab() as lab:
            everyone = ",".join(f"{host.address}:{PORT}" for host in lab.hosts)
            bus = ("-b", everyone, "-s", lab.path("secret")) if unicast else None
            clients = lab.begin(10, bus=bus)
            said = f"bus {everyone}\n" if unicast else f"bus {GROUP}:{PORT} on eth0\n"
            check(said in lab.hosts[0].said(), lambda: f"says {lab.hosts[0].said()!r}")
            lab.filter(LOSS % 30)
            figures.append(exchange(lab, clients, 2000, 40, large=1000))
    return "%.1f s and %.1f s" % tuple(figures)

def case_away():
    """frozen for 3 s: talkers wait before it would lose something; cut off for 8 s: it gets all"""
    with BusLab(expect=ERROR + STUCK) as lab:
        clients, host = lab.begin(), lab.hosts[2]

        def away(seconds, leave, back):
            for c in clients:
                lab.talk(c, 60, now() + seconds + 2, 3000)      # half of what is kept, in all
            lab.wait(0.5)
            leave()
            lab.wait(seconds)
            waiting = len(clients[0].sent_at) - clients[0].next[b"1"]
            back()
            lab.talks()
            return waiting, lab.everything(clients, None, 15)
        waiting, took = away(3, lambda: host.send_signal(signal.SIGSTOP),
                             lambda: host.send_signal(signal.SIGCONT))
        check(waiting > 10, f"the talker did not wait: {waiting} messages were not sent yet")
        check(not re.search("left|no progress", lab.hosts[0].said()), "it was declared dead")
        cut = away(8, lambda: host.filter(*CUT), host.filter)[1]
        return f"{waiting} messages waited; all there after {took:.2f} s, {cut:.2f} s"

def case_overrun():
    """a cut that outlasts what is kept: what was skipped is counted, and the rest flows"""
    with BusLab(expect=LOST + ERROR + STUCK) as lab:
        talker, _, last = clients = lab.begin(10)
        last.host.filter(*CUT)
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
        a.host.filter(f"ip saddr {c.host.address} drop")
        b.host.filter(f"ip saddr {d.host.address} drop")
        post(c, 30)
        post(d, 30)
        lab.pump(lambda: a.next[b"4"] == b.next[b"3"] == 50, 5, "not even one has heard it")
        check(a.next[b"3"] == b.next[b"4"] == 20, "the test's filter lets datagrams pass")
        for host in (c.host, d.host):
            host.stop(signal.SIGKILL)
        for client in (a, b):
            lab.talk(client, 50, now() + 7)
        lab.talks()
        lab.everything((a, b), {x.name: len(x.sent_at) for x in clients}, 10)

def case_stop():
    """who stops lets nobody in, and stays until the others have all, be a third of it lost"""
    with BusLab() as lab:
        clients = lab.begin(1)
        lab.filter(LOSS % 30)
        host = clients[0].host
        post(clients[0], 60, 1000)
        lab.pump(lambda: clients[0].next[b"1"] == 61, 5, "its own echo is missing")
        with host.connect():                            # has a second to say what it wants
            host.send_signal(signal.SIGTERM)
            lab.pump(lambda: clients[0].close_code == 1001, 5, "it says no good-bye")
            try:
                host.connect()
                check(False, "it lets in one more")
            except ConnectionRefusedError:
                pass
        host.stop()
        lab.everything(clients[1:], {b"1": 61, b"2": 1, b"3": 1}, 10)

def case_apart():
    """who is on the loopback hears nothing of eth0, though another program there has joined"""
    with BusLab(hosts=2) as lab:
        a, b = lab.hosts
        with a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            group = socket.inet_aton(GROUP) + struct.pack("=2i", 0, socket.if_nametoindex("eth0"))
            other.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
            a.start(bus=())
            b.start()                                   # its secret is another: a would tell
            lab.wait(1.5)

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

def caught_up(host, known, arranged=list):
    """By 2 s after its start, the instance must have the history; returns when it had."""
    while wrong := [x for x in known if arranged(host.history(x)) != arranged(known[x])]:
        check(now() < host.started + 2 * SLOWER,
              lambda: f"after 2 s it has {host.history(wrong[0])} in a channel")
        time.sleep(0.01)
    return now() - host.started

def case_history():
    """who starts has all within 2 s, in the order others saw, with opcodes and words of the dead"""
    with BusLab() as lab:
        a, b, c = lab.hosts
        lab.start()
        said = [converse(lab.hosts, name, count) for name, count in CHANNELS.items()][0]
        known = {name: a.history(name) for name in CHANNELS}
        equal([*map(len, known.values())], [*CHANNELS.values()], "messages")
        c.stop(signal.SIGKILL)
        c.start()                                       # its own words are those of the dead now
        Client(c, "/?history=1000").hears('{"history":120}', *said)
        took = [caught_up(c, known)]
        a.stop(signal.SIGKILL)                          # the eldest; so another one tells it
        a.start()
        took.append(caught_up(a, known))
        b.stop()
        lab.filter(LOSS % 10)
        b.start()
        took.append(caught_up(b, known, lambda lines: sorted(map(repr, lines))))
        return "after kill -9 %.2f s, restarted %.2f s, with 10 %% loss %.2f s" % tuple(took)

def case_newcomer():
    """one that is still catching up does not stall the window of the others"""
    with BusLab() as lab:
        one, two, three = lab.begin(100)
        three.host.stop()
        three.host.filter(NO_DATA)                      # so it lacks all of the history
        three.host.start()
        for client in (one, two):
            client.host.says(r"(?s)left$.*joined$")
        begun = now()
        for number in range(100, 400):                  # one after the other: a datagram each
            one.post(number)
            lab.pump(lambda: two.next[b"1"] > number, 3, f"message {number} is stuck")
        took = now() - begun
        check(took < 3 * SLOWER, f"300 messages took {took:.1f} s")
        three.host.filter()
        again = Client(three.host, "/?history=10000")
        lab.everything([again], {b"1": 400, b"2": 100, b"3": 100}, 10)
        return f"300 messages in {took:.2f} s"

def case_islands():
    """two that have talked, each alone and without a secret, meet: both get all that either said"""
    with BusLab(hosts=2, expect=ERROR) as lab:
        lab.filter(*CUT)
        bus = "-i", "eth0", "-s", "none"                # here a secret is waived
        clients = [Client(host.start(bus=bus)) for host in lab.hosts]
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
        c.filter("udp length > 1008 drop")
        before = a.sent("bytes")
        post(one, 3, 60000)
        for client in clients:
            lab.talk(client, 50, now() + 8)
        lab.talks()
        lab.everything(clients[:2], {x.name: len(x.sent_at) for x in clients})
        repair = a.sent("bytes") - before - 3 * 60000
        slowest, deaf = latencies(one, one)[-1], latencies(three, one)[-1]
        check(slowest < 5 + 1.5 * SLOWER, f"the talker was held up for {slowest:.1f} s")
        check(deaf < 2 * SLOWER, f"the deaf one's took {deaf:.1f} s")
        check(repair < 10e6, f"{repair / 1e6:.1f} MB of repair")
        lab.wait(3)
        quiet = a.sent("bytes") - before - 3 * 60000 - repair
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

        def each(action, says=""):
            for host in lab.hosts:
                action(host)
            for host in lab.hosts:
                host.says(says)
        each(BusHost.unplug, r"^chat: bus: eth0 is gone$")
        each(lab.plug_in, r"^chat: bus: eth0 is back$")
        took = exchange(lab, clients, 10, 10)
        told = [host.said().count(f"eth0 is {x}\n") for host in lab.hosts for x in ("gone", "back")]
        equal(told, [1, 1, 1, 1], "lines about eth0")
        for host in lab.hosts:                          # so fast that it may not be seen to be gone
            host.unplug()
            lab.plug_in(host)
        return f"together again after {took:.1f} s and {exchange(lab, clients, 10, 10):.1f} s"

# --- secrets, clocks, strangers ------------------------------------------------------------------

def case_secret():
    """off the loopback a secret is asked for; one with another secret neither reads nor writes"""
    with BusLab(expect=ERROR) as lab:
        empty = "-s", lab.write("empty", "\n", 0o600)
        shared = "-s", lab.write("shared", "a secret\n", 0o640)
        for says, status, secret in (("urandom", 2, ()), ("empty", 1, empty),
                                     ("others may read", 1, shared)):
            said = lab.hosts[0].refuses("-i", "eth0", *secret, bus=(), status=status)
            check(says in said, f"{secret}: it says {said!r}")
        alone = lab.hosts[0].start(bus=())              # on the loopback it needs none
        exchange(lab, [Client(alone)], 10)
        equal(alone.sent(), 0, "datagrams that went out on eth0")
        alone.stop()
        for host, secret in zip(lab.hosts, ("secret", "secret", "other")):
            host.start(bus=("-i", "eth0", "-s", lab.path(secret)))
        lab.meet(lab.hosts[:2])
        clients = [Client(host) for host in lab.hosts]
        for client in clients:
            post(client, 100)
        lab.wait(1.2)
        lab.everything(clients[:2])
        lab.everything(clients[2:])
        check(not lab.hosts[2].peers(), "the one with the wrong secret has peers")
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
    """clocks an hour apart: they meet and talk, also where who came last seems to be the eldest"""
    if not shutil.which("cc"):
        raise Skip("no cc here")
    with BusLab(hosts=2) as lab:
        a, b = lab.hosts
        library = lab.path("clock.so")
        run("cc", "-shared", "-fPIC", "-x", "c", "-o", library, "-", text=SKEWED_CLOCK)
        a.start()
        sanitizer = os.environ.get("ASAN_OPTIONS", "") + ":verify_asan_link_order=0"
        os.environ.update(LD_PRELOAD=library, ASAN_OPTIONS=sanitizer, SKEW="3600")
        b.start()
        lab.meet([a, b])
        converse([a, b])
        b.stop()
        a.says("left$", 2)                              # at once, not when it is missed
        os.environ["SKEW"] = "-3600"
        b.start()
        lab.meet([a, b])
        caught_up(b, {"": a.history()})
        converse([a, b])

class Spy:
    """Hears and speaks the bus's datagrams, on the lab's last host, which has no instance then."""

    def __init__(self, lab):
        self.spoken, host = 0, lab.hosts.pop()
        self.key = hashlib.sha1(Path(lab.path("secret")).read_bytes().strip()).digest()
        with host:
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            group = socket.inet_aton(GROUP) + struct.pack("=2i", 0, socket.if_nametoindex("eth0"))
        self.socket.bind((GROUP, PORT))
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, group)
        self.socket.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, group)
        self.socket.setblocking(False)

    def heard(self):
        """The datagrams since it was asked last."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                found.append(self.socket.recv(65536))
        return found

    def speak(self, datagram):
        with contextlib.suppress(BlockingIOError):
            self.socket.sendto(datagram, (GROUP, PORT))
            self.spoken += 1

INSANE = [struct.pack("<Q", number) for number in
          (0, 1, 63, 64, 8192, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 64) - 1)]

def signed(key, body):
    """A datagram; `key` is SHA1 of the secret."""
    return hmac.digest(key, body, "sha1") + body

def unsigned(recorded):
    """What one without the secret may send: noise, recordings, altered ones."""
    datagram, noise = random.choice(recorded), random.randbytes(random.randrange(1, 1473))
    at = random.randrange(len(datagram))
    flipped = datagram[:at] + bytes((datagram[at] ^ 1,)) + datagram[at + 1:]
    guess = signed(b"guess", datagram[20:])
    return random.choice((noise, datagram, datagram[:at], datagram + noise[:40], flipped, guess))

def forged(key, recorded, victims, stranger=True):
    """With the right key and insane numbers, perhaps too long or cut short; of a sender that does
    not exist, or in the name of one that does."""
    body = bytearray(random.choice(recorded)[20:])
    if stranger:                                        # and the first that a STATUS has is itself
        body[4:12] = body[20:28] = random.randbytes(8)
    for _ in range(random.choice((0, 0, 1, 35))):
        body += random.choice((*victims, body[4:12])) + b"".join(random.choices(INSANE, k=3))
    for _ in range(random.randrange(4)):                # all numbers stand at 4, 12, and so on
        at, number = random.randrange(12, len(body), 8), random.choice((*INSANE, *victims))
        body[at:at + 8] = random.choice((number, number[:1] + body[at + 1:at + 8]))
    body[0], body[1] = random.randrange(3, 7), random.randrange(16)
    return signed(key, bytes(body[:random.choice((1500, 1500, random.randrange(1200)))]))

def case_hostile():
    """200,000 hostile datagrams: no crash, no memory, without the key no effect"""
    with BusLab(expect=ERROR + LOST + STUCK) as lab:
        spy = Spy(lab)

        def attack(many, make, *arguments):
            end = spy.spoken + many
            while spy.spoken < end:
                for _ in range(200):
                    spy.speak(make(*arguments))
                lab.wait(0.002)
        lab.begin(100)
        for host in lab.hosts:
            host.stop()
        earlier = spy.heard()
        clients = lab.begin(100)
        latest = spy.heard()
        recorded = earlier + latest
        check(latest and all(signed(spy.key, d[20:]) == d for d in recorded), "other signatures")
        victims = sorted({d[24:32] for d in latest})
        for client in clients:
            lab.talk(client, 100, now() + 3)
        attack(120000, unsigned, recorded)
        lab.talks()
        lab.everything(clients)
        for client in clients:
            check(client.host.peers() == 1 and not client.others, "a stranger was heard")
            client.host.says(ERROR[1:], 0)
        attack(60000, forged, spy.key, recorded, victims)
        joined = min(host.said().count(" joined") for host in lab.hosts)
        check(joined > 30, f"only {joined} strangers joined")
        exchange(lab, clients, 100, 30)
        attack(20000, forged, spy.key, recorded, victims, False)
        for host in lab.hosts:                          # these are in their own names: that may
            host.get()                                  # break the bus, but nothing else
        peak = max(host.memory("VmHWM") for host in lab.hosts)
        check(peak < 64, f"one instance took {peak:.0f} MB")
        for host in lab.hosts:
            with host:                                  # the last column: what found no room
                lost = int(run("awk", "{ n += $NF } END { print n }", "/proc/net/udp"))
            check(lost < spy.spoken / 2, f"of {spy.spoken} datagrams it read all but {lost}")
            host.stop()
        lab.begin(100)
        return f"{joined} strangers joined, at most {peak:.1f} MB, {lost} not read"

# --- what it costs -------------------------------------------------------------------------------

def measure(rule):
    """One of three hosts says 200 messages a second. Returns datagrams of all a message, and the
    p99 in ms at the others and at itself, which needs no bus: it tells of other work here."""
    with BusLab() as lab:
        one, two, three = clients = lab.begin()
        lab.filter(rule)
        exchange(lab, [one], 1)
        before = lab.sent()
        lab.talk(one, 200, now() + 4, 84)
        lab.talks()
        lab.everything(clients, None, 10)
        p99, own = (took[len(took) * 99 // 100] * 1e3
                    for took in (latencies(one, two, three), latencies(one, one)))
        return (lab.sent() - before) / (len(one.sent_at) - 1), p99, own

def case_figures():
    """200 messages/s at 0, 1 and 30 % loss: datagrams a message, and p99"""
    figures = []
    # A quiet machine has 1.03, 1.13, 2.9 (p99 1, 6, 60 ms); other work on it adds a tenth or two.
    for loss, most, latest in (0, 1.2, 10), (1, 1.35, 15), (30, 3.3, 150):
        for attempt in range(3):
            each, p99, own = measure(LOSS % loss)
            if good := each <= most and p99 <= latest * SLOWER + 2 * own:
                break
        figures.append(f"{each:.2f} and {p99:.0f} ms at {loss} %")
        check(good, lambda: f"too much: {figures[-1]}")
    return "; ".join(figures)

def case_idle():
    """150,000 messages flat out take little memory; then two datagrams a second and no CPU time"""
    with BusLab() as lab:
        clients = lab.begin()
        took = sum(exchange(lab, clients, 2000) for _ in range(25))     # so that no reader is slow
        peak, each = max(host.memory("VmHWM") for host in lab.hosts), lab.sent() / 150000
        check(peak < 64, f"one instance took {peak:.0f} MB")
        lab.wait(1.5)                                   # until the pauses have doubled to 1 s
        before = lab.sent(), sum(host.cpu() for host in lab.hosts)
        lab.wait(4)
        sent, spent = lab.sent() - before[0], sum(host.cpu() for host in lab.hosts) - before[1]
        check(9 <= sent <= 24, f"{sent} datagrams of three instances in 4 s")
        check(spent < 0.04 * SLOWER, f"they took {spent:.3f} s of CPU time")
        return (f"{150000 / took:.0f} messages/s, {each:.3f} datagrams a message, "
                f"at most {peak:.1f} MB")

if __name__ == "__main__":
    main("bus", (case_hostile, case_away, case_halfdeaf, case_interface, case_overrun, case_kill,
                 case_history, case_newcomer, case_islands, case_secret, case_clock, case_idle,
                 case_apart, case_stop, case_loss),
         alone=(case_figures,), at_once=6, missing=no_network)
