#!/usr/bin/env node
// The page's class Channel beside the browser's own BroadcastChannel. What the standard says is
// tested by the same code on two tabs each: BroadcastChannel's are of one server, Channel's of two
// instances on a bus. What only Channel has comes after that. Alone: CHAT=./chat node test/channel.js
'use strict'
const { createServer } = require('http'), { WebSocketServer } = require('ws')
const { assert, test, until, new_bus, start, post, ws_open, start_proxy, open, run } =
  require('./browser.js')

// `got` are the data of all messages, with a - for each gap; `told` the other events.
async function make(page, ...list) {
  const channel = await page.evaluateHandle(([kind, name, options]) => {
    const c = Object.assign(new (eval(kind))(name, options), { got: [], told: [] })
    c.addEventListener('message', event => c.got.push(event.data))
    c.addEventListener('gap', () => c.got.push('-'))
    for (const type of ['sent', 'refused', 'messageerror'])
      c.addEventListener(type, event => c.told.push([type, event.data]))
    return c
  }, list)
  await is_connected(channel)
  return channel
}
const is_connected = (channel, yes = true) =>       // BroadcastChannel always is
  until(() => channel.evaluate((c, yes) => (c.connected ?? true) === yes, yes), `connected: ${yes}`)
const say = (c, ...list) => c.evaluate((c, list) => list.forEach(data => c.postMessage(data)), list)
const shut = (...list) => Promise.all(list.map(c => c.evaluate(c => c.close())))

// The messages, or other events, when n of them are there.
const got = (channel, n, list = 'got') => until(() => channel.evaluate((c, [n, list]) =>
  c[list].length >= n && c[list], [n, list]), `${n} in ${list}`)

// ---- What the standard says, of either kind.

const THROWS = [
  ['new without a name', 'TypeError', Kind => new Kind()],
  ['a symbol as a name', 'TypeError', Kind => new Kind(Symbol('x'))],
  ['called without new', 'TypeError', Kind => Kind('x')],
  ['a symbol', 'DataCloneError', (_, c) => c.postMessage(Symbol('x'))],
  ['a node inside', 'DataCloneError', (_, c) => c.postMessage([document])],
  ['posted when closed', 'InvalidStateError', (_, c) => { c.close(); c.postMessage(1) }]]
const throws = (page, kind, use) => page.evaluate(([kind, use]) => {
  const Kind = eval(kind), c = new Kind('throws')
  try { eval(use)(Kind, c) } catch (error) { return error.name } finally { c.close() }
}, [kind, `${use}`])

const VALUES = [null, true, 0, -1, 1.5, 1e300, 5e-324, 2 ** 53, '', 'text', 'a\nb', '{"a":1}',
  'null', '\0', ' a ', '\ufeff', '🎉 שלום', [], {}, [[]], [1, 'two', [3, { four: null }]],
  { '': 1, 'ü': 2, toString: 3 }, 'C:\\udata', '\ud800 half a pair', 'x'.repeat(60000), 'end']
const NAMES = ['', ' ', '+', '%20', 'a', 'A', 'a&b=c', '#', '../x', 'u\u0308', 'a\nb', 'é'.repeat(32)]

