// Node's ws, http and fetch talk to the program in $CHAT.
'use strict';

const { spawn } = require('node:child_process');
const { createHash, randomBytes } = require('node:crypto');
const { once } = require('node:events');
const http = require('node:http');
const assert = require('node:assert/strict');
const WebSocket = require('ws');

const SECONDS = 10; // what one wait may take

// Rejects with a clear message where the promise takes too long.
function within(promise, what) {
  let timer;
  const error = new Error(`${what}: nothing within ${SECONDS} s`);
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(error), SECONDS * 1000);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

class Server {
  static async start(...options) {
    const server = new Server();
    server.stderr = '';
    server.process = spawn(process.env.CHAT || './chat',
      ['-p', '0', '-b', 'none', '-q', ...options],
      { stdio: ['ignore', 'ignore', 'pipe'] });
    server.ended = once(server.process, 'close');
    running.add(server.process);
    server.ended.then(() => running.delete(server.process));
    server.port = await within(new Promise((resolve, reject) => {
      server.process.stderr.on('data', (data) => {
        server.stderr += data;
        const line = /^chat: listening on http:\/\/localhost:(\d+)\//m
          .exec(server.stderr);
        if (line) resolve(Number(line[1]));
      });
      server.ended.then(() => reject(new Error(
        `the server did not start: ${server.stderr}`)), reject);
    }), 'the line that tells the port');
    return server;
  }

  url(rest = '/', scheme = 'http') {
    return `${scheme}://127.0.0.1:${this.port}${rest}`;
  }

  // A client whose connection is open.
  async client(rest = '/', options = {}) {
    const client = new Client(this.url(rest, 'ws'), options);
    await within(once(client.socket, 'open'), 'open');
    return client;
  }

  async messages(query = '') {
    return (await fetch(this.url('/messages' + query))).json();
  }

  async stop() {
    this.process.kill('SIGTERM');
    const [code, signal] = await within(this.ended, 'exit after SIGTERM');
    assert.deepEqual([code, signal], [0, null], 'exit status');
    assert.match(this.stderr, /^chat: listening on [^\n]*\n$/, 'stderr');
  }
}

// Keeps what arrives until somebody asks for it: a string for a text
// message, a Buffer for a binary one.
class Client {
  constructor(url, options) {
    this.got = [];
    this.socket = new WebSocket(url, options);
    this.closed = new Promise((resolve) => {
      this.socket.on('close', (code, reason) =>
        resolve([code, reason.toString()]));
    });
    this.socket.on('message', (data, isBinary) => {
      this.got.push(isBinary ? data : data.toString());
      this.wake?.();
    });
    this.socket.on('error', () => {}); // 'close' follows
  }

  send(message, options = {}) {
    this.socket.send(message, options);
  }

  // The next n messages; fails where the connection ends before.
  async take(n) {
    let ended;
    this.closed.then((end) => {
      ended = end;
      this.wake?.();
    });
    await within((async () => {
      while (this.got.length < n && !ended)
        await new Promise((resolve) => { this.wake = resolve; });
    })(), `message ${this.got.length + 1} of ${n}`);
    assert.ok(this.got.length >= n,
      `closed (${ended}) after ${this.got.length} of ${n} messages`);
    return this.got.splice(0, n);
  }

  async next() {
    return (await this.take(1))[0];
  }

  end() {
    return within(this.closed, 'close');
  }

  async close() {
    this.socket.close(1000);
    assert.equal((await this.end())[0], 1000);
  }
}

// The status with which the server refuses a WebSocket.
async function refused(url, options) {
  const socket = new WebSocket(url, options);
  socket.on('error', () => {});
  const answer = once(socket, 'unexpected-response').then(([, r]) => r);
  const opened = once(socket, 'open').then(() => ({ statusCode: 101 }));
  const response = await within(Promise.race([answer, opened]), 'an answer');
  socket.terminate();
  return response.statusCode;
}

const running = new Set();
const cases = [];
function test(name, options, run) {
  cases.push({ name, options, run });
}

