#!/usr/bin/env node
// The page's class Channel beside the browser's own BroadcastChannel. What the standard says is
// tested by the same code on two tabs each: BroadcastChannel's are of one server, Channel's of two
// instances on a bus. What only Channel has comes after that. Alone: CHAT=./chat node test/channel.js
'use strict'
const fs = require('fs'), os = require('os'), path = require('path')
const { WebSocketServer, assert, test, within, until, new_bus, start, post, ws_open, start_proxy,
  open, close, run } = require('./browser.js')

// Both kinds may be made in a page. `got` are the data of all messages, `told` the other events.
function prepare() {
  window.until = async look => {
    while (!look()) await new Promise(done => setTimeout(done, 5))
  }
  window.made = async (kind, name, options) => {
    const Kind = kind === 'Channel' ? Channel : BroadcastChannel
    const channel = Object.assign(new Kind(name, options), { got: [], told: [] })
    channel.addEventListener('message', event => channel.got.push(event.data))
    for (const type of ['gap', 'sent', 'refused', 'messageerror'])
      channel.addEventListener(type, ({ data }) => channel.told.push([type, data]))
    await until(() => channel.connected !== false)
    return channel
  }
}
const make = (page, ...list) => page.evaluateHandle(list => made(...list), list)
const say = (c, ...list) => c.evaluate((c, list) => list.forEach(data => c.postMessage(data)), list)
const shut = (...list) => Promise.all(list.map(c => c.evaluate(c => c.close())))

// The messages, or other events, when n of them are there.
async function got(channel, n, list = 'got') {
  await within(channel.evaluate((c, [n, list]) => until(() => c[list].length >= n), [n, list]),
    `${n} in ${list}`)
  return channel.evaluate((c, list) => c[list], list)
}

// ---- What the standard says, of either kind.

const THROWS = [
  ['new without a name', 'TypeError', Kind => new Kind()],
  ['a symbol as a name', 'TypeError', Kind => new Kind(Symbol('x'))],
  ['called without new', 'TypeError', Kind => Kind('x')],
  ['a function', 'DataCloneError', (_, c) => c.postMessage(() => 1)],
  ['a symbol', 'DataCloneError', (_, c) => c.postMessage(Symbol('x'))],
  ['a node inside', 'DataCloneError', (_, c) => c.postMessage([document])],
  ['posted when closed', 'InvalidStateError', (_, c) => { c.close(); c.postMessage(1) }]]
