#!/usr/bin/env node
// The page's class Channel beside the browser's own BroadcastChannel. What
// the standard says is tested by one and the same function, on two tabs each:
// for BroadcastChannel of one server, for Channel of two instances on a bus.
// What only Channel has is tested after that.
'use strict'
const fs = require('fs'), os = require('os'), path = require('path')
const { WebSocketServer, assert, test, within, free_udp_port, start, post,
  ws_open, start_proxy, open, visit, close, run } = require('./browser.js')

// Both kinds may be made in a page. `got` are the data of all events so far.
function prepare() {
  window.channel_made = async (kind, name, options) => {
    const channel = kind === 'Channel' ? new Channel(name, options)
      : new BroadcastChannel(name)
    Object.assign(channel, { got: [], told: [] })
    channel.addEventListener('message', event => channel.got.push(event.data))
    for (const type of
      ['open', 'lost', 'sent', 'gap', 'refused', 'messageerror'])
      channel.addEventListener(type, event => channel.told.push(
        event.data === null || event.data === '' ? type : [type, event.data]))
    channel.until = (list, n) => new Promise(done => {
      const timer = setInterval(() => channel[list].length >= n &&
        done(clearInterval(timer)), 5)
    })
    if (channel.connected === false)
      await new Promise(done => channel.addEventListener('open', done))
    return channel
  }
}

const make = (page, kind, name, options) => page.evaluateHandle(
  list => channel_made(...list), [kind, name, options])
const say = (channel, ...list) => channel.evaluate(
  (channel, list) => list.forEach(data => channel.postMessage(data)), list)
const shut = (...list) => Promise.all(
  list.map(channel => channel.evaluate(channel => channel.close())))

// The first n messages, when they are there.
async function got(channel, n) {
  await within(channel.evaluate((c, n) => c.until('got', n), n),
    `${n} messages`)
  return channel.evaluate(channel => channel.got)
}

async function told(channel, type) {
  await within(channel.evaluate((channel, type) => new Promise(done => {
    const find = () => channel.told.some(x => x === type || x[0] === type)
    const timer = setInterval(() => find() && done(clearInterval(timer)), 5)
  }), type), `the event ${type}`)
}

// The name of what is thrown; `use` runs in the page.
const thrown = (page, kind, use) => page.evaluate(([kind, use]) => {
  const Kind = kind === 'Channel' ? Channel : BroadcastChannel
  const uses = {
    'new without a name': () => new Kind(),
    'a symbol as a name': () => new Kind(Symbol('x')),
    'called without new': () => Kind('x'),
    'nothing posted': c => c.postMessage(),
    'a function': c => c.postMessage(() => 1),
    'a symbol': c => c.postMessage(Symbol('x')),
    'a function inside': c => c.postMessage({ a: [1, { b() {} }] }),
    'a node': c => c.postMessage(document.body),
    'a promise': c => c.postMessage(Promise.resolve(1)),
    'posted when closed': c => { c.close(); c.postMessage(1) },
    'a function when closed': c => { c.close(); c.postMessage(() => 1) },
    'a map': c => c.postMessage(new Map([[1, 2]])),
    'a date inside': c => c.postMessage([{ a: new Date(0) }]),
    'bytes': c => c.postMessage(new Uint8Array(3)),
    'no number': c => c.postMessage({ a: NaN }),
    'infinity': c => c.postMessage([-Infinity]),
    'a bigint': c => c.postMessage(1n),
    'a circle': c => { const a = {}; a.a = a; c.postMessage(a) },
    'a name of 65 bytes': () => new Kind('é'.repeat(32) + 'x'),
    'a name of 64 bytes': () => new Kind('é'.repeat(32)).close()
  }
  const channel = window.victim ??= new Kind('victim')
  try { uses[use](channel) } catch (error) { return error.name }
  finally { if (/closed/.test(use)) window.victim = undefined }
  return 'nothing'
}, [kind, use])

