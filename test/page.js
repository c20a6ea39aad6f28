#!/usr/bin/env node
// The page in a real browser, against two real instances of the program in
// $CHAT on a bus of their own. Prints a line for each case.
'use strict'
const { assert, test, within, free_udp_port, start, stop, post, ws_open,
  start_proxy, open, visit, close, connected, disconnected, messages, notes,
  waiting, shows, type, run } = require('./browser.js')

async function two_instances(a, b) {
  const left = await open(a.url), right = await open(b.url)
  await test('the page is served with a strict policy', async () => {
    const policy = left.answer.headers()['content-security-policy']
    assert.match(policy, /default-src 'none'/)
    assert.match(policy, /connect-src 'self'/)
    assert.doesNotMatch(policy, /https?:|\*/)
  })
  await test('typed on one instance, shown on the other', async () => {
    await type(left, 'from the left')
    await shows(right, 'from the left')
    await shows(left, 'from the left')
  })
  await test('and the other way, with a name', async () => {
    await right.fill('#nick', 'Réné')
    await type(right, 'from the right')
    await shows(left, 'Réné: from the right')
    await shows(right, 'Réné: from the right')
    assert.deepEqual(await waiting(right), [])
    assert.equal(await right.inputValue('#text'), '')
  })
  await test('markup is shown as text', async () => {
    const evil = '<img src=x onerror="alert(1)"><script>alert(2)</script>'
    await type(left, evil)
    await left.fill('#nick', '<b>me</b>')
    await type(left, evil)
    await shows(right, evil)
    await shows(right, `<b>me</b>: ${evil}`)
    assert.equal(await right.$$eval('main img, main script, main p p',
      list => list.length), 0)
  })
  await test('emoji, right-to-left, spaces and odd texts', async () => {
    const texts = ['👩‍👩‍👧‍👦 🎉', 'שלום עולם', '  a  b ', ': ', 'a: b: c', 'http://x: y']
    await left.fill('#nick', '')
    for (const text of texts) await type(left, text)
    for (const text of texts) await shows(right, text)
    assert.equal(await right.evaluate(() => getComputedStyle(
      [...document.querySelectorAll('#log p')]
        .find(p => p.textContent === 'שלום עולם')).direction), 'rtl')
  })
  await test('a binary message', async () => {
    const ws = await ws_open(b, '')
    ws.send(Buffer.from([0, 255, 128, 7, 9]))
    await shows(left, '[binary message]')
    ws.terminate()
  })
  await test('the history is there on load', async () => {
    const late = await open(a.url)
    await late.waitForFunction(n => document.querySelectorAll('#log p').length
      >= n, (await messages(left)).length)
    assert.deepEqual(await messages(late), await messages(left))
    assert.deepEqual(await notes(late), [])
    await close(late)
  })
  await test('channels are separate', async () => {
    const earth = await open(`${a.url}?channel=earth%20%26+moon`)
    const there = await open(`${b.url}?channel=earth%20%26%20moon`)
    assert.equal(await earth.inputValue('#channel'), 'earth & moon')
    assert.match(await earth.title(), /earth & moon/)
    await type(earth, 'only on earth')
    await type(left, 'only outside')
    await shows(there, 'only on earth')
    await shows(right, 'only outside')
    assert.deepEqual(await messages(there), ['only on earth'])
    assert.ok(!(await messages(right)).includes('only on earth'))
    await Promise.all([close(earth), close(there)])
  })
  await Promise.all([close(left), close(right)])
}