test('text comes back to the sender and to the others', [], async (s) => {
  const [a, b] = [await s.client(), await s.client()];
  for (const text of ['hello', '', 'grüße ☃ 😀', '<b>"x"</b>\n\0\x7f']) {
    a.send(text);
    assert.equal(await a.next(), text);
    assert.equal(await b.next(), text);
  }
});

test('binary stays binary', [], async (s) => {
  const [a, b] = [await s.client(), await s.client()];
  for (const size of [0, 1, 256, 40000]) {
    const data = randomBytes(size);
    a.send(data);
    assert.deepEqual(await a.next(), data);
    assert.deepEqual(await b.next(), data);
  }
});

test('each form of the length', [], async (s) => {
  const a = await s.client();
  for (const n of [1, 125, 126, 127, 65534, 65535, 65536]) {
    const text = 'x'.repeat(n - 1) + '.';
    a.send(text);
    assert.equal(await a.next(), text);
    const data = randomBytes(n);
    a.send(data);
    assert.deepEqual(await a.next(), data);
  }
});

test('fragments, also within a character, with pings between', [],
  async (s) => {
    const [a, b] = [await s.client(), await s.client()];
    const bytes = Buffer.from('a☃😀é-'.repeat(50));
    for (let at = 0; at < bytes.length; at++) {
      const fin = at === bytes.length - 1;
      a.send(bytes.subarray(at, at + 1), { binary: false, fin });
      if (at % 100 === 7) a.socket.ping(String(at));
    }
    assert.equal(await b.next(), bytes.toString());
    assert.equal(await a.next(), bytes.toString());
    a.send(randomBytes(10), { fin: false });
    a.send(Buffer.alloc(0), { fin: false });
    b.send('between');
    assert.equal(await a.next(), 'between');
    a.send(Buffer.from('end'), { fin: true });
    const whole = await a.next();
    assert.ok(Buffer.isBuffer(whole));
    assert.equal(whole.length, 13);
    assert.equal(await b.next(), 'between');
    assert.deepEqual(await b.next(), whole);
  });

test('a ping is answered with its own data', [], async (s) => {
  const a = await s.client();
  for (const data of ['', 'x', 'y'.repeat(125)]) {
    a.socket.ping(data);
    const [pong] = await within(once(a.socket, 'pong'), 'pong');
    assert.equal(pong.toString(), data);
  }
  a.socket.pong('nobody asked');
  a.send('still here');
  assert.equal(await a.next(), 'still here');
});

test('close: the code comes back', [], async (s) => {
  for (const code of [1000, 1001, 1011, 3000, 4999]) {
    const a = await s.client();
    a.socket.close(code, 'bye');
    assert.equal((await a.end())[0], code);
  }
  const a = await s.client();
  a.socket.close();
  assert.equal((await a.end())[0], 1005);
});

test('close: what was sent before it arrives', [], async (s) => {
  const [a, b] = [await s.client(), await s.client()];
  a.send('last words');
  a.socket.close(1000);
  assert.equal(await b.next(), 'last words');
  assert.equal((await a.end())[0], 1000);
  assert.deepEqual(a.got, ['last words']);
});

test('close: 1007 for text that is not UTF-8', [], async (s) => {
  const b = await s.client();
  for (const bad of ['ff', 'c080', 'eda080', 'f4908080', '61e2', 'e28261']) {
    const a = await s.client();
    a.send(Buffer.from(bad, 'hex'), { binary: false });
    assert.equal((await a.end())[0], 1007, bad);
  }
  const a = await s.client();
  a.send(Buffer.from('61ff', 'hex'), { binary: false, fin: false });
  assert.equal((await a.end())[0], 1007, 'fails before the message is whole');
  const c = await s.client();
  c.send('fine');
  assert.equal(await b.next(), 'fine');
});

test('close: 1009 for a message too big', [], async (s) => {
  const b = await s.client();
  const a = await s.client();
  a.send('x'.repeat(65537));
  assert.equal((await a.end())[0], 1009);
  const c = await s.client();
  c.send(Buffer.alloc(40000), { fin: false });
  c.send(Buffer.alloc(40000), { fin: true });
  assert.equal((await c.end())[0], 1009, 'in fragments');
  b.send('fine');
  assert.equal(await b.next(), 'fine');
});