// What the standard says, of either kind.
async function standard(kind, left, right) {
  const check = (name, run) => test(`${kind}: ${name}`, run)
  const pair = async name => [await make(left, kind, name),
    await make(right, kind, name)]

  await check('its interface', async () => {
    const c = await make(left, kind, 'interface')
    assert.deepEqual(await c.evaluate(c => [c.name, c.onmessage,
      c.onmessageerror, c instanceof EventTarget, typeof c.postMessage,
      c.postMessage.length, typeof c.close, c.close()]),
    ['interface', null, null, true, 'function', 1, 'function', undefined])
    assert.equal(await c.evaluate(c => c.name), 'interface', 'when closed')
  })
  await check('what is no string makes a name, too', async () => {
    for (const [given, name] of [[17, '17'], [null, 'null'], [[1, 2], '1,2']]) {
      const c = await make(left, kind, given)
      assert.equal(await c.evaluate(c => c.name), name)
      await shut(c)
    }
  })
  for (const [use, error] of [['new without a name', 'TypeError'],
    ['a symbol as a name', 'TypeError'], ['called without new', 'TypeError'],
    ['nothing posted', 'TypeError'], ['a function', 'DataCloneError'],
    ['a symbol', 'DataCloneError'], ['a function inside', 'DataCloneError'],
    ['a node', 'DataCloneError'], ['a promise', 'DataCloneError'],
    ['posted when closed', 'InvalidStateError'],
    ['a function when closed', 'InvalidStateError']])
    await check(`${use}: ${error}`, async () => {
      assert.equal(await thrown(left, kind, use), error)
    })
  await check('one tab to the other, not to itself', async () => {
    const [l, r] = await pair('two tabs')
    await say(l, 'from the left', 'again')
    assert.deepEqual(await got(r, 2), ['from the left', 'again'])
    await say(r, 'from the right')
    assert.deepEqual(await got(l, 1), ['from the right'])
    assert.deepEqual(await got(r, 2), ['from the left', 'again'])
    await shut(l, r)
  })
  await check('the event', async () => {
    const [l, r] = await pair('event')
    const event = r.evaluate(c => new Promise(done => {
      c.onmessage = e => done([e.type, e.data, e.origin === location.origin,
        e.target === c, e.currentTarget === c, e instanceof MessageEvent,
        e.bubbles, e.cancelable, e.lastEventId, e.source, e.ports.length,
        e.eventPhase])
    }))
    await say(l, { a: 1 })
    assert.deepEqual(await within(event, 'an event'), ['message', { a: 1 },
      true, true, true, true, false, false, '', null, 0, 2])
    await shut(l, r)
  })
  await check('data of many kinds', async () => {
    const [l, r] = await pair('data')
    const values = [null, true, false, 0, -1, 1.5, 1e300, 5e-324, 2 ** 53, '',
      'text', 'a\nb', '{"a":1}', 'null', '\0', ' a ', '\ufeff', '🎉 שלום', [],
      {}, [[]], [1, 'two', [3, { four: null }]], { a: { b: [{ c: '' }] } },
      { '': 1, '\0': 2, 'ü': 3, length: 4, constructor: 5, toString: 6 },
      'x'.repeat(60000), { long: 'é'.repeat(20000) },
      Array.from({ length: 1000 }, (_, i) => i), undefined, 'end']
    await say(l, ...values)
    assert.deepEqual(await got(r, values.length), values)
    await shut(l, r)
  })
  await check('data that only the page can make', async () => {
    const [l, r] = await pair('in the page')
    await l.evaluate(c => {
      class Point { constructor() { this.x = 1 } get y() { return 2 } }
      const data = { list: [1] }
      c.postMessage('\ud800 half a pair \udc00')
      c.postMessage(new Point())
      c.postMessage({ a: undefined, b: 1 })
      c.postMessage(data)
      data.list.push(2)             // too late
    })
    await got(r, 4)
    assert.deepEqual(await r.evaluate(c => [
      c.got[0] === '\ud800 half a pair \udc00', c.got[1],
      c.got[2].a === undefined, c.got[2].b, c.got[3]]),
    [true, { x: 1 }, true, 1, { list: [1] }])
    await shut(l, r)
  })
  await check('a thousand messages in their order', async () => {
    const [l, r] = await pair('order')
    const all = Array.from({ length: 1000 }, (_, i) =>
      [i, `text ${i}`, { i }, [i]][i % 4])
    await say(l, ...all)
    assert.deepEqual(await got(r, 1000), all)
    await shut(l, r)
  })
  await check('both talk at once', async () => {
    const [l, r] = await pair('both')
    const all = who => Array.from({ length: 300 }, (_, i) => `${who} ${i}`)
    await Promise.all([say(l, ...all('left')), say(r, ...all('right'))])
    assert.deepEqual(await got(l, 300), all('right'))
    assert.deepEqual(await got(r, 300), all('left'))
    await shut(l, r)
  })
  await check('both say the same at once', async () => {
    const [l, r] = await pair('same')
    const all = Array.from({ length: 300 }, (_, i) => `same ${i}`)
    await Promise.all([say(l, ...all), say(r, ...all)])
    assert.deepEqual(await got(l, 300), all)
    assert.deepEqual(await got(r, 300), all)
    await say(l, 'end')
    await say(r, 'end')
    assert.deepEqual(await got(l, 301), [...all, 'end'])
    assert.deepEqual(await got(r, 301), [...all, 'end'])
    await shut(l, r)
  })
  await check('several of one name on one page hear each other', async () => {
    const [l, r] = await pair('several'), m = await make(left, kind, 'several')
    await say(l, 'one')
    assert.deepEqual(await got(m, 1), ['one'])
    assert.deepEqual(await got(r, 1), ['one'])
    await say(m, 'two')
    assert.deepEqual(await got(l, 1), ['two'])
    assert.deepEqual(await got(r, 2), ['one', 'two'])
    await say(r, 'three')
    assert.deepEqual(await got(l, 2), ['two', 'three'])
    assert.deepEqual(await got(m, 2), ['one', 'three'])
    await shut(l, r, m)
  })
  await check('odd names, each a channel of its own', async () => {
    const names = ['', ' ', '+', '%20', 'a', 'A', 'a&b=c', 'a#b', '?', '/', '"',
      'ü', 'u\u0308', '☃', '👩‍👩‍👧', 'שלום', 'a\nb', '\u0001', '../x', 'history']
    const all = []
    for (const name of names) all.push([name, ...await pair(name)])
    for (const [name, l, r] of all) {
      assert.equal(await l.evaluate(c => c.name), name)
      await say(l, `to ${name}`)
      await got(r, 1)
    }
    for (const [name, l, r] of all) {
      assert.deepEqual(await got(r, 1), [`to ${name}`])
      assert.deepEqual(await got(l, 0), [])
      await shut(l, r)
    }
  })
  await check('onmessage beside addEventListener', async () => {
    const [l, r] = await pair('handlers')
    await r.evaluate(c => {
      c.calls = []
      c.onmessage = () => c.calls.push('replaced')
      const on = function (event) {
        c.calls.push(['on', this === c, event.data])
      }
      c.onmessage = on
      c.same = c.onmessage === on
      c.addEventListener('message', () => c.calls.push('once'), { once: true })
      c.addEventListener('message',
        { handleEvent: () => c.calls.push('object') })
      const removed = () => c.calls.push('removed')
      c.addEventListener('message', removed)
      c.removeEventListener('message', removed)
    })
    await say(l, 1)
    await got(r, 1)
    await r.evaluate(c => { c.was = c.calls; c.calls = [] })
    assert.deepEqual(await r.evaluate(c => [c.same, ...c.was]),
      [true, ['on', true, 1], 'once', 'object'])
    await r.evaluate(c => { c.onmessage = null })
    await say(l, 2)
    await got(r, 2)
    assert.deepEqual(await r.evaluate(c => [c.onmessage, ...c.calls]),
      [null, 'object'])
    await shut(l, r)
  })
  await check('onmessageerror is a handler, too', async () => {
    const c = await make(left, kind, 'error handler')
    assert.deepEqual(await c.evaluate(c => {
      const seen = []
      c.onmessageerror = function (event) { seen.push(this === c, event.type) }
      c.dispatchEvent(new MessageEvent('messageerror'))
      return seen
    }), [true, 'messageerror'])
    await shut(c)
  })
  await check('a listener that throws stops no other', async () => {
    const [l, r] = await pair('throws')
    await r.evaluate(c => {
      c.errors = []
      addEventListener('error', event => {
        event.preventDefault()
        c.errors.push(event.error.message)
      }, { once: true })
      c.addEventListener('message', () => { throw new Error('on purpose') },
        { once: true })
      c.onmessage = () => c.errors.push('called')
    })
    await say(l, 1, 2)
    assert.deepEqual(await got(r, 2), [1, 2])
    assert.equal((await r.evaluate(c => c.errors)).filter(x => x === 'called')
      .length, 2)
    assert.ok((await r.evaluate(c => c.errors)).includes('on purpose'))
    await shut(l, r)
  })
  await check('nothing is delivered before postMessage returns', async () => {
    const l = await make(left, kind, 'later')
    const m = await make(left, kind, 'later')
    assert.equal(await m.evaluate((m, l) => {
      l.postMessage(1)
      return m.got.length
    }, l), 0)
    assert.deepEqual(await got(m, 1), [1])
    await shut(l, m)
  })
  await check('posted at once, closed at once: it arrives', async () => {
    const r = await make(right, kind, 'at once')
    await left.evaluate(kind => {
      const c = kind === 'Channel' ? new Channel('at once')
        : new BroadcastChannel('at once')
      c.postMessage('at once')
      c.postMessage({ and: 'this' })
      c.close()
      c.close()
    }, kind)
    assert.deepEqual(await got(r, 2), ['at once', { and: 'this' }])
    await shut(r)
  })
  await check('closed, it hears no more; the others do', async () => {
    const [l, r] = await pair('close'), m = await make(right, kind, 'close')
    await say(l, 1)
    await got(r, 1)
    await got(m, 1)
    await r.evaluate(c => {
      c.onmessage = () => c.got.push('never')
      c.close()
    })
    await say(l, 2)
    assert.deepEqual(await got(m, 2), [1, 2])
    const again = await make(right, kind, 'close')
    await say(l, 3)
    assert.deepEqual(await got(again, 1), [3], 'nothing of what was before')
    assert.deepEqual(await got(m, 3), [1, 2, 3])
    assert.deepEqual(await got(r, 1), [1])
    await shut(l, again, m)
  })
  await check('closed by its own listener', async () => {
    const [l, r] = await pair('inside'), m = await make(right, kind, 'inside')
    await r.evaluate(c => { c.onmessage = () => c.close() })
    await say(l, 1, 2, 3)
    assert.deepEqual(await got(m, 3), [1, 2, 3])
    assert.deepEqual(await got(r, 1), [1])
    await shut(l, m)
  })
  await check('an answer from within a listener', async () => {
    const [l, r] = await pair('echo')
    await r.evaluate(c => {
      c.onmessage = event => c.postMessage({ answer: event.data })
    })
    await say(l, 1, 'two')
    assert.deepEqual(await got(l, 2), [{ answer: 1 }, { answer: 'two' }])
    await shut(l, r)
  })
  await check('nothing is left of what was refused', async () => {
    const [l, r] = await pair('refusals')
    await l.evaluate(c => {
      for (const bad of [() => 1, Symbol('x'), [document]])
        try { c.postMessage(bad) } catch { /* tested above */ }
      c.postMessage('good')
    })
    assert.deepEqual(await got(r, 1), ['good'])
    await shut(l, r)
  })
}