// What the page makes of a history. Each letter is a message.
async function overlap(a) {
  const page = await open(`${a.url}?channel=overlap`)
  const long = 'abcdefghijklmnopqrstuvwxyz'
  const table = [
    ['nothing shown yet', '', 'abc', 'abc'],
    ['an empty history', 'abc', '', ''],
    ['nothing new', 'abc', 'abc', ''],
    ['one new', 'abc', 'bcd', 'd'],
    ['the same text again', 'hh', 'hhh', 'h'],
    ['the same text twice', 'abh', 'abhhh', 'hh'],
    ['a text from long ago', 'H' + long, long + 'H', 'H'],
    ['a restarted server, empty before', 'abc', 'xyz', 'xyz'],
    ['a restarted server that knows others', 'AbCdEf', 'bdfg', 'g'],
    ['one that knows the first alone', 'xaby', 'xz', 'z'],
    ['new ones, one as an old one', long, 'Xc', 'Xc'],
    ['two swapped', 'abcde', 'abced', ''],
    ['two swapped, one new', 'abcde', 'abcedf', 'f'],
    ['two swapped at the start', 'abcd', 'bacdz', 'z'],
    ['three turned round', 'abcde', 'acebdf', 'f'],
    ['one that was late', 'abcde', 'abxcde', 'x'],
    ['older ones that were never shown', 'defg', 'abdefgh', 'abh']]
  for (const [name, shown, history, want] of table)
    await test(`overlap: ${name}`, async () => {
      const got = await page.evaluate(([shown, history]) =>
        Channel.unseen([...shown], [...history]).join(''),
      [shown, history])
      assert.equal(got, want)
    })
  await test('overlap: 1000 messages in less than a second', async () => {
    const [left, ms] = await page.evaluate(() => {
      const text = (_, i) => 'message ' + i, before = performance.now()
      const all = Array.from({ length: 1600 }, text)
      const left = Channel.unseen(all.slice(0, 1000), all.slice(600))
      return [left.length, performance.now() - before]
    })
    assert.equal(left, 600)
    assert.ok(ms < 1000, `${ms} ms`)
  })
  await close(page)
}

// An instance is restarted while messages flow through the other one.
async function restart(servers, signal) {
  const { a, b } = servers
  const channel = `restart ${signal}`
  const query = `?channel=${encodeURIComponent(channel)}`
  const left = await open(a.url + query), right = await open(b.url + query)
  const sent = [], typed = []
  const ws = await ws_open(b, channel)
  const flow = setInterval(() => {
    sent.push(sent.length % 4 ? `bob: ${sent.length}` : 'bob: hi')
    ws.send(sent[sent.length - 1])
  }, 30)
  const until = n => within(new Promise(done => {
    const timer = setInterval(() => sent.length >= n &&
      done(clearInterval(timer)), 5)
  }), 'messages to flow')
  try {
    for (let i = 1; i <= 3; i++) {
      await type(left, `ann: ${i}`)
      typed.push(`ann: ${i}`)
      await shows(right, `ann: ${i}`)
      await until(sent.length + 4)
    }
    const how = await stop(a, signal)
    assert.equal(how, signal === 'SIGTERM' ? 0 : signal, 'exit status')
    await disconnected(left)
    await type(left, 'ann: typed while it was down')
    typed.push('ann: typed while it was down')
    assert.deepEqual(await waiting(left), ['ann: typed while it was down'])
    await until(sent.length + 10)
    servers.a = await start(a.bus, a.port)
    await connected(left)
    await until(sent.length + 5)
  } finally {
    clearInterval(flow)
  }
  await type(left, 'ann: last')
  typed.push('ann: last')
  await shows(right, 'ann: last')
  await post(b, channel, 'carl: end')
  await shows(left, 'carl: end')
  await shows(right, 'carl: end')
  for (const page of [left, right]) {
    const got = await messages(page)
    const from = name => got.filter(text => text.startsWith(name))
    assert.deepEqual(from('bob'), sent, 'what the other instance sent')
    assert.deepEqual(from('ann'), typed, 'what was typed')
    assert.deepEqual(await notes(page), [])
  }
  assert.deepEqual(await waiting(left), [])
  ws.terminate()
  await Promise.all([close(left), close(right)])
}