const throws = (page, kind, use) => page.evaluate(([kind, use]) => {
  const Kind = kind === 'Channel' ? Channel : BroadcastChannel, c = new Kind('throws')
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
  for (const [what, error, use] of THROWS)
    await test(`${kind}: ${what}: ${error}`, async () => {
      assert.equal(await throws(left, kind, use), error)
    })
  await check('its interface', async c => {
    assert.deepEqual(await c.evaluate(c => [c.name, c.onmessage, c.onmessageerror,
      c instanceof EventTarget, c.postMessage.length, c.close()]),
    ['its interface', null, null, true, 1, undefined])
  })
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
    const all = []
    for (const name of NAMES)
      all.push([name, await make(left, kind, name), await make(right, kind, name)])
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
    await l.evaluate(c => {
      c.postMessage(1)
      c.postMessage(2)
      c.close()
    })
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
  await test('strings travel as text, all else as JSON in binary', async () => {
    const c = await make(page, 'Channel', 'wire'), ws = await ws_open(b, 'wire')
    await say(c, 'plain: text', { a: [1, null] }, undefined, '\ud800')
    await until(() => ws.got.length === 4, 'messages')
    assert.deepEqual(ws.got.map(x => typeof x === 'string' ? x : [`${x}`]),
      ['plain: text', ['{"a":[1,null]}'], ['null'], ['"\\ud800"']])
    for (const data of ['{"history":3}', Buffer.from(' {"a": "é"} '), Buffer.from([255, 128]),
      Buffer.from('{"a":')]) ws.send(data)
    assert.deepEqual((await got(c, 6, 'told')).slice(4), Array(2).fill(['messageerror', null]))
    assert.deepEqual(await got(c, 2), ['{"history":3}', { a: 'é' }])
    ws.terminate()
    await shut(c)
  })
  await test('a name over 64 bytes: TypeError', async () => {
    const use = () => new Channel('é'.repeat(32) + 'x')
    assert.equal(await throws(page, 'Channel', use), 'TypeError')
  })
  await test('with history, it begins with old ones; what it posts at once is sent', async () => {
    for (const text of ['hi', 'hi']) await post(a, 'early', text)
    await page.evaluate(() => {
      window.early = new Channel('early', { history: true })
      early.postMessage('hi')           // not what is in the history
    })
    const c = await make(page, 'Channel', 'early', { history: true })
    assert.deepEqual(await got(c, 3), ['hi', 'hi', 'hi'])
    await page.evaluate(() => early.close())
    await shut(c)
  })
}

async function losses(a, b) {
  const proxy = await start_proxy(b), page = await open(proxy.url)
  await page.evaluate(prepare)
  const lose = c => {
    proxy.down = true
    proxy.cut()
    return within(c.evaluate(c => until(() => !c.connected)), 'loss')
  }
  await test('posted without a connection: sent once, in order', async () => {
    const c = await make(page, 'Channel', 'later'), ws = await ws_open(a, 'later')
    proxy.mute = true
    await say(c, 'arrives', [1])
    await until(() => ws.got.length === 2, 'messages')
    proxy.deaf = true
    await say(c, 'swallowed')
    await lose(c)
    await post(b, 'later', 'same')
    await say(c, 'same', { two: 2 })
    proxy.down = proxy.deaf = proxy.mute = false
    await c.evaluate(c => c.hurry())
    await got(c, 5, 'told')
    await until(() => ws.got.length === 6, 'messages')
    assert.deepEqual(ws.got.map(String),
      ['arrives', '[1]', 'same', 'swallowed', 'same', '{"two":2}'])
    assert.deepEqual(await c.evaluate(c => c.told), [['sent', 'arrives'], ['sent', [1]],
      ['sent', 'swallowed'], ['sent', 'same'], ['sent', { two: 2 }]])
    assert.deepEqual(await got(c, 1), ['same'])
    ws.terminate()
    await shut(c)
  })
  await test('closed without a connection, it does not come back', async () => {
    const c = await make(page, 'Channel', 'gone')
    await lose(c)
    await shut(c)
    proxy.down = false
    await page.evaluate(() => until(() => chat.connected))      // the page's own
    proxy.opened = 0
    await c.evaluate(c => c.hurry())
    await shut(await make(page, 'Channel', 'another'))
    assert.equal(proxy.opened, 1)
  })
  await close(page)
  proxy.close()
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
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'chat-channel-'))
  fs.writeFileSync(path.join(dir, 'index.html'), '<!doctype html><title>another page</title>' +
    `<link rel="icon" href="data:,">${script}<script>var here = new Channel('here')</script>`)
  const a = await start('none', 0, '-d', dir)
  const ready = page => page.waitForFunction(() => here.connected)
  const page = await open(a.url, { ready })
  fs.rmSync(dir, { recursive: true })
  await page.evaluate(prepare)
  await test('the script alone, copied into another page', async () => {
    const ws = await ws_open(a, 'here')
    await page.evaluate(() => here.postMessage('I am here'))
    await until(() => ws.got.includes('I am here'), 'message')
    ws.terminate()
  })
  await test('a server elsewhere, that allows the page', async () => {
    const far = await start('none', 0, '-o', new URL(a.url).origin)
    const c = await make(page, 'Channel', 'far', { server: far.url })
    await post(far, 'far', 'from afar')
    assert.deepEqual(await got(c, 1), ['from afar'])
    await shut(c)
  })
  const fake = new WebSocketServer({ port: 0 }), options =
    { server: `http://localhost:${fake.address().port}/`, history: true }
  const once = list => new Promise(done => fake.once('connection', ws => {
    for (const text of [JSON.stringify({ history: list.length }), ...list]) ws.send(text)
    done(ws)
  }))
  for (const [name, shown, second, more] of MISSED)
    await test(`missed: ${name}`, async () => {
      const first = once(shown), c = await make(page, 'Channel', 'x', options)
      once(second)
      await c.evaluate(c => c.addEventListener('gap', () => c.got.push('-')))
      ;(await first).terminate()
      await within(c.evaluate(c => until(() => !c.connected).then(() => c.hurry())
        .then(() => until(() => c.connected))), 'connection')
      assert.equal((await got(c, 0)).join(''), shown + more)
      await shut(c)
    })
  fake.close()
  await close(page)
}

run(async () => {
  const bus = new_bus(), a = await start(bus), b = await start(bus)
  const one = await open(a.url), two = await open(b.url), same = await one.context().newPage()
  await same.goto(a.url)
  for (const page of [one, same, two]) await page.evaluate(prepare)
  await standard('BroadcastChannel', one, same)
  await standard('Channel', one, two)
  await wire(a, b, one)
  await losses(a, b)
  await copied(/<script>[^]*?<\/script>/.exec(await (await fetch(a.url)).text()))
})