test('close: 1002 for a broken frame', [], async (s) => {
  for (const frame of [
    '810161', // not masked
    'c18100000000' + '61', // RSV1
    '838000000000', // an unknown opcode
    '808100000000' + '61', // continues nothing
    '098000000000', // a ping in fragments
    '89fe007e00000000', // a ping of 126 bytes
    '81fe000500000000', // a length not minimal
    '888100000000' + '03', // half a close code
    '888200000000' + '03ed', // close with 1005
  ]) {
    const a = await s.client();
    a.socket._socket.write(Buffer.from(frame, 'hex'));
    assert.equal((await a.end())[0], 1002, frame);
  }
});

test('close: 1001 to all when the server ends', [], async (s) => {
  const clients = [];
  for (let i = 0; i < 20; i++)
    clients.push(await s.client(`/?channel=${i % 3}`));
  await s.stop();
  for (const client of clients) assert.equal((await client.end())[0], 1001);
});

test('channels are apart', [], async (s) => {
  const plain = await s.client();
  const empty = await s.client('/any/path?channel=');
  const earth = await s.client('/prefix/?channel=earth');
  const same = await s.client('/?x=1&channel=%65arth&y');
  const odd = await s.client('/?channel=gr%C3%BC%C3%9Fe+%26%20%F0%9F%98%80');
  earth.send('on earth');
  assert.equal(await same.next(), 'on earth');
  assert.equal(await earth.next(), 'on earth');
  plain.send('plain');
  assert.equal(await empty.next(), 'plain');
  assert.equal(await plain.next(), 'plain');
  odd.send('odd');
  assert.equal(await odd.next(), 'odd');
  assert.deepEqual(await s.messages('?channel=grüße+%26+😀'), ['odd']);
  same.send('end');
  assert.equal(await earth.next(), 'end');
  assert.deepEqual([plain.got, empty.got, odd.got], [[], [], []]);
});

test('a channel of 64 bytes opens, one of 65 does not', [], async (s) => {
  const name = 'é'.repeat(32);
  const a = await s.client('/?channel=' + encodeURIComponent(name));
  a.send('x');
  assert.equal(await a.next(), 'x');
  const url = s.url('/?channel=' + encodeURIComponent(name + 'x'), 'ws');
  assert.equal(await refused(url), 400);
  assert.equal(await refused(s.url('/?channel=%ff', 'ws')), 400);
});

test('history: its count, the last ones, then what comes', [], async (s) => {
  const early = await s.client('/?history=10');
  assert.equal(await early.next(), '{"history":0}');
  for (let i = 1; i <= 20; i++)
    early.send(i % 5 ? `text ${i}` : Buffer.from([i]));
  await early.take(20);
  const late = await s.client('/?history=3');
  assert.deepEqual(await late.take(4),
    ['{"history":3}', 'text 18', 'text 19', Buffer.from([20])]);
  const all = await s.client('/?history=1000&channel=');
  const got = await all.take(21);
  assert.equal(got[0], '{"history":20}');
  assert.equal(got[1], 'text 1');
  const none = await s.client('/?history=0');
  assert.equal(await none.next(), '{"history":0}');
  const silent = await s.client();
  early.send('live');
  for (const client of [late, all, none, silent])
    assert.equal(await client.next(), 'live');
});

test('history: no gap and no repeat while others send', [], async (s) => {
  const sender = await s.client();
  const total = 3000;
  const late = [];
  for (let i = 0; i < total; i++) {
    sender.send(String(i));
    if (i % 100 === 99)
      late.push(await s.client(`/?history=${i % 7}`));
  }
  assert.equal((await sender.take(total)).at(-1), String(total - 1));
  for (const client of late) {
    const kept = JSON.parse(await client.next()).history;
    assert.ok(kept <= 6);
    const first = Number(await client.next());
    const rest = await client.take(total - 1 - first);
    assert.deepEqual(rest.map(Number), rest.map((_, i) => first + 1 + i));
    assert.deepEqual(client.got, []);
  }
});