// What Channel adds: the wire, and what happens to connections.
async function wire(a, b, page) {
  const raw = async (server, name) => {
    const ws = await ws_open(server, name), list = []
    ws.on('message', (data, binary) => list.push([binary, String(data)]))
    ws.until = n => within(new Promise(done => {
      const look = () => list.length >= n && done(list)
      ws.on('message', look)
      look()
    }), `${n} frames`)
    return ws
  }
  await test('strings travel as text, all else as JSON in binary', async () => {
    const c = await make(page, 'Channel', 'wire'), ws = await raw(b, 'wire')
    await say(c, 'plain: text', { a: [1, null] }, 5, null, '', undefined)
    assert.deepEqual(await ws.until(6), [[false, 'plain: text'],
      [true, '{"a":[1,null]}'], [true, '5'], [true, 'null'], [false, ''],
      [true, '']])
    ws.terminate()
    await shut(c)
  })
  await test('what other programs send', async () => {
    const c = await make(page, 'Channel', 'others'), ws = await raw(b, 'others')
    ws.send('{"history":3}')
    ws.send(Buffer.from(' {"a": "é"} '))
    ws.send(Buffer.from([0, 255, 128]))
    ws.send(Buffer.from('{"a":'))
    await post(b, 'others', 'by /send')
    assert.deepEqual(await got(c, 3), ['{"history":3}', { a: 'é' }, 'by /send'])
    assert.deepEqual((await c.evaluate(c => c.told)).filter(x => x !== 'open'),
      ['messageerror', 'messageerror'])
    ws.terminate()
    await shut(c)
  })
  for (const use of ['a map', 'a date inside', 'bytes', 'no number', 'infinity',
    'a bigint', 'a circle'])
    await test(`JSON cannot carry ${use}: DataCloneError`, async () => {
      assert.equal(await thrown(page, 'Channel', use), 'DataCloneError')
    })
  await test('a name has at most 64 bytes', async () => {
    assert.equal(await thrown(page, 'Channel', 'a name of 64 bytes'), 'nothing')
    assert.equal(await thrown(page, 'Channel', 'a name of 65 bytes'),
      'TypeError')
  })
  await test('it begins with as many old messages as wished', async () => {
    const c = await make(page, 'Channel', 'old')
    await say(c, 'one', { two: 2 }, 'three')
    await within(c.evaluate(c => c.until('told', 4)), 'the echoes')
    for (const [history, want] of [[2, [{ two: 2 }, 'three']], [0, []],
      [200, ['one', { two: 2 }, 'three']]]) {
      const late = await make(page, 'Channel', 'old', { history })
      assert.deepEqual(await got(late, want.length), want)
      await shut(late)
    }
    await shut(c)
  })
  await test('what was posted comes back as sent, in its place', async () => {
    const c = await make(page, 'Channel', 'sent'), ws = await raw(b, 'sent')
    await c.evaluate(c => {
      c.all = []
      for (const type of ['message', 'sent'])
        c.addEventListener(type, ({ data }) => c.all.push([type, data]))
      c.postMessage('first')
    })
    await ws.until(1)
    ws.send('second')
    await got(c, 1)
    await say(c, { third: 3 })
    await within(c.evaluate(c => c.until('all', 3)), 'three events')
    assert.deepEqual(await c.evaluate(c => c.all),
      [['sent', 'first'], ['message', 'second'], ['sent', { third: 3 }]])
    ws.terminate()
    await shut(c)
  })
}

