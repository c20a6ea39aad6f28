#!/usr/bin/python3
"""Python's websockets talk to the program in $CHAT, on one instance and on
two that share the bus."""
import asyncio
import contextlib
import hashlib
import json
import os
import re
import signal
import socket
import sys
import traceback
import urllib.parse

import websockets

CHAT = os.environ.get("CHAT", "./chat")
SECONDS = 10  # what one wait may take
EXPECTED = re.compile(  # all that a healthy instance says on stderr
    r"chat: (listening on http://localhost:\d+/, bus .*"
    r"|peer [0-9a-f]{16} (joined|left))")


async def within(what, awaitable):
    """Waits, and says clearly what for where it takes too long."""
    try:
        return await asyncio.wait_for(awaitable, SECONDS)
    except asyncio.TimeoutError:
        raise AssertionError(f"{what}: nothing within {SECONDS} s") from None


def equal(got, expected, what=""):
    if got != expected:
        raise AssertionError(
            f"{what}: expected {expected!r:.120}, got {got!r:.120}")


class Instance:
    """A running server; `async with` starts and ends it."""

    def __init__(self, *options, bus="none"):
        self.options = ["-p", "0", "-q", "-b", bus, *options]
        self.lines = []
        self.news = asyncio.Event()

    async def __aenter__(self):
        self.process = await asyncio.create_subprocess_exec(
            CHAT, *self.options, stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE)
        self.reader = asyncio.create_task(self.read())
        try:
            line = await self.line(r"listening on http://localhost:(\d+)/")
        except AssertionError:
            await self.__aexit__(AssertionError)
            raise
        self.port = int(line[1])
        return self

    async def __aexit__(self, kind, *_):
        try:
            await self.stop()
        except AssertionError:
            if kind is None:
                raise

    async def read(self):
        async for line in self.process.stderr:
            self.lines.append(line.decode(errors="replace").rstrip("\n"))
            self.news.set()
        self.news.set()

    async def line(self, pattern):
        """Waits for a line on stderr, returns its match."""
        async def search():
            while True:
                self.news.clear()
                for line in self.lines:
                    match = re.search(pattern, line)
                    if match:
                        return match
                if self.reader.done():
                    raise AssertionError(f"ended: {self.lines}")
                await self.news.wait()
        return await within(f"a line /{pattern}/", search())

    async def stop(self):
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            await within("exit after SIGTERM", self.process.wait())
        except AssertionError:
            self.process.kill()
            raise
        await self.reader
        odd = [line for line in self.lines if not EXPECTED.fullmatch(line)]
        if odd:
            print("\n".join(odd), file=sys.stderr)
        equal(odd[:3], [], "stderr")
        equal(self.process.returncode, 0, "exit status")

    async def connect(self, rest="/", **options):
        options = {"max_size": None, "max_queue": None} | options
        return await within("open", websockets.connect(
            f"ws://127.0.0.1:{self.port}{rest}", **options))

    async def get(self, path):
        """An HTTP request by hand: its status and its body."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(f"GET {path} HTTP/1.0\r\nHost: x\r\n\r\n".encode())
        head, body = (await within(path, reader.read())).split(b"\r\n\r\n", 1)
        writer.close()
        return int(head.split()[1]), body.decode()


async def take(client, count):
    """The next messages of a client."""
    async def read():
        while len(got) < count:
            got.append(await client.recv())
        return got
    got = []
    try:
        return await asyncio.wait_for(read(), SECONDS)
    except asyncio.TimeoutError:
        raise AssertionError(f"only {len(got)} of {count} messages within "
                             f"{SECONDS} s") from None
    except websockets.ConnectionClosed as end:
        raise AssertionError(f"closed after {len(got)} of {count} messages: "
                             f"{end}") from None


async def next_of(client):
    return (await take(client, 1))[0]


async def closed_with(client):
    await within("close", client.wait_closed())
    return client.close_code


def free_bus():
    """The default group, at a port that nobody uses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        return f"239.255.80.80:{s.getsockname()[1]}"


class Pair:
    """Two instances that have found each other on a bus of their own."""

    def __init__(self, *options):
        self.bus = free_bus()
        self.options = options

    def instance(self):
        return Instance(*self.options, bus=self.bus)

    async def __aenter__(self):
        self.stack = contextlib.AsyncExitStack()
        try:
            pair = [await self.stack.enter_async_context(self.instance())
                    for _ in range(2)]
            for instance in pair:
                await instance.line("peer [0-9a-f]{16} joined")
        except AssertionError:
            await self.stack.__aexit__(*sys.exc_info())
            raise
        return pair

    async def __aexit__(self, *error):
        await self.stack.__aexit__(*error)