async function standard(kind, left, right) {
  // A case with a channel on the left and one on the right.
  const check = (name, run) => test(`${kind}: ${name}`, async () => {
    const l = await make(left, kind, name), r = await make(right, kind, name)
    await run(l, r)
    await shut(l, r)
  })
  await test(`${kind}: what throws`, async () => {
    for (const [what, error, use] of THROWS)
      assert.equal(await throws(left, kind, use), error, what)
  })
  await check('its interface', async c =>
    assert.deepEqual(await c.evaluate(c => [c.name, c.onmessage, c.onmessageerror,
      c instanceof EventTarget, c.postMessage.length, c.close()]),
    ['its interface', null, null, true, 1, undefined]))
  await check('data of many kinds, in order, as they were, not to itself', async (l, r) => {
    await say(l, ...VALUES)
    await l.evaluate(c => {
      const list = [1]
      c.postMessage(list)
      list.push(2)
    })
    assert.deepEqual(await got(r, VALUES.length + 1), [...VALUES, [1]])
    await say(r, 'answer')
    assert.deepEqual(await got(l, 1), ['answer'])
  })
  await check('the event, and an answer from within its handler', async (l, r) => {
    await r.evaluate(c => {
      c.onmessage = function (e) {
        c.postMessage([this === c, e.type, e.data, e.origin === location.origin, e.target === c,
          e instanceof MessageEvent, e.bubbles, e.ports.length])
      }
    })
    await say(l, { a: 1 })
    assert.deepEqual(await got(l, 1), [[true, 'message', { a: 1 }, true, true, true, false, 0]])
  })
  await check('handlers and listeners; one that throws stops no other', async (l, r) => {
    await r.evaluate(c => {
      c.calls = []
      addEventListener('error', event => {
        event.preventDefault()
        c.calls.push(event.error)
      }, { once: true })
      c.onmessage = () => c.calls.push('replaced')
      c.onmessage = () => { throw 'handler' }
      c.addEventListener('message', () => c.calls.push('once'), { once: true })
      c.onmessageerror = event => c.calls.push(event.type)
      c.dispatchEvent(new MessageEvent('messageerror'))
    })
    await say(l, 1)
    await got(r, 1)
    await r.evaluate(c => { c.onmessage = null })
    await say(l, 2)
    await got(r, 2)
    assert.deepEqual(await r.evaluate(c => c.calls), ['messageerror', 'handler', 'once'])
  })
  await check('both say the same at once', async (l, r) => {
    const all = Array.from({ length: 300 }, (_, i) => `same ${i}`)
    await Promise.all([say(l, ...all), say(r, ...all)])
    for (const c of [l, r]) assert.deepEqual(await got(c, 300), all)
    await say(l, 'end')
    assert.deepEqual(await got(r, 301), [...all, 'end'])
  })
  await test(`${kind}: odd names, each a channel of its own`, async () => {
    const all = await Promise.all(NAMES.map(async name =>
      [name, await make(left, kind, name), await make(right, kind, name)]))
    for (const [name, l] of all) await say(l, `to ${name}`)
    for (const [name, l, r] of all) {
      assert.deepEqual(await got(r, 1), [`to ${name}`])
      assert.deepEqual(await l.evaluate(c => [c.name, c.got]), [name, []])
    }
    for (const [, l, r] of all) await shut(l, r)
  })
  await check('closed, it hears no more, but what it said arrives', async (l, r) => {
    const name = await l.evaluate(c => c.name), m = await make(right, kind, name)
    await m.evaluate(c => { c.onmessage = () => c.close() })
    await say(l, 1, 2)
    await shut(l)
    assert.deepEqual(await got(r, 2), [1, 2])
    assert.deepEqual(await got(m, 1), [1], 'closed by its own listener')
    const again = await make(left, kind, name)
    await say(r, 3)
    assert.deepEqual(await got(again, 1), [3], 'nothing of what was before')
    assert.deepEqual(await got(l, 0), [])
    await shut(again)
  })
}

// ---- What Channel adds.

async function wire(a, b, page) {
  await test('strings travel as text, all else as JSON in binary, but what is too long', async () => {
    const c = await make(page, 'Channel', 'wire'), ws = await ws_open(b, 'wire')
    await say(c, 'plain: text', { a: [1, null] }, undefined, '\ud800', 'y'.repeat(70000), 'z')
    await until(() => ws.got.length === 5, 'messages')
    assert.deepEqual(ws.got.map(x => typeof x === 'string' ? x : [`${x}`]),
      ['plain: text', ['{"a":[1,null]}'], ['null'], ['"\\ud800"'], 'z'])
    for (const data of ['{"history":3}', Buffer.from(' {"a": "é"} '), Buffer.from([255, 128]),
      Buffer.from('{"a":')]) ws.send(data)
    assert.deepEqual((await got(c, 8, 'told')).map(([type]) => type).slice(4),
      ['refused', 'sent', 'messageerror', 'messageerror'])
    assert.deepEqual(await got(c, 2), ['{"history":3}', { a: 'é' }])
  })
  await test('a name over 64 bytes: TypeError', async () =>
    assert.equal(await throws(page, 'Channel', () => new Channel('é'.repeat(32) + 'x')), 'TypeError'))
  await test('with history, it begins with old ones; what it posts at once is sent', async () => {
    for (const text of ['hi', 'hi']) await post(a, 'early', text)
    await page.evaluate(() => new Channel('early', { history: true })
      .postMessage('hi'))               // not what is in the history
    const c = await make(page, 'Channel', 'early', { history: true })
    assert.deepEqual(await got(c, 3), ['hi', 'hi', 'hi'])
  })
}