async function losses(a, b) {
  const proxy = await start_proxy(b), page = await open(proxy.url)
  await page.evaluate(prepare)
  const lose = async c => {
    await c.evaluate(c => { c.told = [] })
    proxy.down = true
    proxy.cut()
    await told(c, 'lost')
  }
  const find = async c => {
    proxy.down = proxy.deaf = proxy.mute = false
    await page.evaluate(() => dispatchEvent(new Event('online')))
    await told(c, 'open')
  }
  const events = c => c.evaluate(c => c.told.filter(x => Array.isArray(x)))
  await test('missed messages come once, after the connection', async () => {
    await post(b, 'gone', 'before its time')
    const c = await make(page, 'Channel', 'gone')
    await lose(c)
    for (const text of ['hi', 'hi', 'there']) await post(a, 'gone', text)
    await find(c)
    await post(a, 'gone', 'live')
    assert.deepEqual(await got(c, 4), ['hi', 'hi', 'there', 'live'])
    assert.ok(!(await c.evaluate(c => c.told)).includes('gap'))
    await shut(c)
  })
  await test('what is posted without a connection is sent later', async () => {
    const c = await make(page, 'Channel', 'later'), seen = []
    const ws = await ws_open(a, 'later')
    ws.on('message', data => seen.push(String(data)))
    await lose(c)
    await say(c, 'one', { two: 2 }, 'one')
    await find(c)
    await within(c.evaluate(c => c.until('told', 5)), 'the echoes')
    assert.deepEqual(await events(c),
      [['sent', 'one'], ['sent', { two: 2 }], ['sent', 'one']])
    await say(c, 'end')
    await within(new Promise(done => {
      const look = () => seen.includes('end') && done()
      ws.on('message', look)
      look()
    }), 'the end')
    assert.deepEqual(seen, ['one', '{"two":2}', 'one', 'end'])
    assert.deepEqual(await got(c, 0), [])
    ws.terminate()
    await shut(c)
  })
  await test('arrived without an echo, or not arrived: sent once', async () => {
    const c = await make(page, 'Channel', 'half'), ws = await ws_open(a, 'half')
    const seen = []
    ws.on('message', data => seen.push(String(data)))
    const arrives = n => within(new Promise(done => {
      const look = () => seen.length >= n && done()
      ws.on('message', look)
      look()
    }), `${n} messages`)
    proxy.mute = true
    await say(c, 'x', [1])
    await arrives(2)
    proxy.deaf = true
    await say(c, 'y', [2])
    await lose(c)
    await find(c)
    await arrives(4)
    await post(b, 'half', 'end')
    assert.deepEqual(await got(c, 1), ['end'])
    await arrives(5)
    assert.deepEqual(seen, ['x', '[1]', 'y', '[2]', 'end'])
    assert.deepEqual(await events(c),
      [['sent', 'x'], ['sent', [1]], ['sent', 'y'], ['sent', [2]]])
    ws.terminate()
    await shut(c)
  })
  await test('another says what was sent here, but later', async () => {
    const c = await make(page, 'Channel', 'turns')
    proxy.deaf = true
    await say(c, 'x', 'y')
    for (const text of ['y', 'z']) await post(b, 'turns', text)
    assert.deepEqual(await got(c, 2), ['y', 'z'])
    await lose(c)
    await find(c)
    await within(c.evaluate(c => c.until('told', 4)), 'the echoes')
    assert.deepEqual(await events(c), [['sent', 'x'], ['sent', 'y']])
    assert.deepEqual(await got(c, 2), ['y', 'z'])
    await shut(c)
  })
  await test('another says what waits here: both count', async () => {
    const c = await make(page, 'Channel', 'twice')
    await lose(c)
    await say(c, 'hello')
    await post(b, 'twice', 'hello')
    await find(c)
    await told(c, 'sent')
    assert.deepEqual(await got(c, 1), ['hello'])
    const late = await make(page, 'Channel', 'twice', { history: 9 })
    assert.deepEqual(await got(late, 2), ['hello', 'hello'])
    await shut(c, late)
  })
  await test('more missed than the server remembers: gap', async () => {
    const c = await make(page, 'Channel', 'gap')
    await lose(c)
    for (let i = 0; i < 120; i++) await post(b, 'gap', `${i}`)
    await find(c)
    assert.deepEqual(await got(c, 100),
      Array.from({ length: 100 }, (_, i) => `${i + 20}`))
    assert.ok((await c.evaluate(c => c.told)).includes('gap'))
    await shut(c)
  })
  await test('too long for the server: refused, the rest is sent', async () => {
    const c = await make(page, 'Channel', 'long')
    await say(c, 'x'.repeat(50000), 'é'.repeat(40000), 'short')
    await told(c, 'lost')
    await page.evaluate(() => dispatchEvent(new Event('online')))
    await say(c, 'end')
    await within(c.evaluate(c => new Promise(done => {
      const timer = setInterval(() => c.told.some(x => x[1] === 'end') &&
        done(clearInterval(timer)), 5)
    })), 'the end')
    const kinds = (await events(c)).map(([type, data]) => type + data.length)
    assert.deepEqual(kinds.sort(),
      ['refused40000', 'sent3', 'sent5', 'sent50000'])
    await shut(c)
  })
  await test('closed without a connection: posted before, sent after',
    async () => {
      const c = await make(page, 'Channel', 'last words')
      const r = await make(page, 'Channel', 'last words')
      await lose(c)
      await say(c, 'last words')
      await shut(c)
      await post(b, 'last words', 'missed')
      await find(r)
      assert.deepEqual(await got(r, 2), ['missed', 'last words'])
      assert.deepEqual(await c.evaluate(c => [c.got, c.told]), [[], ['lost']])
      const opened = proxy.opened
      await page.evaluate(() => dispatchEvent(new Event('online')))
      await say(r, 'fence')
      await told(r, 'sent')
      assert.equal(proxy.opened, opened, 'a closed one connects again')
      await shut(r)
    })
  await close(page)
  proxy.close()
}