async def text_and_binary():
    async with Instance() as s:
        a, b = await s.connect(), await s.connect()
        for message in ("hello", "", "grüße ☃ 😀\0", b"", b"\x00\xff",
                        "x" * 125, "x" * 126, b"y" * 65535, "é" * 32768):
            await a.send(message)
            equal(await next_of(a), message, "echo")
            equal(await next_of(b), message, "to the other")


async def fragments():
    async with Instance() as s:
        a, b = await s.connect(), await s.connect()
        await a.send(["one ", "", "twö ", "three"])
        equal(await next_of(b), "one twö three")

        async def pieces():
            for number in range(100):
                if number % 10 == 5:
                    await within("pong", await a.ping())
                yield bytes([number])
        await a.send(pieces())
        equal(await next_of(b), bytes(range(100)))


async def pings():
    async with Instance() as s:
        a = await s.connect()
        for data in (b"", b"abcd", bytes(125)):
            await within("pong", await a.ping(data))
        await a.pong(b"nobody asked")
        await a.send("still here")
        equal(await next_of(a), "still here")


async def close_codes():
    async with Instance() as s:
        for code in (1000, 1001, 3000, 4999):
            a = await s.connect()
            await a.close(code, "bye")
            equal(a.close_code, code)
        a = await s.connect()
        await a.send("x" * 65537)
        equal(await closed_with(a), 1009, "too big")
        a = await s.connect()
        await a.write_frame(True, 1, b"\xc3(")
        equal(await closed_with(a), 1007, "not UTF-8")
        a = await s.connect()
        a.transport.write(bytes.fromhex("838000000000"))
        equal(await closed_with(a), 1002, "an unknown opcode")


async def ends_with_1001():
    async with Instance() as s:
        clients = [await s.connect(f"/?channel={i % 2}") for i in range(10)]
        await s.stop()
        for client in clients:
            equal(await closed_with(client), 1001)


async def no_compression():
    async with Instance() as s:
        a = await s.connect(compression="deflate")
        equal(a.extensions, [])
        await a.send("a" * 5000)
        equal(await next_of(a), "a" * 5000)


async def refusals():
    async with Instance() as s:
        for status, rest, origin in (
                (403, "/", "http://evil.example"), (403, "/", "null"),
                (400, "/?channel=" + "x" * 65, None),
                (400, "/?channel=%c3", None)):
            try:
                await s.connect(rest, origin=origin)
            except websockets.InvalidStatusCode as refusal:
                equal(refusal.status_code, status, rest)
            else:
                raise AssertionError(f"{rest} of {origin} was let in")
        a = await s.connect(origin=f"http://127.0.0.1:{s.port}")
        await a.send("own origin")
        equal(await next_of(a), "own origin")


async def history():
    async with Instance() as s:
        a = await s.connect("/?channel=h&history=5")
        equal(await next_of(a), '{"history":0}')
        sent = [f"m{i}" if i % 3 else bytes([i]) for i in range(1, 31)]
        for message in sent:
            await a.send(message)
        equal(await take(a, 30), sent)
        b = await s.connect("/?history=7&channel=h")
        equal(await take(b, 8), ['{"history":7}'] + sent[-7:])
        await a.send("live")
        equal(await next_of(b), "live")
        status, body = await s.get("/messages?channel=h")
        equal(status, 200)
        equal(len(json.loads(body)), 31)


async def channels():
    async with Instance() as s:
        name = urllib.parse.quote("grüße & 😀")
        a, b, c = (await s.connect(), await s.connect(f"/?channel={name}"),
                   await s.connect(f"/deep/path?a=b&channel={name}"))
        await b.send("to b and c")
        equal(await next_of(c), "to b and c")
        equal(await next_of(b), "to b and c")
        await a.send("to a")
        equal(await next_of(a), "to a")
        await c.send("again")
        equal(await next_of(b), "again")


def check_order(messages, senders):
    """Each sender's own numbers must count up from 0."""
    numbers = dict.fromkeys(senders, 0)
    for message in messages:
        sender, number = message.split(":")
        equal(int(number), numbers[sender], f"from {sender}")
        numbers[sender] += 1


async def many(instances, clients, count):
    """All clients of all instances send, each must get all, in order."""
    sockets = {f"{i}": await instances[i % len(instances)].connect()
               for i in range(clients)}

    async def send(name, client):
        for number in range(count):
            await client.send(f"{name}:{number}")

    async def receive(client):
        check_order(await take(client, clients * count), sockets)
    await asyncio.gather(*(send(*item) for item in sockets.items()),
                         *(receive(client) for client in sockets.values()))