async function losses(a, b) {
  const proxy = await start_proxy(b), page = await open(proxy.url)
  const lose = c => {
    proxy.fault = 'down'
    proxy.cut()
    return is_connected(c, false)
  }
  await test('posted without a connection: sent once, in order', async () => {
    const c = await make(page, 'Channel', 'later'), ws = await ws_open(a, 'later')
    proxy.fault = 'mute'
    await say(c, 'arrives', [1])
    await until(() => ws.got.length === 2, 'messages')
    proxy.fault = 'deaf'
    await say(c, 'swallowed')
    await lose(c)
    await post(b, 'later', 'same')
    await say(c, 'same', { two: 2 })
    proxy.fault = ''
    await c.evaluate(c => c.hurry())
    assert.deepEqual(await got(c, 5, 'told'), [['sent', 'arrives'], ['sent', [1]],
      ['sent', 'swallowed'], ['sent', 'same'], ['sent', { two: 2 }]])
    await until(() => ws.got.length === 6, 'messages')
    assert.deepEqual(ws.got.map(String),
      ['arrives', '[1]', 'same', 'swallowed', 'same', '{"two":2}'])
    assert.deepEqual(await got(c, 1), ['same'])
    await shut(c)
  })
  await test('closed without a connection, it does not come back', async () => {
    const c = await make(page, 'Channel', 'gone')
    await lose(c)
    await shut(c)
    proxy.fault = ''
    await page.waitForFunction(() => chat.connected)        // the page's own
    proxy.opened = 0
    await c.evaluate(c => c.hurry())
    await make(page, 'Channel', 'another')
    assert.equal(proxy.opened, 1)
  })
}

// What is shown after a connection was lost. Each letter is a message; a - says that something may
// be missing or repeated here.
const MISSED = [                  // shown, the new history, shown after that
  ['nothing', '', '', ''], ['the first ones', '', 'abc', 'abc'], ['all forgotten', 'abc', '', '-'],
  ['no news', 'abc', 'abc', ''], ['some news', 'abc', 'bcde', 'de'],
  ['an old text again', 'xabc', 'abcx', 'x'], ['the same text again', 'hh', 'hhh', 'h'],
  ['others', 'abc', 'xyz', '-xyz'], ['an old one is lost', 'abcde', 'bdefghij', '-fghij'],
  ['another order', 'abhde', 'badhehf', '-hf'], ['an old text in news', 'abcd', 'xyaz', '-xyaz']]

// The class's script, copied into another page as the README says. That may go to other servers.
async function copied(script) {
  const copy = createServer((_, answer) => answer.end('<!doctype html><title>another page</title>' +
    `<link rel="icon" href="data:,">${script}<p id="state">Connected`))         // as open() wants it
  await new Promise(done => copy.listen(0, 'localhost', done))
  const origin = `http://localhost:${copy.address().port}`, page = await open(origin)
  await test('copied into another page, with a server elsewhere that allows it', async () => {
    const far = await start('none', 0, '-o', origin)
    const c = await make(page, 'Channel', 'far', { server: far.url })
    await post(far, 'far', 'from afar')
    assert.deepEqual(await got(c, 1), ['from afar'])
    await shut(c)
  })
  const fake = new WebSocketServer({ port: 0 })
  const options = { server: `http://localhost:${fake.address().port}/`, history: true }
  const connection = history => new Promise(done => fake.once('connection', ws => {
    for (const text of [`{"history":${history.length}}`, ...history]) ws.send(text)
    done(ws)
  }))
  for (const [name, shown, history, more] of MISSED)
    await test(`missed: ${name}`, async () => {
      const first = connection(shown), c = await make(page, 'Channel', 'x', options)
      const second = connection(history)
      ;(await first).terminate()
      await second
      await is_connected(c)
      assert.equal((await got(c, 0)).join(''), shown + more)
      await shut(c)
    })
}

run(async () => {
  const bus = new_bus(), a = await start(bus), b = await start(bus)
  const one = await open(a.url), two = await open(b.url), same = await one.context().newPage()
  await same.goto(a.url)
  await standard('BroadcastChannel', one, same)
  await standard('Channel', one, two)
  await wire(a, b, one)
  await losses(a, b)
  await copied(/<script>[^]*?<\/script>/.exec(await (await fetch(a.url)).text()))
})