// As the README says: the script is copied into another page.
async function copied(bus) {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'chat-channel-'))
  const whole = fs.readFileSync(path.join(__dirname, '../index.html'), 'utf8')
  const script = /<script>[^]*?<\/script>/.exec(whole)[0]
  fs.writeFileSync(path.join(dir, 'index.html'), `<!doctype html>
    <title>another page</title><link rel="icon" href="data:,">${script}<script>
    const earth = new Channel('earth')
    earth.onmessage = event => document.title = event.data.hello
    earth.postMessage('I am here')
    </script>`)
  try {
    const server = await start(bus, 0, '-d', dir)
    const other = await open(`${(await start(bus)).url}?channel=earth`)
    const page = await open(server.url, {}, page => page.waitForFunction(
      () => earth.connected))
    await test('the script alone, copied into another page', async () => {
      await other.evaluate(() =>
        new Channel('earth').postMessage({ hello: 'it works' }))
      await page.waitForFunction(() => document.title === 'it works')
      await other.waitForFunction(() => /I am here/.test(log.textContent))
    })
    await test('a server elsewhere, that allows the page', async () => {
      const { origin } = new URL(server.url)
      const far = await start('none', 0, '-o', origin)
      page.elsewhere = new URL(far.url).host
      const told = page.evaluate(server => new Promise(done => {
        const channel = new Channel('far', { server })
        channel.onmessage = event => done([event.data, event.origin])
      }), far.url)
      const ws = await ws_open(far, 'far')
      const timer = setInterval(() => ws.send('from afar'), 100)
      assert.deepEqual(await within(told, 'a message'),
        ['from afar', new URL(far.url).origin])
      clearInterval(timer)
      ws.terminate()
    })
    await test('refused is what is longest, whatever came back', async () => {
      let connections = 0
      const fake = new WebSocketServer({ port: 0 })
      fake.on('connection', ws => {
        const first = connections++ === 0, list = []
        ws.send('{"history":0}')
        ws.on('message', (data, binary) => {
          if (!first) ws.send(data, { binary })
          else if (list.push(data) === 4) ws.close(1009)
        })
      })
      page.elsewhere = `localhost:${fake.address().port}`
      const got = page.evaluate(server => new Promise(done => {
        const channel = new Channel('', { server }), got = []
        for (const type of ['refused', 'sent'])
          channel.addEventListener(type, ({ data }) =>
            got.push(type + data.length) === 4 && done(got))
        for (const data of ['a', 'x'.repeat(50000), 'é'.repeat(40000), 'bc'])
          channel.postMessage(data)
      }), `http://${page.elsewhere}/`)
      assert.deepEqual(await within(got, 'four events'),
        ['refused40000', 'sent1', 'sent50000', 'sent2'])
      fake.clients.forEach(ws => ws.terminate())
      fake.close()
    })
    await Promise.all([close(page), close(other)])
  } finally {
    fs.rmSync(dir, { recursive: true })
  }
}

run(async () => {
  const bus = `239.255.80.80:${await free_udp_port()}`
  const a = await start(bus), b = await start(bus)
  const one = await open(a.url), same = await one.context().newPage()
  await visit(same, a.url)
  const two = await open(b.url)
  for (const page of [one, same, two]) await page.evaluate(prepare)
  await standard('BroadcastChannel', one, same)
  await standard('Channel', one, two)
  await wire(a, b, one)
  await Promise.all([close(one), close(two)])
  await losses(a, b)
  await copied(bus)
})