test('history: as much as the log holds', [], async (s) => {
  const a = await s.client();
  const total = 600; // of 1 KB each, more than the log's 256 KB
  for (let i = 0; i < total; i++) a.send(`${i} `.padEnd(1000, '.'));
  await a.take(total);
  const late = await s.client(`/?history=${total}`);
  const kept = JSON.parse(await late.next()).history;
  assert.ok(kept > 200 && kept < 270, `kept ${kept}`);
  const numbers = (await late.take(kept)).map((m) => parseInt(m));
  assert.deepEqual(numbers, numbers.map((_, i) => total - kept + i));
  assert.equal((await s.messages()).length, kept);
});

test('50 clients send 200 messages each, all in order', [], async (s) => {
  const clients = await Promise.all(
    Array.from({ length: 50 }, () => s.client()));
  for (let i = 0; i < 200; i++)
    clients.forEach((client, c) => client.send(`${c}:${i}`));
  for (const client of clients) {
    const next = new Array(50).fill(0);
    for (const message of await client.take(50 * 200)) {
      const [from, number] = message.split(':').map(Number);
      assert.equal(number, next[from]++, `from ${from}`);
    }
    assert.deepEqual(client.got, []);
  }
});

test('a flood of 40 times the log reaches all who read', [], async (s) => {
  const clients = await Promise.all(
    Array.from({ length: 5 }, () => s.client()));
  clients.forEach((client, c) => {
    for (let i = 0; i < 2000; i++)
      client.send(`${c}:${i}:`.padEnd(1000, 'x'));
  });
  for (const client of clients) {
    const next = new Array(5).fill(0);
    for (const message of await client.take(5 * 2000)) {
      const [from, number] = message.split(':').map(Number);
      assert.equal(number, next[from]++, `from ${from}`);
    }
  }
});

test('who does not read is cut off, and only he', [], async (s) => {
  const [fast, slow] = [await s.client(), await s.client()];
  slow.socket._socket.pause();
  for (let i = 0; i < 400; i++) fast.send(`${i}:`.padEnd(60000, 'x'));
  const got = (await fast.take(400)).map((m) => parseInt(m));
  assert.deepEqual(got, got.map((_, i) => i));
  slow.socket._socket.resume();
  assert.notEqual((await slow.end())[0], 1000);
  assert.ok(slow.got.length < 400);
  // What he got has no hole.
  assert.deepEqual(slow.got.map((m) => parseInt(m)),
    slow.got.map((_, i) => i));
});

test('1 MB and 16 MB with -m 16M', ['-m', '16M'], async (s) => {
  const [a, b] = [await s.client('/', { maxPayload: 2 ** 25 }),
    await s.client('/', { maxPayload: 2 ** 25 })];
  const digest = (data) => createHash('sha1').update(data).digest('hex');
  for (const size of [1 << 20, 16 << 20]) {
    const data = randomBytes(size);
    a.send(data);
    assert.equal(digest(await b.next()), digest(data));
    assert.equal(digest(await a.next()), digest(data));
  }
  const text = '☃'.repeat(1 << 20);
  a.send(text);
  assert.equal(digest(await b.next()), digest(text));
  a.send(Buffer.alloc((16 << 20) + 1));
  assert.equal((await a.end())[0], 1009);
  b.send('fine');
  assert.equal(await b.next(), 'fine');
});

test('no extension and no protocol is agreed on', [], async (s) => {
  const a = await s.client('/', { perMessageDeflate: true });
  assert.equal(a.socket.extensions, '');
  assert.equal(a.socket.protocol, '');
  a.send('aaaaaaaaaaaaaaaaaaaa'.repeat(100), { compress: true });
  assert.equal((await a.next()).length, 2000);
});