// The network fails between the page and a server that stays.
async function network(b) {
  const proxy = await start_proxy(b)
  const page = await open(`${proxy.url}?channel=net#fragment`)
  const lose = async () => {
    proxy.down = true
    proxy.cut()
    await disconnected(page)
  }
  const find = async () => {
    proxy.down = proxy.deaf = proxy.mute = false
    await page.evaluate(() => dispatchEvent(new Event('online')))
    await connected(page)
  }
  let all = ['one', 'two', 'hi', 'hi']
  await test('behind a proxy, under another path', async () => {
    for (const text of all) await type(page, text)
    await shows(page, 'hi')
    await page.waitForFunction(() => log.children.length === 4)
    assert.deepEqual(await messages(page), all)
  })
  await test('connection lost: what was missed is shown once', async () => {
    await lose()
    const missed = ['hi', 'three', 'hi', 'hi', 'one']
    for (const text of missed) await post(b, 'net', text)
    await find()
    await post(b, 'net', 'four')
    await shows(page, 'four')
    all.push(...missed, 'four')
    assert.deepEqual(await messages(page), all)
    assert.deepEqual(await notes(page), [])
  })
  await test('connection lost: nothing typed is lost', async () => {
    await lose()
    await type(page, 'typed offline')
    await type(page, 'this, too')
    assert.deepEqual(await waiting(page), ['typed offline', 'this, too'])
    assert.match(await page.textContent('#state'), /2 to be sent/)
    await page.fill('#text', 'a draft')
    await find()
    await shows(page, 'this, too')
    all.push('typed offline', 'this, too')
    assert.deepEqual(await messages(page), all)
    assert.deepEqual(await waiting(page), [])
    assert.equal(await page.inputValue('#text'), 'a draft')
  })
  await test('sent, but not arrived: sent again', async () => {
    proxy.deaf = true
    await type(page, 'swallowed')
    assert.deepEqual(await waiting(page), ['swallowed'])
    await lose()
    await find()
    await shows(page, 'swallowed')
    all.push('swallowed')
    assert.deepEqual(await messages(page), all)
  })
  await test('arrived, but without an echo: not sent again', async () => {
    const ws = await ws_open(b, 'net'), got = []
    ws.on('message', data => got.push(String(data)))
    const arrives = (text, n) => within(new Promise(done => {
      const look = () => got.filter(x => x === text).length >= n && done()
      ws.on('message', look)
      look()
    }), `"${text}" to arrive`)
    proxy.mute = true
    await type(page, 'hi')
    await arrives('hi', 1)
    await lose()
    await find()
    await type(page, 'after it')
    await shows(page, 'after it')
    await arrives('after it', 1)
    all.push('hi', 'after it')
    assert.deepEqual(await messages(page), all)
    assert.deepEqual(got, ['hi', 'after it'])
    assert.deepEqual(await waiting(page), [])
    ws.terminate()
  })
  await test('more missed than the history holds: it says so', async () => {
    await lose()
    for (let i = 1; i <= 130; i++) await post(b, 'net', `missed ${i}`)
    await find()
    await shows(page, 'missed 130')
    const got = await messages(page)
    assert.deepEqual(got.slice(0, all.length), all)
    assert.deepEqual(got.slice(all.length),
      Array.from({ length: 100 }, (_, i) => `missed ${i + 31}`))
    assert.deepEqual(await notes(page), ['Some messages may be missing here'])
    assert.ok(await page.evaluate(n =>
      log.children[n].className === 'note', all.length), 'not in its place')
  })
  await test('no echo: the connection is given up, the message kept', async () => {
    await page.evaluate(() => {      // the patience, but shorter
      const real = window.setTimeout
      window.setTimeout = (run, ms) => real(run, ms < 15000 ? ms : ms / 50)
    })
    proxy.deaf = true
    await type(page, 'into a hole')
    await disconnected(page)
    assert.deepEqual(await waiting(page), ['into a hole'])
    proxy.deaf = false
    await shows(page, 'into a hole')
    assert.deepEqual(await waiting(page), [])
  })
  await test('offline: says so, then comes back', async () => {
    proxy.down = true
    await page.evaluate(() => dispatchEvent(new Event('offline')))
    await disconnected(page)
    await find()
  })
  await test('back online: connects at once', async () => {
    await page.evaluate(() => {      // as after many failures
      window.real = window.setTimeout
      window.setTimeout = (run, ms) => ms < 1e4 ? 0 : real(run, ms)
    })
    await lose()
    proxy.down = false
    await page.evaluate(() => {
      window.setTimeout = real
      dispatchEvent(new Event('online'))
    })
    await connected(page)
  })
  await test('the pause between attempts grows, with jitter', async () => {
    await page.evaluate(() => {
      window.seen = []
      window.setTimeout = (run, ms) => {
        if (ms === 20000) return real(run, ms)      // the patience
        return real(run, seen.push(ms) < 9 ? 0 : ms)
      }
    })
    await lose()
    await page.waitForFunction(() => seen.length >= 9)
    const seen = await page.evaluate(() => window.seen)
    assert.ok(seen[0] < 500 && Math.max(...seen) > 10000, seen)
    assert.ok(Math.max(...seen) <= 30000, seen)
    assert.equal(new Set(seen).size, seen.length, 'no jitter')
    await page.evaluate(() => { window.setTimeout = real })
    await find()
  })
  await test('too long for the server: back in the box', async () => {
    const long = 'x'.repeat(70000)
    await page.fill('#text', '')
    await type(page, long)
    await page.waitForFunction(() => /Too long/.test(log.textContent))
    assert.equal(await page.inputValue('#text'), long)
    assert.deepEqual(await waiting(page), [])
    await page.fill('#text', '')
    await connected(page)
    await type(page, 'short')
    await shows(page, 'short')
  })
  await test('asks before what was typed is thrown away', async () => {
    await page.focus('#text')
    await page.keyboard.type('a draft')
    page.leaving = true
    const asked = within(page.waitForEvent('dialog'), 'a question')
    await page.close({ runBeforeUnload: true })
    assert.equal((await asked).type(), 'beforeunload')
  })
  await close(page)
  proxy.close()
}

