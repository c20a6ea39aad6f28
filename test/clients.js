// Node's ws and fetch talk to the chat: clients that nobody here wrote.
//
//     node test/clients.js URL URL     (clients.py and tls.py run it)
//
// Clients `a` are at the first URL, clients `b` at the second: the same
// instance, or another one that a bus joins with it. Exits with 0 if all is
// well; else stderr tells what is not.
'use strict'
const assert = require('node:assert/strict')
const { on, once } = require('node:events')
const WebSocket = require('ws')

const [one, two] = process.argv.slice(2)

// `messages` keeps what arrives until somebody asks for it.
async function open(url, path = '/') {
  const client = new WebSocket(url.replace('http', 'ws') + path)
  client.messages = on(client, 'message')
  await once(client, 'open')
  return client
}

// The next messages of all these clients: strings are text, Buffers binary.
async function hear(clients, ...messages) {
  for (const client of clients)
    for (const expected of messages) {
      const [data, binary] = (await client.messages.next()).value
      assert.deepEqual(binary ? data : data.toString(), expected)
    }
}

const tests = {
  async 'text and binary, with each form of the length'() {
    const [a, b] = [await open(one), await open(two)]
    const lines = [0, 1, 125, 126, 32768, 64000].flatMap((size) =>
      ['x'.repeat(size), Buffer.alloc(size, 'ab')])
    for (const data of ['grüße ☃ 😀 <b>"x"</b>\n\0\x7f', ...lines])
      for (const from of [a, b]) {
        from.send(data)
        await hear([a, b], data)
      }
  },

  async 'fragments, also within a character, with pings between'() {
    const [a, b] = [await open(one), await open(two)]
    const bytes = Buffer.from('a☃😀é-'.repeat(50))
    const pongs = on(a, 'pong')
    for (let at = 0; at < bytes.length; at++) {
      const fin = at === bytes.length - 1
      a.send(bytes.subarray(at, at + 1), { binary: false, fin })
      if (at % 100 === 7) a.ping(String(at))
    }
    await hear([a, b], bytes.toString())
    for (let at = 7; at < bytes.length; at += 100)
      assert.equal(String((await pongs.next()).value), String(at))
    a.send(Buffer.from('be'), { fin: false })
    b.send('between')
    await hear([a], 'between')
    a.send(Buffer.from('gin'), { fin: true })
    await hear([b], 'between', Buffer.from('begin'))
  },

  async 'close: the code comes back, and what was sent before it arrives'() {
    const b = await open(two)
    for (const code of [1000, 4999, undefined]) {
      const a = await open(one)
      a.send('last words')
      a.close(code)
      assert.equal((await once(a, 'close'))[0], code ?? 1005)
      await hear([b], 'last words')
    }
  },

  async 'fetch: /send is heard, /messages has text and binary'() {
    const post = { method: 'POST', body: 'a+ü\n"line"\\' }
    const b = await open(two, '/?channel=fetch')
    const answer = await fetch(one + '/send?channel=fetch', post)
    assert.equal(await answer.text(), 'message sent')
    b.send(Buffer.from([0, 255]))
    await hear([b], post.body, Buffer.from([0, 255]))
    const messages = await fetch(two + '/messages?channel=fetch')
    assert.deepEqual(await messages.json(), [post.body, { base64: 'AP8=' }])
  },
}

async function main() {
  let step
  setTimeout(() => { throw new Error(`it does not end: ${step}`) },
    20000 * (process.env.SLOWER || 1))
  for (step in tests) await tests[step]()
  process.exit()
}

main()