test('origin: the own and an allowed one, no other',
  ['-o', 'https://chat.example', '-o', 'http://b.example:81'], async (s) => {
    const open = (origin) => refused(s.url('/', 'ws'), { origin });
    assert.equal(await open(s.url('')), 101);
    assert.equal(await open(`https://127.0.0.1:${s.port}`), 101);
    assert.equal(await open('https://chat.example'), 101);
    assert.equal(await open('http://b.example:81'), 101);
    for (const origin of ['http://evil.example', 'http://127.0.0.1', 'null',
      'http://127.0.0.1:1', 'http://b.example:82', 'http://b.example',
      'https://chat.example.evil', `http://x127.0.0.1:${s.port}`])
      assert.equal(await open(origin), 403, origin);
  });

test("origin: '*' allows all", ['-o', '*'], async (s) => {
  const options = { origin: 'http://evil.example' };
  assert.equal(await refused(s.url('/', 'ws'), options), 101);
});

test('an old version of the protocol: 426', [], async (s) => {
  const options = { protocolVersion: 8 };
  assert.equal(await refused(s.url('/', 'ws'), options), 426);
});

test("node's http: a handshake with token lists", [], async (s) => {
  const request = http.get(s.url('/x?channel=y'), { headers: {
    'Connection': 'keep-alive, UPGRADE', 'Upgrade': 'h2c, WebSocket',
    'Sec-WebSocket-Version': '13',
    'Sec-WebSocket-Key': 'dGhlIHNhbXBsZSBub25jZQ==' } });
  const [response, socket] = await within(once(request, 'upgrade'), '101');
  assert.equal(response.statusCode, 101);
  assert.equal(response.headers['sec-websocket-accept'],
    's3pPLMBiTxaQ9kYGzzhZRbK+xOo=');
  assert.match(response.headers.upgrade, /^websocket$/i);
  socket.destroy();
});

test("node's http: many requests on one connection", [], async (s) => {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const ports = new Set();
  for (let i = 0; i < 100; i++) {
    const request = http.get(s.url(`/send?message=${i}`), { agent });
    const [response] = await within(once(request, 'response'), 'response');
    ports.add(response.socket.localPort);
    const body = [];
    for await (const part of response) body.push(part);
    assert.equal(Buffer.concat(body).toString(), 'message sent');
  }
  agent.destroy();
  assert.equal(ports.size, 1);
  assert.equal((await s.messages()).length, 100);
});

test("node's fetch: /send reaches the clients as text", [], async (s) => {
  const a = await s.client('/?channel=earth');
  const get = await fetch(
    s.url('/send?channel=earth&message=') + encodeURIComponent('a+ü b'));
  assert.equal(await get.text(), 'message sent');
  assert.equal(await a.next(), 'a+ü b');
  const post = await fetch(s.url('/send?channel=earth'),
    { method: 'POST', body: 'line\nline' });
  assert.equal(await post.text(), 'message sent');
  assert.equal(await a.next(), 'line\nline');
});

test("node's fetch: /messages has text and binary", [], async (s) => {
  const a = await s.client();
  const data = randomBytes(300);
  const texts = ['"\\/\b\f\n\r\t\u0001\u2028', '', '😀', '</script>'];
  for (const text of texts) a.send(text);
  a.send(data);
  a.send(Buffer.alloc(0));
  await a.take(6);
  assert.deepEqual(await s.messages(),
    [...texts, { base64: data.toString('base64') }, { base64: '' }]);
});

async function main() {
  let failed = 0;
  for (const { name, options, run } of cases) {
    let server;
    try {
      server = await Server.start(...options);
      await run(server);
      if (running.has(server.process)) await server.stop();
      console.log(`ok - ws: ${name}`);
    } catch (error) {
      failed++;
      const why = `${error.message}`.replace(/\s+/g, ' ').slice(0, 300);
      const lines = [...error.stack.matchAll(/clients\.js:(\d+)/g)];
      console.log(`FAILED - ws: ${name}: ${why} (lines ${
        lines.map((line) => line[1]).reverse()})`);
      // What the server said may tell more (a sanitizer's report, say).
      const rest = server?.stderr.replace(/^chat: listening.*\n/, '');
      if (rest) console.error(rest);
    }
    for (const left of running) left.kill('SIGKILL');
  }
  process.exit(failed ? 1 : 0);
}

main();