// A lone server loses its log with its life.
async function lone_restart() {
  const alone = await start('none')
  const page = await open(`${alone.url}?channel=alone`)
  await test('a restarted server that has forgotten everything', async () => {
    for (const text of ['ann: a', 'ann: b']) await type(page, text)
    await shows(page, 'ann: b')
    await stop(alone, 'SIGKILL')
    await disconnected(page)
    const again = await start('none', alone.port)
    await post(again, 'alone', 'bob: c')
    await connected(page)
    await post(again, 'alone', 'bob: d')
    await shows(page, 'bob: d')
    assert.deepEqual(await messages(page),
      ['ann: a', 'ann: b', 'bob: c', 'bob: d'])
    assert.equal((await notes(page)).length, 1)
    assert.equal(await stop(again, 'SIGTERM'), 0)
  })
  await close(page)
}

async function many(a) {
  const page = await open(`${a.url}?channel=many`)
  const at_end = () => atEnd &&
    view.scrollHeight - view.scrollTop - view.clientHeight < 2
  const ws = await ws_open(a, 'many')
  const flood = async (n, last) => {
    for (let i = 1; i < n; i++)
      ws.send(`eve: message ${i} `.repeat(i % 5 + 1))
    ws.send(last)
    await shows(page, last)
  }
  await test('5000 messages: the last 1000 stay, the view at the end',
    async () => {
      await page.evaluate(() => {
        window.slowest = 0
        let before = performance.now()
        requestAnimationFrame(function frame(now) {
          slowest = Math.max(slowest, now - before)
          before = now
          requestAnimationFrame(frame)
        })
      })
      const begun = Date.now()
      await flood(5000, 'last of many')
      await page.waitForFunction(at_end)
      const ms = Date.now() - begun
      await page.waitForFunction(() => log.childElementCount === 1000)
      assert.equal(await page.title(), 'many')
      const slowest = Math.round(await page.evaluate(() => slowest))
      assert.ok(slowest < 5000, `stood still for ${slowest} ms`)
      return `${ms} ms, the slowest frame ${slowest} ms`
    })
  await test('scrolling through 1000 messages', async () => {
    const [frames, slowest] = await page.evaluate(() => new Promise(done => {
      const times = []
      view.scrollTop = 0
      requestAnimationFrame(function step(now) {
        const before = view.scrollTop
        times.push(now)
        view.scrollTop += 300
        if (view.scrollTop > before) return requestAnimationFrame(step)
        const gaps = times.slice(1).map((time, i) => time - times[i])
        done([gaps.length, Math.max(...gaps)])
      })
    }))
    assert.ok(frames > 50, 'nothing to scroll')
    assert.ok(slowest < 5000, `stood still for ${slowest} ms`)
    return `${frames} frames, the slowest ${Math.round(slowest)} ms`
  })
  await test('in the midst of a flood one can scroll up', async () => {
    const [before, after] = await page.evaluate(async () => {
      const pause = ms => new Promise(done => setTimeout(done, ms))
      const flood = setInterval(() => show('flood'), 1)
      await pause(200)
      const before = atEnd
      view.scrollTop -= 500
      const top = view.scrollTop
      await pause(200)
      clearInterval(flood)
      return [before, !atEnd && Math.abs(view.scrollTop - top) < 9]
    })
    assert.deepEqual([before, after], [true, true])
    await page.focus('#view')
    await page.keyboard.press('End')
    await page.waitForFunction(at_end)
  })
  await test('scrolled up, the view stays where it is', async () => {
    await page.focus('#view')
    await page.keyboard.press('Home')
    await page.waitForFunction(() => view.scrollTop === 0 && !atEnd)
    await page.evaluate(() => { view.scrollTop = 5000 })
    await page.waitForFunction(() => Math.abs(view.scrollTop - 5000) < 9)
    const first = () => page.evaluate(() => [...log.children].find(p =>
      p.getBoundingClientRect().top >= view.getBoundingClientRect().top)
      .textContent)
    const before = await first()
    for (let i = 0; i < 5; i++) await post(a, 'many', `more ${i}`)
    await shows(page, 'more 4')
    await page.evaluate(() => new Promise(requestAnimationFrame))
    assert.equal(await first(), before)
    await flood(3000, 'many more')
    assert.equal(await first(), before)
    await page.keyboard.press('End')
    await page.waitForFunction(at_end)
    await post(a, 'many', 'the old ones make room')
    await page.waitForFunction(() => log.childElementCount === 1000)
    await page.waitForFunction(at_end)
    ws.terminate()
  })
  await test('a window made smaller keeps the end in view', async () => {
    await page.setViewportSize({ width: 500, height: 300 })
    await page.waitForFunction(at_end)
    await type(page, 'seen?')
    await shows(page, 'seen?')
    await page.waitForFunction(at_end)
  })
  await close(page)
}

