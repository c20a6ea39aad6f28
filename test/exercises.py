#!/usr/bin/python3
"""The solutions of the README's exercises: proves that each patch in test/exercises applies to
main.c, changes at most 30 lines and only the chapters that the README names, builds without a
warning, and does what the exercise asks for.

    test/exercises.py [-l] [CASE...]    all, or those named (-l lists them)
    test/exercises.py --renew           writes the patches anew, as they apply to main.c now

A patch may find its place a little off, for main.c moves on; one that finds none is a failure.
"""
import sys
sys.dont_write_bytecode = True
import contextlib, difflib, json, os, re, shutil, signal, subprocess, tempfile
from pathlib import Path
from harness import ROOT, SLOWER, Client, Host, Lab, check, equal, main, now, own_group, run

FORGET = 7 * SLOWER                                     # seconds, in place of an hour
BULK = [f"{i} ".ljust(32768, ".") for i in range(48)]   # more than the kernel holds for a client
Host.options = "-p", "0"                                # with a request log

@contextlib.contextmanager
def instance(*options, expect=""):
    """One that is alone."""
    with Lab(1, network=False, expect=expect) as lab:
        yield lab.hosts[0].start("-b", "none", *options)

@contextlib.contextmanager
def paused(host):
    """It stands still meanwhile, so that all that comes is there in one round."""
    host.send_signal(signal.SIGSTOP)
    os.waitpid(host.chat.process.pid, os.WUNTRACED)
    yield
    host.send_signal(signal.SIGCONT)

# --- what each exercise promises -----------------------------------------------------------------

def log_channel():
    """each line of the request log ends with the channel, and nobody forges one"""
    with instance() as host:
        for name in ("earth", "a%22%0Ab", ""):
            host.get(f"/messages?channel={name}")
        host.lab.pump(lambda: host.chat.printed().count("\n") >= 3, 5, "not all lines")
        ends = [line.rpartition(" ")[2] for line in host.chat.printed().splitlines()]
        equal(ends, ['"earth"', r'"a\x22\x0ab"', '""'], "the lines' ends")

def uptime():
    """/uptime tells for how many seconds it has been running"""
    begun = now()
    with instance() as host:
        check(0 <= int(host.get("/uptime")) <= now() - begun, "it begins too high")
        host.lab.pump(lambda: int(host.get("/uptime")) >= 1, 5, "it does not grow", 0.05)
        check(now() - begun >= 1, "it is too fast")

def greeting():
    """each client that joins, and only it, is greeted"""
    text = 'Grüß "dich"'
    with instance("--greeting", text) as host:
        one, two = Client(host), Client(host, "/?history=5")
        one.send("hi")
        one.hears(text, "hi")                           # and not what greeted the other
        two.hears('{"history":0}', text, "hi")
        Client(host, "/?history=5").hears('{"history":1}', text, "hi")
    with instance() as host:                            # without the option nobody is
        three = Client(host)
        three.send("hi")
        three.hears("hi")
        check("UTF-8" in host.lab.add_host().refuses("-g", b"\xFF", status=2), "not refused")

def channels():
    """/channels tells how many clients each channel has"""
    def count():
        return json.loads(host.get("/channels"))
    with instance() as host:
        equal(count(), {"": 0}, "at first")
        clients = [Client(host, f"/?channel={name}") for name in ("earth", "earth", "%22%0A")]
        equal(count(), {"": 0, "earth": 2, '"\n': 1}, "clients")
        clients[2].end()
        host.lab.pump(lambda: count() == {"": 0, "earth": 2, '"\n': 0}, 5, "who left is counted")

def lag():
    """stderr tells how many bytes the slowest client is behind"""
    with instance(expect=r"|chat: the slowest client is \d+ bytes behind") as host:
        deaf, talker = Client(host), Client(host)
        host.says("is 0 bytes")
        deaf.listen(False)
        for message in BULK:
            talker.send(message)
            talker.hears(message)
        lines = host.says(r"is (\d{5,}) bytes (?s:.*) is (\d{5,}) bytes")
        check(1 << 16 < int(lines[2]) < sum(map(len, BULK)) + 1000, f"{lines[2]} bytes")
        deaf.listen()
        deaf.hears(*BULK)
        host.says(r"\d{5,} bytes (?s:.*) is 0 bytes")