async def twenty_clients():
    async with Instance() as s:
        await many([s], 20, 200)


async def one_megabyte():
    async with Instance("-m", "16M") as s:
        a, b = await s.connect(), await s.connect()
        data = os.urandom(1 << 20)
        await a.send(data)
        equal(hashlib.sha1(await next_of(b)).digest(),
              hashlib.sha1(data).digest())


async def bus_both_ways():
    async with Pair() as (one, two):
        a, b, c = (await one.connect(), await two.connect(),
                   await two.connect())
        for message in ("hello", "", "grüße ☃ 😀\0", b"", bytes(range(256)),
                        os.urandom(65536), "x" * 65536):
            for sender in (a, b):
                await sender.send(message)
                for client in (a, b, c):
                    equal(await next_of(client), message)


async def bus_channels():
    async with Pair() as (one, two):
        name = urllib.parse.quote("é" * 32)
        a, b = (await one.connect(f"/?channel={name}"),
                await two.connect(f"/?channel={name}"))
        other = await two.connect()
        await a.send("named")
        equal(await next_of(b), "named")
        equal(await one.get("/send?message=plain"), (200, "message sent"))
        equal(await next_of(other), "plain")
        equal(json.loads((await two.get(f"/messages?channel={name}"))[1]),
              ["named"])


async def bus_order():
    async with Pair() as pair:
        await many(pair, 10, 500)


async def bus_flood():
    """More than any window holds, both ways at once, each client as fast as
    its own messages come back: nobody is cut off for that."""
    async with Pair() as (one, two):
        clients = {"a": await one.connect(), "b": await two.connect()}
        under_way = {name: asyncio.Semaphore(5) for name in clients}
        count, fill = 400, "." * 20000

        async def send(name):
            for number in range(count):
                await within("an echo", under_way[name].acquire())
                await clients[name].send(f"{name}:{number}:{fill}")

        async def receive(name):
            got = []
            while len(got) < 2 * count:
                message, tail = (await next_of(clients[name])).rsplit(":", 1)
                equal(tail, fill)
                got.append(message)
                if message[0] == name:
                    under_way[name].release()
            check_order(got, clients)
        await asyncio.gather(*map(send, clients), *map(receive, clients))


async def bus_late_joiner():
    pair = Pair()
    async with pair as (one, two):
        a, b = await one.connect(), await two.connect()
        talk = []
        for number in range(20):  # to and fro
            sender = (a, b)[number % 2]
            talk.append(f"{number}" if number % 5 else bytes([number]))
            await sender.send(talk[-1])
            for client in (a, b):
                equal(await next_of(client), talk[-1])
        async with pair.instance() as three:
            late = None

            async def arrives():
                while True:
                    late = await three.connect("/?history=100")
                    count = json.loads(await late.recv())["history"]
                    got = [await late.recv() for _ in range(count)]
                    if count == len(talk):
                        return late, got
                    await late.close()
                    await asyncio.sleep(0.02)
            late, got = await within("the history of the others", arrives())
            equal(got, talk, "in the order in which it was posted")
            await late.send("from three")
            for client in (a, b, late):
                equal(await next_of(client), "from three")


CASES = {
    "text and binary": text_and_binary,
    "fragments": fragments,
    "pings": pings,
    "close codes": close_codes,
    "1001 to all when the server ends": ends_with_1001,
    "no compression": no_compression,
    "refusals": refusals,
    "history": history,
    "channels": channels,
    "20 clients send 200 messages each, all in order": twenty_clients,
    "1 MB": one_megabyte,
    "bus: both ways": bus_both_ways,
    "bus: channels": bus_channels,
    "bus: 10 clients on two instances, all in order": bus_order,
    "bus: 8 MB each way at once": bus_flood,
    "bus: a late joiner has the history": bus_late_joiner,
}


def main():
    failed = 0
    for name, case in CASES.items():
        try:
            asyncio.run(case())
            print(f"ok - websockets: {name}", flush=True)
        except Exception as error:  # any error is this case's failure
            failed = 1
            why = " ".join(f"{type(error).__name__}: {error}".split())
            lines = [frame.lineno for frame in
                     traceback.extract_tb(error.__traceback__)
                     if frame.filename == __file__][1:]
            print(f"FAILED - websockets: {name}: {why:.300} (lines {lines})",
                  flush=True)
    sys.exit(failed)


main()