// What is new is counted until it was seen.
async function reading(a) {
  const page = await open(`${a.url}?channel=reading`)
  const at_end = () => page.waitForFunction(() => atEnd && jump.hidden &&
    view.scrollHeight - view.scrollTop - view.clientHeight < 2)
  const titled = title => page.waitForFunction(title =>
    document.title === title, title)
  const go = away => page.evaluate(away => {
    Object.defineProperty(document, 'hidden',
      { get: () => away, configurable: true })
    document.dispatchEvent(new Event('visibilitychange'))
  }, away)
  const marked = () => page.$$eval('.new', list =>
    list.map(p => p.textContent))
  await test('what comes while all is seen is not new', async () => {
    for (let i = 0; i < 40; i++) await post(a, 'reading', `old ${i}`)
    await shows(page, 'old 39')
    await at_end()
    assert.equal(await page.title(), 'reading')
    assert.deepEqual(await marked(), [])
  })
  await test('scrolled up: a button counts and leads to them', async () => {
    await page.evaluate(() => { view.scrollTop = 0 })
    await page.waitForFunction(() => !atEnd)
    assert.ok(await page.isHidden('#jump'))
    for (const text of ['new 1', 'new 2']) await post(a, 'reading', text)
    await titled('(2) reading')
    assert.equal(await page.textContent('#jump'), '↓ 2 new')
    assert.equal(await page.evaluate(() => view.scrollTop), 0)
    await page.click('#jump')
    await at_end()
    await titled('reading')
    assert.deepEqual(await marked(), ['new 1'])
  })
  await test('and so by keyboard', async () => {
    await page.evaluate(() => { view.scrollTop = 0 })
    await page.waitForFunction(() => !atEnd)
    await post(a, 'reading', 'new 3')
    await titled('(1) reading')
    await page.focus('#text')
    await page.keyboard.press('Shift+Tab')
    await page.keyboard.press('Enter')
    await at_end()
    assert.equal(await page.evaluate(() => document.activeElement.id), 'view')
    assert.deepEqual(await marked(), ['new 3'])
  })
  await test('in another tab: counted in the title, marked', async () => {
    await go(true)
    for (let i = 1; i <= 3; i++) await post(a, 'reading', `away ${i}`)
    await titled('(3) reading')
    await go(false)
    await titled('reading')
    assert.deepEqual(await marked(), ['away 1'])
    await at_end()
  })
  await test('one\'s own message leads to the end', async () => {
    await page.evaluate(() => { view.scrollTop = 0 })
    await page.waitForFunction(() => !atEnd)
    await type(page, 'mine')
    await shows(page, 'mine')
    await at_end()
    await titled('reading')
  })
  await test('loaded in the background, the old ones are not new', async () => {
    const late = await page.context().newPage()
    await late.addInitScript(() => Object.defineProperty(document, 'hidden',
      { get: () => true }))
    await visit(late, `${a.url}?channel=reading`)
    await shows(late, 'mine')
    assert.equal(await late.title(), 'reading')
    await post(a, 'reading', 'this one is')
    await late.waitForFunction(() => document.title === '(1) reading')
  })
  await close(page)
}