def notices():
    """who is in a channel is told how many they are, once for all that come at once"""
    with instance() as host:
        one, two = Client(host, "/?channel=earth"), Client(host, "/?channel=earth")
        one.hears('{"clients":1}', '{"clients":2}')
        two.hears('{"clients":2}')
        other = Client(host)
        other.hears('{"clients":1}')                    # it is in another channel
        other.end()
        Client(host).hears('{"clients":1}')             # as many as before, but it is told
        two.end()
        one.hears('{"clients":1}')
        with paused(host):
            crowd = [Client(host, "/?channel=earth", wait=False) for _ in range(9)]
        for client in (one, *crowd):
            client.hears('{"clients":10}')

def rate():
    """10 messages a second; who says more is slowed down, and others are not"""
    fast = [f"fast {i}" for i in range(25)]
    with instance() as host:
        one, two = Client(host), Client(host)
        begun = now()
        for message in fast:
            one.send(message)
        two.hears(*fast[:10])
        two.send("slow")
        rest = [two.hear() for _ in range(16)]
        check(now() - begun > 1.9, f"25 messages in {now() - begun:.1f} s")
        equal([text for text in rest if text != "slow"], fast[10:], "all in order")
        check(rest[-1] != "slow", "another client had to wait, too")

def echo():
    """with ?echo=0, a client is spared its own messages, and nobody anything else"""
    with instance() as host:
        one, two = Client(host), Client(host, "/?echo=0")
        two.send("a")
        one.hears("a")
        with paused(host):
            one.send("b")
            two.send("c")
        equal({one.hear(), one.hear()}, {"b", "c"}, "in any order")
        one.send("d")
        two.hears("b", "d")
        one.hears("d")
        two.listen(False)
        for i, message in enumerate(BULK):         # it falls behind, and says something
            one.send(message)
            if i == 20:
                two.send("meanwhile")
        host.lab.wait(0.2)
        two.listen()
        two.hears(*BULK)
        check("meanwhile" in [one.hear() for _ in range(len(BULK) + 1)], "nobody has heard it")

def forget():
    """old messages are forgotten, and no newcomer brings them back"""
    group = own_group()

    def begin():
        host = lab.add_host().start("-b", group)
        lab.meet([host for host in lab.hosts if host.chat.process.poll() is None])
        return host
    with Lab(0, network=False) as lab:
        one, said = begin(), now()
        one.get("/send?message=old")
        lab.pump(lambda: now() > said + FORGET * 0.75, FORGET)
        two = begin()
        two.get("/send?message=new")
        equal(two.history(), ["old", "new"], "a newcomer's history")
        lab.pump(lambda: one.history() == ["new"] == two.history(), FORGET, "not forgotten", 0.05)
        check(FORGET < now() - said < FORGET * 1.65, f"forgotten after {now() - said:.1f} s")
        three = begin()                                 # the others have both in their rings
        equal(three.history(), ["new"], "the history of another newcomer")
        lab.pump(lambda: not (one.history() or two.history() or three.history()), FORGET,
                 "not all is forgotten", 0.05)
        one.stop(), two.stop()
        four = begin()                                  # three is the eldest now
        four.get("/send?message=end")
        lab.pump(lambda: three.history() == ["end"], 5, "nothing is heard any more", 0.02)
        Client(three, "/?history=9").hears('{"history":1}', "end")

def unix_bus():
    """instances on one machine meet by Unix-domain sockets"""
    many = [f"{i} ".ljust(2000, ".") for i in range(200)]   # more than a socket's queue holds
    with Lab(2, network=False) as lab:
        bus = "-b", f"unix:exercise {os.getpid()}"
        lab.start(*bus)
        here, there = map(Client, lab.hosts)
        for message in many:
            there.send(message)
        here.hears(*many)
        lab.meet([*lab.hosts, three := lab.add_host().start(*bus)])
        equal(three.history(), lab.hosts[0].history(), "a newcomer's history")
        lab.hosts[1].stop()
        lab.hosts[1].start(*bus)                        # the name is free once more
        again = Client(lab.hosts[1])
        here.send("once more")
        again.hears("once more")

