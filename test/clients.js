// Node's ws, fetch and http talk to the chat: clients that nobody here wrote.
//
//     node test/clients.js KIND URL URL     (clients.py and tls.py run it)
//
// Clients `a` are at the first URL, clients `b` at the second: the same
// instance, or another one that a bus joins with it. The last test lets ws
// judge streams of frames, good, bad and random, beside the chat: both must
// take the same messages out of them and end with the same code.
'use strict'
const assert = require('node:assert/strict')
const { once } = require('node:events')
const WebSocket = require('ws')

const [kind, one, two] = process.argv.slice(2)
const SECONDS = 10 * (process.env.SLOWER || 1)          // what a wait may take
const MOST = 64000                                      // bytes of a message

// Rejects with a clear message where the promise takes too long.
function within(promise, what) {
  let timer
  const late = new Promise((_, no) => {
    timer = setTimeout(() => no(new Error(`${what}: not within ${SECONDS} s`)),
      SECONDS * 1000)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

// Keeps what arrives until somebody asks for it: a string for a text message,
// a Buffer for a binary one.
class Client {
  constructor(url, path, options) {
    this.got = []
    this.socket = new WebSocket(url.replace('http', 'ws') + path, options)
    this.closed = new Promise((done) => this.socket.on('close', done))
    this.socket.on('message', (data, binary) => {
      this.got.push(binary ? data : data.toString())
      this.wake?.()
    })
    this.socket.on('error', () => {})                   // 'close' follows
  }

  async hears(...messages) {
    for (const expected of messages) {
      while (this.got.length === 0)
        await within(new Promise((done) => { this.wake = done }),
          `message ${String(expected).slice(0, 60)}`)
      assert.deepEqual(this.got.shift(), expected)
    }
  }

  send(message, options = {}) { this.socket.send(message, options) }
  end(code) { this.socket.close(code); return this.code() }
  code() { return within(this.closed, 'the end') }
}

async function open(url, path = '/', options = {}) {
  const client = new Client(url, path, options)
  await within(once(client.socket, 'open'), 'the handshake')
  return client
}

const tests = {
  async 'text and binary, with each form of the length'() {
    const [a, b] = [await open(one), await open(two)]
    for (const size of [0, 1, 125, 126, 32768, MOST])
      for (const data of ['x'.repeat(size), Buffer.alloc(size, 'ab')])
        for (const from of [a, b]) {
          from.send(data)
          await Promise.all([a.hears(data), b.hears(data)])
        }
    const text = 'grüße ☃ 😀 <b>"x"</b>\n\0\x7f'
    a.send(text)
    await b.hears(text)
  },

  async 'fragments, also within a character, with pings between'() {
    const [a, b] = [await open(one), await open(two)]
    a.socket.ping('y'.repeat(125))
    const [pong] = await within(once(a.socket, 'pong'), 'pong')
    assert.equal(pong.toString(), 'y'.repeat(125))
    const bytes = Buffer.from('a☃😀é-'.repeat(50))
    for (let at = 0; at < bytes.length; at++) {
      const fin = at === bytes.length - 1
      a.send(bytes.subarray(at, at + 1), { binary: false, fin })
      if (at % 100 === 7) a.socket.ping(String(at))
    }
    await Promise.all([a.hears(bytes.toString()), b.hears(bytes.toString())])
    a.send(Buffer.from('be'), { fin: false })
    b.send('between')
    await a.hears('between')
    a.send(Buffer.from('gin'), { fin: true })
    await b.hears('between', Buffer.from('begin'))
  },

  async 'close: the code comes back, and what was sent before it arrives'() {
    const b = await open(two)
    for (const code of [1000, 1001, 1011, 3000, 4999, undefined]) {
      const a = await open(one)
      a.send('last words')
      assert.equal(await a.end(code), code ?? 1005)
      await b.hears('last words')
    }
  },

  async 'history: its count, the last ones, then what comes'() {
    const early = await open(one, '/?channel=h&history=10')
    await early.hears('{"history":0}')
    const sent = Array.from({ length: 20 }, (_, i) => i % 5 ? `text ${i}`
      : Buffer.from([i]))
    for (const message of sent) early.send(message)
    await early.hears(...sent)
    const late = await open(one, '/deep/path?history=3&channel=%68')
    await late.hears('{"history":3}', ...sent.slice(17))
    const all = await open(one, '/?history=1000&channel=h')
    await all.hears('{"history":20}', ...sent)
    late.send('live')
    for (const client of [early, late, all]) await client.hears('live')
  },

  async 'no compression is agreed on'() {
    const a = await open(one, '/', { perMessageDeflate: true })
    assert.equal(a.socket.extensions, '')
    a.send('a'.repeat(2000), { compress: true })
    await a.hears('a'.repeat(2000))
  },

  async 'fetch: /send is heard, /messages has text and binary'() {
    const b = await open(two, '/?channel=fetch')
    const get = (path, options) => fetch(one + path, options)
    const text = 'a+ü b'
    await get('/send?channel=fetch&message=' + encodeURIComponent(text))
    const post = { method: 'POST', body: 'line\n"line"\\' }
    assert.equal(await (await get('/send?channel=fetch', post)).text(),
      'message sent')
    b.send(Buffer.from([0, 255]))
    await b.hears(text, post.body, Buffer.from([0, 255]))
    assert.deepEqual(await (await fetch(two + '/messages?channel=fetch')).json(),
      [text, post.body, { base64: 'AP8=' }])
    const stream = new Blob(['in chunks']).stream()     // no Content-Length
    assert.equal((await get('/send', { method: 'POST', body: stream,
      duplex: 'half' })).status, 411)
  },

  async 'streams of frames: ws and the chat judge alike'() {
    let seed = 1, bad = 0
    const random = (n) => {                             // repeatable
      seed = (seed * 1103515245 + 12345) % 2 ** 31
      return Math.floor(seed / 65536) % n
    }
    const [b, last] = [await open(two, '/?channel=judge'),
      await open(one, '/?channel=judge')]
    for (let round = 0; round < 300; round++) {
      const { bytes, sure } = stream(random), judge = await judged(bytes)
      const a = await open(one, '/?channel=judge')
      const cut = random(bytes.length)                  // in two pieces
      a.socket._socket.write(bytes.subarray(0, cut))
      await new Promise(setImmediate)
      a.socket._socket.write(bytes.subarray(cut))
      const code = await a.code()
      last.send(`end of ${round}`)
      const what = `round ${round}, ${bytes.toString('hex').slice(0, 300)}`
      await b.hears(...judge.got, `end of ${round}`).catch((error) => {
        throw new Error(`${what}: ${error.message}`)
      })
      assert.deepEqual(a.got, judge.got.slice(0, a.got.length), what)
      // UTF-8 may be judged before the message ends.
      if (sure || code !== 1007) assert.equal(code, judge.code, what)
      else assert.ok([1002, 1007, 1009].includes(judge.code), what)
      bad += judge.code !== 1000
    }
    return `300 streams, ${bad} of them bad`
  },
}

// A masked frame.
function frame(start, payload, random) {
  const size = payload.length
  const head = size < 126 ? [size] : size < 65536 ? [126, size >> 8, size & 255]
    : [127, 0, 0, 0, 0, 0, size >> 16, size >> 8 & 255, size & 255]
  head[0] |= 0x80
  const mask = [0, 0, 0, 0].map(() => random(256))
  return Buffer.from([start, ...head, ...mask,
    ...payload.map((byte, i) => byte ^ mask[i % 4])])
}

// Some messages, whole and in fragments, with pings between, then a fault or
// none, then a close. Where bytes are changed at random, it is not `sure` that
// there is but one fault.
function stream(random) {
  const of = (list) => list[random(list.length)]
  const text = () => Buffer.from(of(['', 'x', 'é☃😀', 'ab\0', '\u{10ffff}'])
    .repeat(of([1, 1, 40, 900])))
  const frames = []
  for (let n = random(5); n > 0; n--) {
    const data = text(), opcode = of([1, 2])
    const cuts = [0, ...Array.from({ length: of([0, 0, 1, 3]) },
      () => random(data.length + 1)).sort((x, y) => x - y), data.length]
    for (let i = 1; i < cuts.length; i++) {
      if (random(4) === 0)
        frames.push(frame(of([0x89, 0x8a]), text().subarray(0, 125), random))
      frames.push(frame((i === cuts.length - 1 ? 0x80 : 0) |
        (i === 1 ? opcode : 0), data.subarray(cuts[i - 1], cuts[i]), random))
    }
  }
  const fault = of([[], [], [], [0x83], [0x87], [0x8b], [0x8f], [0xc1], [0xa1],
    [0x91], [0x80], [0x00], [0x09], [0x08], [0x89, 126], [0x81, 3, 'ff'],
    [0x81, 0, 'c080'], [0x81, 0, 'eda080'], [0x81, 0, 'f4908080'],
    [0x81, 0, 'e298'], [0x88, 0, '03'], [0x88, 0, '03ed'], [0x88, 0, '03e7'],
    [0x88, 0, '1387'], [0x88, 0, '1388'], [0x88, 0, '03e8ff'], [0x88, 0, ''],
    [0x88, 0, '0bb8c3a9'], [0x81, MOST + 1], [0x82, 70000]])
  if (fault.length > 0)
    frames.push(frame(fault[0], fault[2] === undefined
      ? Buffer.alloc(fault[1] || 0) : Buffer.from(fault[2], 'hex'), random))
  frames.push(frame(0x88, Buffer.from([3, 232]), random))
  const bytes = Buffer.concat(frames), sure = random(3) > 0
  for (let n = sure ? 0 : 1 + random(3); n > 0; n--)
    bytes[random(bytes.length)] ^= 1 << random(8)
  // What is cut short by a change would be waited for: so all is filled up.
  return { bytes: sure ? bytes : Buffer.concat([bytes, Buffer.alloc(MOST * 2)]),
    sure }
}

// What the receiver of ws takes out of it, and with which code it ends.
async function judged(bytes) {
  const receiver = new WebSocket.Receiver({ isServer: true, maxPayload: MOST })
  const got = []
  receiver.on('message', (data, binary) =>
    got.push(binary ? data : data.toString()))
  const code = new Promise((done) => {
    receiver.on('conclude', done)
    receiver.on('error', (error) => done(error[Object.getOwnPropertySymbols(
      error).find((symbol) => symbol.description === 'status-code')]))
  })
  receiver.write(Buffer.from(bytes))                    // it unmasks in place
  return { got, code: await within(code, 'the verdict') }
}

async function main() {
  for (const [name, run] of Object.entries(tests))
    try {
      const figures = await run()
      console.log(`ok - clients: ws, ${kind}: ${name}` +
        (figures ? ` (${figures})` : ''))
    } catch (error) {
      process.exitCode = 1
      const line = /clients\.js:(\d+)/.exec(error.stack.split('main')[0])
      console.log(`FAILED - clients: ws, ${kind}: ${name}: ` +
        `${error.message.replace(/\s+/g, ' ').slice(0, 600)} (line ${line?.[1]})`)
    }
  process.exit()
}

main()