async function words(a) {
  const page = await open(`${a.url}?channel=words`)
  const table = [
    ['https://example.org', ['https://example.org']],
    ['see http://a.b/c?d=e&f#g, and HTTPS://X.Y!',
      ['http://a.b/c?d=e&f#g', 'HTTPS://X.Y']],
    ['(https://a.b/c)', ['https://a.b/c']],
    ['https://a.b/C_(language).', ['https://a.b/C_(language)']],
    ['<https://a.b/>"https://c.d"', ['https://a.b/', 'https://c.d']],
    ['Ann: https://a.b:80/x: y', ['https://a.b:80/x']],
    ['https://ü.example/é', ['https://ü.example/é']],
    ['javascript:alert(1) data:text/html,x ftp://a.b mailto:a@b', []],
    ['http:// https://. http:/a', []]]
  for (const [text, want] of table)
    await test(`links in ${text}`, async () => {
      const got = await page.evaluate(text => {
        const p = paragraph(text)
        return [p.textContent, [...p.querySelectorAll('a')].map(a =>
          [a.getAttribute('href'), a.target, a.rel])]
      }, text)
      assert.deepEqual(got, [text,
        want.map(href => [href, '_blank', 'noopener noreferrer'])])
    })
  await test('a link opens a tab that knows nothing of this one', async () => {
    await post(a, 'words', `Bob: ${a.url}messages`)
    const opened = within(page.context().waitForEvent('page'), 'a new tab')
    await page.click('#log a')
    const other = await opened
    await other.waitForURL(`${a.url}messages`)
    assert.deepEqual(await other.evaluate(() => [opener, document.referrer]),
      [null, ''])
    await other.close()
  })
  await test('each message has the direction of its words', async () => {
    const got = await page.evaluate(list => list.map(text => {
      const p = paragraph(text)
      log.append(p)
      return getComputedStyle(p).direction
    }), ['שלום', 'Ann: שלום', 'דנה: hello', 'דנה: שלום',
      'https://a.b שלום', 'https://a.b', 'سلام'])
    assert.deepEqual(got, ['rtl', 'rtl', 'ltr', 'rtl', 'rtl', 'ltr', 'rtl'])
  })
  await test('a message of 60 KB is folded, and opens', async () => {
    const long = 'Ann: ' + 'long words https://a.b/c '.repeat(2400)
    await post(a, 'words', long)
    await shows(page, long)
    const height = () => page.evaluate(() => log.lastElementChild.offsetHeight)
    assert.ok(await height() < 600, `${await height()} px`)
    await page.focus('summary')
    await page.keyboard.press('Enter')
    await page.waitForFunction(() => log.lastElementChild.offsetHeight > 10000)
    assert.equal(await page.$$eval('#log p:last-child a', list => list.length),
      2400)
  })
  await test('an object, as another page may post it', async () => {
    await page.evaluate(() =>
      new Channel('words').postMessage({ a: [1, '<b>'] }))
    await shows(page, '{"a":[1,"<b>"]}')
  })
  await close(page)
}