# In the README's order; and the times that are made shorter for the test.
EXERCISES = (log_channel, uptime, greeting, channels, lag, notices, rate, echo, forget, unix_bus)
TIMES = {lag: {"LAG_TIME": "SECOND"}, forget: {"FORGET": f"{FORGET * 1000:.0f}L"}}

# --- applying and building -----------------------------------------------------------------------

def patch_of(tries):
    name = f"{EXERCISES.index(tries) + 1:02}-{tries.__name__.replace('_', '-')}"
    return Path(ROOT, f"test/exercises/{name}.patch")

def apply(tries, folder, context):
    """Copies main.c, with the patch applied, into the folder. Returns what it was, and the diff."""
    for file in ("main.c", "index.html", "Makefile"):
        shutil.copy(f"{ROOT}/{file}", folder)
    before = Path(folder, "main.c").read_text().splitlines(True)
    command = "patch", "-p0", "--batch", "--fuzz=0", "--no-backup-if-mismatch", "-i"
    done = subprocess.run((*command, patch_of(tries)), cwd=folder, capture_output=True, text=True)
    check(done.returncode == 0, f"{patch_of(tries).name} does not apply any more: {done.stdout}")
    after = Path(folder, "main.c").read_text().splitlines(True)
    return before, list(difflib.unified_diff(before, after, "main.c", "main.c", n=context))

def examine(tries, before, difference):
    """Looks at a patch; returns how many lines it changes."""
    count = sum(line[0] in "+-" for line in difference[2:])
    check(0 < count <= 30, f"it changes {count} lines, at most 30 are due")
    check(all(len(line) <= 82 for line in difference), "a line has more than 80 columns")
    touched = set()                                     # but for the #includes, before chapter 1
    for place in re.findall(r"^@@ -(\d+)", "".join(difference), re.M):
        text = "".join(before[:int(place)])
        touched |= set(re.findall(r"^/\* ---- (\d+)\. ", text, re.M)[-1:])
    exercises = Path(ROOT, "README.md").read_text().partition("## Exercises")[2]
    told = re.search(rf"(?s)^{EXERCISES.index(tries) + 1}\. .*?\((\d[\d, ]*)\)$", exercises, re.M)
    equal(touched, told and set(told[1].split(", ")), "the chapters, which the README tells")
    return count

def exercise(tries):
    def case():
        with tempfile.TemporaryDirectory() as folder:
            count, main_c = examine(tries, *apply(tries, folder, 0)), Path(folder, "main.c")
            for name, time in TIMES.get(tries, {}).items():
                main_c.write_text(re.sub(rf"(#define {name} +)\S+( \* SECOND\))?", rf"\g<1>{time}",
                                         main_c.read_text()))
            flags = f"{os.environ.get('CFLAGS', '-O1')} -Werror -DHISTORY=2097152"
            run("make", "-s", "-C", folder, "CHAT=./chat", f"CFLAGS={flags}")
            Host.program = f"{folder}/chat"
            tries()
        return f"{count} lines"
    case.__name__, case.__doc__ = f"case_{patch_of(tries).stem}", tries.__doc__
    return case

def renew():
    for tries in EXERCISES:
        preface = patch_of(tries).read_text().partition("--- main.c\n")[0]
        with tempfile.TemporaryDirectory() as folder:
            patch_of(tries).write_text(preface + "".join(apply(tries, folder, 1)[1]))

if __name__ == "__main__":
    if sys.argv[1:] == ["--renew"]:
        sys.exit(renew())
    longest_first = sorted(EXERCISES, key=[forget, forget, lag].count, reverse=True)
    main("exercises", list(map(exercise, longest_first)), at_once=5,
         missing=lambda: None if shutil.which("patch") else "no patch here")