async function keyboard(a) {
  const page = await open(`${a.url}?channel=keys`)
  const focus = () => page.evaluate(() => document.activeElement.id ||
    document.activeElement.textContent)
  const ready_to_type = () =>
    page.waitForFunction(() => document.activeElement === text)
  await test('with the keyboard alone', async () => {
    await ready_to_type()
    await page.keyboard.type('typed without a mouse')
    await page.keyboard.press('Enter')
    await shows(page, 'typed without a mouse')
    const order = [await focus()]
    for (let i = 0; i < 4; i++) {
      await page.keyboard.press('Shift+Tab')
      order.unshift(await focus())
    }
    assert.deepEqual(order, ['channel', 'Go', 'nick', 'view', 'text'])
    const outline = await page.evaluate(() =>
      getComputedStyle(document.activeElement).outlineStyle)
    assert.notEqual(outline, 'none', 'the focus must be visible')
    await page.keyboard.press('Tab')
    await page.keyboard.press('Tab')
    await page.keyboard.type('Zoë')
    await page.keyboard.press('Shift+Tab')
    await page.keyboard.press('Shift+Tab')
    page.expected = `${a.url}?channel=by+keys`
    await page.keyboard.type('by keys')
    await page.keyboard.press('Enter')
    await page.waitForURL(page.expected)
    await connected(page)
    assert.equal(await page.inputValue('#channel'), 'by keys')
    assert.equal(await page.inputValue('#nick'), 'Zoë', 'the name is kept')
    await ready_to_type()
    await page.keyboard.type('hello')
    await page.keyboard.press('Enter')
    await shows(page, 'Zoë: hello')
    assert.deepEqual(await messages(page), ['Zoë: hello'])
  })
  await test('a channel name over 64 bytes is refused in place', async () => {
    await page.fill('#channel', 'é'.repeat(33))
    await page.press('#channel', 'Enter')
    assert.equal(page.url(), page.expected)
    assert.equal(await page.$eval('#channel', box => box.validationMessage),
      'At most 64 bytes')
    page.expected = `${a.url}?channel=${encodeURIComponent('é'.repeat(32))}`
    await page.fill('#channel', 'é'.repeat(32))
    await page.press('#channel', 'Enter')
    await page.waitForURL(page.expected)
    await connected(page)
  })
  await test('names and roles for a screen reader', async () => {
    const one = async (role, name) => assert.equal(
      await page.getByRole(role, { name, exact: true }).count(), 1,
      `${role} ${name}`)
    await one('log', 'Messages')
    await one('textbox', 'Channel')
    await one('textbox', 'Name')
    await one('textbox', 'Message')
    await one('button', 'Send')
    await one('button', 'Go')
    assert.match(await page.getByRole('status').textContent(), /Connected/)
    assert.equal(await page.getAttribute('#log', 'aria-live'), 'polite')
    assert.equal(await page.getAttribute('#log', 'aria-busy'), 'false')
    assert.equal(await page.getAttribute('html', 'lang'), 'en')
    assert.ok(await page.title())
  })
  await close(page)
}

// The contrast of what is to be read, as WCAG 2 computes it. Runs in the page.
function contrasts() {
  const pixel = new OffscreenCanvas(1, 1)
    .getContext('2d', { willReadFrequently: true })
  const rgba = css => {
    pixel.clearRect(0, 0, 1, 1)
    pixel.fillStyle = css
    pixel.fillRect(0, 0, 1, 1)
    return pixel.getImageData(0, 0, 1, 1).data
  }
  const luminance = css => {
    const [r, g, b] = [...rgba(css)].map(x => x / 255).map(x =>
      x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const behind = e => e && rgba(getComputedStyle(e).backgroundColor)[3] < 255
    ? behind(e.parentElement) : getComputedStyle(e).backgroundColor
  const ratio = (one, other) => {
    const [x, y] = [luminance(one), luminance(other)].sort((a, b) => b - a)
    return (x + 0.05) / (y + 0.05)
  }
  const found = []
  for (const e of document.querySelectorAll('p, p *, label, button, input'))
    found.push([e.id || e.localName + ' ' + e.textContent.slice(0, 20), 4.5,
      ratio(getComputedStyle(e).color, behind(e))])
  for (const e of document.querySelectorAll('input')) {
    const { color } = getComputedStyle(e, '::placeholder')
    found.push([`placeholder of ${e.id}`, 4.5, ratio(color, behind(e))])
    found.push([`border of ${e.id}`, 3,
      ratio(getComputedStyle(e).borderTopColor, behind(e.parentElement))])
  }
  for (const p of document.querySelectorAll('p')) {
    for (const pseudo of ['::before', '::after'])
      found.push([`${pseudo} of ${p.id || 'p'}`, 4.5,
        ratio(getComputedStyle(p, pseudo).color, behind(p))])
  }
  const b = document.querySelector('#log b')
  for (let hue = 0; hue < 360; hue++) {
    b.style.setProperty('--hue', hue)
    found.push([`hue ${hue}`, 4.5, ratio(getComputedStyle(b).color, behind(b))])
  }
  return found
}

async function looks(a, scheme, width) {
  const proxy = await start_proxy(a)
  const channel = `looks ${scheme}`
  const page = await open(
    `${proxy.url}?channel=${encodeURIComponent(channel)}`,
    { colorScheme: scheme, viewport: { width, height: 600 },
      hasTouch: true, isMobile: true })
  for (let i = 0; i < 24; i++) await post(a, channel, `name ${i}: hello`)
  await post(a, channel, `${'W'.repeat(40)}: ${'long'.repeat(200)}`)
  await post(a, channel, 'https://example.org/' + 'x'.repeat(300))
  await post(a, channel, `folded: ${'words '.repeat(300)}`)
  await post(a, channel, 'the end')
  await shows(page, 'the end')
  const check = async () => {
    const found = await page.evaluate(contrasts)
    for (const [what, least, ratio] of found)
      assert.ok(ratio >= least, `${what}: ${ratio.toFixed(2)} < ${least}`)
    const [what, , ratio] = found.reduce((a, b) =>
      a[2] / a[1] < b[2] / b[1] ? a : b)
    return `least of ${found.length}: ${what}, ${ratio.toFixed(2)}`
  }
  await test(`${scheme}: contrast`, check)
  await test(`${scheme}: contrast without a connection`, async () => {
    proxy.down = true
    proxy.cut()
    await disconnected(page)
    await type(page, 'me: waiting')
    await page.evaluate(() => note('a note'))
    await page.waitForFunction(() => getComputedStyle(outbox.lastElementChild,
      '::after').fontSize === '16px', null, 'says "not sent yet"')
    return check()
  })
  await test(`${scheme}: the colours asked for`, async () => {
    const [r] = (await page.evaluate(() =>
      getComputedStyle(document.body).backgroundColor)).match(/\d+/g)
    assert.ok(scheme === 'dark' ? r < 60 : r > 200, `red is ${r}`)
  })
  await test(`a screen ${width} px wide`, async () => {
    const wide = await page.evaluate(() => [document.documentElement, view, log]
      .filter(e => e.scrollWidth > e.clientWidth).map(e => e.localName))
    assert.deepEqual(wide, [], 'must not scroll sideways')
    assert.equal(await page.evaluate(() =>
      document.documentElement.scrollHeight > innerHeight), false)
    for (const box of await page.$$('input, button:not([hidden])')) {
      const { x, y, width: w, height: h } = await box.boundingBox()
      assert.ok(x >= 0 && x + w <= width && y >= 0 && y + h <= 600 &&
        w >= 40 && h >= 24, `a control at ${[x, y, w, h].map(Math.round)}`)
    }
    proxy.down = false
    await page.evaluate(() => dispatchEvent(new Event('online')))
    await connected(page)
    await page.evaluate(() => { view.scrollTop = 0 })
    await page.waitForFunction(() => !atEnd)
    await post(a, channel, 'below')
    await page.waitForSelector('#jump:not([hidden])')
    const { x, y, width: w, height: h } =
      await (await page.$('#jump')).boundingBox()
    const { y: end } = await (await page.$('#say')).boundingBox()
    assert.ok(x >= 0 && x + w <= width && h >= 24 && y + h <= end,
      `the button at ${[x, y, w, h].map(Math.round)}`)
  })
  await close(page)
  proxy.close()
}

run(async () => {
  const bus = `239.255.80.80:${await free_udp_port()}`
  const servers = { a: await start(bus), b: await start(bus) }
  let { a, b } = servers
  await two_instances(a, b)
  await overlap(a)
  for (const signal of ['SIGTERM', 'SIGKILL'])
    await test(`${signal} and restart: reconnects, nothing lost or repeated`,
      () => restart(servers, signal));
  ({ a, b } = servers)
  await network(b)
  await lone_restart()
  await many(a)
  await reading(a)
  await words(a)
  await keyboard(a)
  await looks(a, 'light', 360)
  await looks(a, 'dark', 320)
})
