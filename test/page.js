#!/usr/bin/env node
// The page, as a person meets it: in a real browser, on two instances of the program in $CHAT on a
// bus of their own. Prints a line for each case.
// Alone: CHAT=./chat node test/page.js [talking connection ...], the names of the groups below.
'use strict'
const { assert, test, visit, until, new_bus, start, stop, query, post, ws_open, start_proxy, open,
  connected, disconnected, messages, notes, waiting, shows, type, run } = require('./browser.js')

const numbers = (n, name) => Array.from({ length: n }, (_, i) => `${name} ${i}`)
const at_end = page => page.waitForFunction(() => {
  const last = log.lastElementChild.getBoundingClientRect()
  const { top, bottom } = view.getBoundingClientRect()
  return last.bottom > top && last.bottom <= bottom + 1
})
const hide = (page, hidden) => page.evaluate(hidden => {
  Object.defineProperty(document, 'hidden', { get: () => hidden, configurable: true })
  document.dispatchEvent(new Event('visibilitychange', { bubbles: true }))
}, hidden)

// ---- People who talk.

async function talking(a, b) {
  const left = await open(a.url), right = await open(b.url)
  await test('typed on one instance, shown on both; loaded again, all is kept', async () => {
    await type(left, 'from the left')
    await shows(right, 'from the left')
    await right.fill('#nick', ' Réné ')
    await type(right, 'from the right')
    for (const page of [left, right]) await shows(page, 'Réné: from the right')
    assert.deepEqual([await waiting(right), await right.inputValue('#text')], [[], ''])
    await right.press('#nick', 'Tab')
    await right.reload()
    await connected(right)
    await type(right, 'again')
    await shows(left, 'Réné: again')
    for (const page of [left, right])
      assert.deepEqual([await messages(page), await notes(page)],
        [['from the left', 'Réné: from the right', 'Réné: again'], []])
  })
  await test('odd, marked up and binary messages show as they are, too long ones not', async () => {
    const odd = ['👩‍👩‍👧‍👦 🎉', '  a  b', ': ', 'a: b: c', 'http://x: y', '{"history":3}',
      '<b>me</b>: <img src=x onerror="alert(1)"><script>alert(2)</script>']
    const ws = await ws_open(b, '')
    for (const data of [...odd, Buffer.from([0, 255, 128, 7, 9])]) ws.send(data)
    for (const text of [...odd, '[binary message]']) await shows(left, text)
    assert.equal(await left.$$eval('main img, main script', list => list.length), 0)
    const long = 'x'.repeat(70000)
    for (const text of [long, 'short']) await type(left, text)
    for (const text of ['short', `Not sent, too long for this server: ${long}`])
      await shows(left, text)
    assert.deepEqual(await waiting(left), [])
  })
  await visit('2,000 quick messages are shown in order within 5 s', b, 'quick', async page => {
    const ws = await ws_open(a, 'quick'), all = numbers(2000, 'message'), begun = Date.now()
    for (const text of all) ws.send(text)
    await shows(page, 'message 1999')
    assert.ok(Date.now() - begun < 5000, 'it is slow')
    assert.deepEqual(await messages(page), all.slice(-1000), 'the last 1000')
    await at_end(page)
  })
}

// ---- Which channel am I in?

async function channels(a) {
  const room = page => page.textContent('#where')
  const go = async (page, name) => {
    await page.fill('#channel', name)
    await page.press('#channel', 'Enter')
    await page.waitForURL(/channel=/)
    await connected(page)
  }
  await visit('Back: what is shown, said and sent to agree', a, '', async page => {
    await page.evaluate(() => { window.kept = true })
    await go(page, 'mars')
    assert.deepEqual([await room(page), await page.title()], ['mars', 'mars'])
    await page.goBack({ waitUntil: 'commit' })
    await connected(page)
    assert.ok(await page.evaluate(() => window.kept), 'it was loaded again')
    assert.deepEqual([await page.inputValue('#channel'), await room(page)], ['', 'Lobby'])
    const ws = await ws_open(a, '')
    await page.fill('#channel', 'venus')          // not entered
    await type(page, 'back')
    await until(() => ws.got.includes('back'), 'message in the lobby')
  })
  await visit('too long a name: it says so; blanks and kinds of é make no other room',
    a, 'é'.repeat(33), async page => {
      assert.equal(await room(page), 'Lobby')
      assert.match(await page.textContent('main'), /too long .*64 bytes/)
      await go(page, 'é'.repeat(32))
      assert.equal(await room(page), 'é'.repeat(32))
      const ws = await ws_open(a, 'café')
      await go(page, ' cafe\u0301 ')
      await type(page, 'typed')
      await shows(page, 'typed')
      await page.goto(a.url + query('cafe\u0301 '))
      await connected(page)
      await type(page, 'linked')
      await until(() => ws.got.length === 2, 'messages')
    })
}

// ---- The connection fails.

async function connection(a, b) {
  const proxy = await start_proxy(b)
  const check = (name, ...rest) => {
    proxy.fault = ''
    return visit(name, proxy, ...rest)
  }
  const find = async page => {
    proxy.fault = ''
    await page.click('#state')
    await connected(page)
  }
  // Moves the page's time on, in steps after which things can happen.
  const pass = async (page, seconds, step = 5) => {
    for (let s = 0; s < seconds; s += step) {
      await page.clock.fastForward(step * 1000)
      await new Promise(done => setTimeout(done, 20))
    }
  }
  await check('silence: it asks, unless hidden; a dead path: it says so', 'dead', async page => {
    await hide(page, true)
    proxy.heads = proxy.opened = 0
    await pass(page, 300, 25)
    assert.equal(proxy.heads, 0)
    await page.evaluate(() => {         // counts the answers that the page has, as its time must not run ahead
      const ask = fetch
      window.asked = window.answers = 0
      window.fetch = (...all) => (window.asked++, ask(...all).finally(() => window.answers++))
    })
    for (let i = 0; i < 6; i++) {
      if (i === 0) await hide(page, false)        // at once
      else await pass(page, 25)
      await until(() => page.evaluate(n => answers > n && answers === asked, i), 'answers to all HEADs')
    }
    assert.equal(proxy.opened, 0, 'connected again')
    await type(page, 'before')
    await shows(page, 'before')
    proxy.fault = 'mute'
    await pass(page, 60)
    await disconnected(page)
    await post(b, 'dead', 'missed')
    await find(page)
    await shows(page, 'missed')
    proxy.fault = 'deaf'                // it answers that it is there, but does not get this
    await type(page, 'swallowed')
    await pass(page, 60)
    await disconnected(page)
    await type(page, 'later')
    assert.deepEqual(await waiting(page), ['swallowed', 'later'])
    await find(page)
    await shows(page, 'later')
    assert.deepEqual([await messages(page), await waiting(page), await notes(page)],
      [['before', 'missed', 'swallowed', 'later'], [], []])
  }, { clock: true })
  for (const [what, hurry] of [['a click on the state', page => page.click('#state')],
    ['typing', page => page.type('#text', 'h')], ['Send', page => page.click('#send')],
    ['the network', page => page.evaluate(() => dispatchEvent(new Event('online')))]])
    await check(`it says when it tries again, and ${what} tries at once`, 'tries', async page => {
      const next = () => page.evaluate(() => /\d+/.exec(state.dataset.next) ?? 0)
      await page.fill('#text', 'words')
      proxy.fault = 'down'
      proxy.cut()
      await disconnected(page)
      await pass(page, 120, 20)       // fails again and again
      for (let i = 0; i < 20 && await next() < 5; i++) await pass(page, 2, 2)
      assert.ok(await next() >= 5, 'it does not say when')
      proxy.fault = ''
      const begun = Date.now()
      await hurry(page)
      await connected(page)
      assert.ok(Date.now() - begun < 3000, 'it waited')
    }, { clock: true })
  const bus = new_bus(), one = await start(bus), other = await start(bus)
  await visit('an instance is restarted: nothing lost or repeated', one, '', async page => {
    for (const text of ['hi', 'before', 'hi']) await type(page, text)
    await page.waitForFunction(() => log.childElementCount === 3)
    await stop(one, 'SIGTERM')
    await disconnected(page)
    for (const text of ['hi', 'missed', 'before']) await post(other, '', text)
    await type(page, 'hi')
    const flow = numbers(200, 'bob'), started = start(bus, one.port)
    for (const text of flow) await post(other, '', text)
    await started
    await page.waitForFunction(() => log.childElementCount >= 207)
    await post(other, '', 'end')
    await shows(page, 'end')
    const all = await messages(page)
    assert.deepEqual(all.filter(text => text !== 'hi'),
      ['before', 'missed', 'before', ...flow, 'end'])
    assert.deepEqual([all.length, await notes(page)], [208, []])
  })
}

// ---- Writing.

async function writing(a) {
  await visit('Shift+Enter makes a line, Enter sends, a draft is kept', a, 'lines', async page => {
    const height = () => page.$eval('#text', box => box.offsetHeight), one = await height()
    await page.keyboard.type('one')
    await page.keyboard.press('Shift+Enter')
    await page.keyboard.insertText('two\n  three')       // as if pasted
    assert.ok(await height() > 2 * one, 'the box does not grow')
    await page.keyboard.press('Enter')
    await shows(page, 'one\ntwo\n  three')
    assert.equal(await height(), one)
    await page.keyboard.insertText('line\n'.repeat(99))
    assert.ok(await height() < 200, `${await height()} px`)
    await page.evaluate(() => text.dispatchEvent(new KeyboardEvent('keydown',
      { key: 'Enter', keyCode: 229, isComposing: true, bubbles: true })))
    assert.ok(await page.inputValue('#text'), "an input method's Enter sends")
    page.leaving = true
    const asked = page.waitForEvent('dialog')
    await page.close({ runBeforeUnload: true })
    assert.equal((await asked).type(), 'beforeunload')
  })
  await visit('on a phone Enter makes a line, the button sends', a, 'phone', async page => {
    await page.focus('#text')
    await page.keyboard.type('one')
    await page.keyboard.press('Enter')
    await page.keyboard.type('two')
    await page.getByRole('button', { name: 'Send' }).tap()
    await page.keyboard.type('next')
    await shows(page, 'one\ntwo')
    assert.equal(await page.inputValue('#text'), 'next')
  }, { hasTouch: true, isMobile: true, viewport: { width: 360, height: 740 } })
  await visit('with a screen reader, or the keyboard alone', a, 'keys', async page => {
    assert.match(await page.textContent('main'), /is seen .* by all/)
    for (const [role, name] of [['log', 'Messages'], ['textbox', 'Message'], ['button', 'Send'],
      ['textbox', 'Other channel'], ['textbox', 'Your name'], ['button', '● Connected']])
      assert.equal(await page.getByRole(role, { name, exact: true }).count(), 1, `${role} ${name}`)
    assert.equal(await page.getByRole('status').textContent(), '● Connected')
    assert.equal(await page.getAttribute('#log', 'aria-busy'), 'false')
    const order = []
    for (let i = 0; i < 5; i++) {
      order.push(await page.evaluate((e = document.activeElement) =>
        getComputedStyle(e).outlineStyle === 'none' ? `${e.id} without outline` : e.id))
      await page.keyboard.press('Shift+Tab')
    }
    assert.deepEqual(order, ['text', 'view', 'nick', 'channel', 'state'])
    await page.focus('#nick')
    for (const words of ['Zoë', 'hello']) {
      await page.keyboard.type(words)
      await page.keyboard.press('Enter')
    }
    await shows(page, 'Zoë: hello')
  })
}

// ---- Reading.

const TEXTS = [               // a message, its direction, the links in it
  ['see http://a.b/c?d=e&f#g, and HTTPS://X.Y!', 'ltr', ['http://a.b/c?d=e&f#g', 'HTTPS://X.Y']],
  ['(https://a.b/c)', 'ltr', ['https://a.b/c']], ['https://a.b', 'ltr', ['https://a.b']],
  ['https://a.b/C_(language).', 'ltr', ['https://a.b/C_(language)']],
  ['<https://a.b/>"https://c.d"', 'ltr', ['https://a.b/', 'https://c.d']],
  ['javascript:alert(1) data:text/html,x http:// https://. http:/a', 'ltr', []],
  ['שלום', 'rtl', []], ['Ann: שלום', 'rtl', []], ['דנה: hello', 'ltr', []]]

async function reading(a) {
  const page = await open(a.url + query('reading'))
  const send = async (n, name) => {
    for (const text of numbers(n, name)) await post(a, 'reading', text)
    await shows(page, `${name} ${n - 1}`)
  }
  const titled = title => page.waitForFunction(title => document.title === title, title)
  const first = () => page.evaluate(() => [...log.children].find(p =>
    p.getBoundingClientRect().top >= view.getBoundingClientRect().top).textContent)
  await send(60, 'old')
  await test('the end stays in view when text or window change', async () => {
    await at_end(page)
    await page.evaluate(() => { log.style.fontSize = '2rem' })
    await at_end(page)
    await page.evaluate(() => { log.style.fontSize = '' })
    await page.setViewportSize({ width: 500, height: 300 })
    await at_end(page)
    await titled('reading')
  })
  await test('scrolled up, the view stays; what comes unseen is counted', async () => {
    await page.evaluate(() => { view.scrollTop = -300 })
    await page.waitForFunction(() => !atEnd)
    const before = await first()
    await send(5, 'new')
    await titled('(5) reading')
    assert.match(await page.textContent('#jump'), /5 new/)
    assert.equal(await first(), before)
    await page.evaluate(() => {         // as in Safari
      view.style.overflowAnchor = 'none'
      CSS.supports = () => false
    })
    await send(5, 'newer')
    assert.equal(await first(), before)
    await page.click('#jump')           // "10 new" leads to the end, and to the message box
    await at_end(page)
    await titled('reading')
    await page.waitForFunction(() => !jump.offsetHeight)
    await page.keyboard.type('typed')
    assert.equal(await page.inputValue('#text'), 'typed')
    await hide(page, true)
    await send(2, 'unseen')
    await titled('(2) reading')
    await hide(page, false)
    await titled('reading')
  })
  await test('addresses are links; each message has the direction of its words', async () => {
    for (const [text, direction, links] of TEXTS)
      assert.deepEqual(await page.evaluate(text => {
        const p = log.appendChild(paragraph(text)), links = [...p.querySelectorAll('a')]
        return [getComputedStyle(p).direction,
          ...links.map(a => [a.getAttribute('href'), a.textContent, a.target, a.rel])]
      }, text), [direction, ...links.map(href => [href, href, '_blank', 'noreferrer'])])
  })
}

// ---- Looks.

// What has too little contrast to be read, as WCAG 2 computes it. Runs in the page.
function contrasts() {
  const pixel = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })
  const luminance = layers => {         // of colours, one on the other
    for (const [color, opacity] of layers) {
      pixel.globalAlpha = opacity
      pixel.fillStyle = color
      pixel.fillRect(0, 0, 1, 1)
    }
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05          // for ratios
  }
  document.documentElement.style.background = 'Canvas'
  const found = [], all = 'main p, main p *, #where, input, textarea, button:not(.up)'
  for (const e of document.querySelectorAll(all)) {
    const style = getComputedStyle(e), hint = getComputedStyle(e, '::placeholder'), behind = []
    for (let up = e; up; up = up.parentElement)
      behind.unshift([getComputedStyle(up).backgroundColor, 1])
    const inks = [[4.5, style.color, style.opacity]]
    if (e.placeholder) inks.push([4.5, hint.color, hint.opacity], [3, style.borderTopColor, 1])
    for (const [least, ...ink] of inks) {
      const [low, high] = [luminance(behind), luminance([...behind, ink])].sort((x, y) => x - y)
      if (high / low < least) found.push(`${ink} of ${e.id || e.localName}: ${high / low}`)
    }
  }
  return found
}

async function looks(a) {
  const ws = await ws_open(a, 'looks')
  for (const name of numbers(40, 'Ann')) ws.send(`${name}: https://a.b`)        // of many colours
  for (const scheme of [{ colorScheme: 'light' }, { colorScheme: 'dark' },
    { forcedColors: 'active' }, { forcedColors: 'active', colorScheme: 'dark' }])
    await visit(`contrast: ${Object.values(scheme)}`, a, 'looks', async page => {
      await page.press('#view', 'Home')
      await page.waitForFunction(() => !atEnd)
      ws.send('new')
      await page.waitForFunction(() => /1 new/.test(jump.textContent))
      await page.evaluate(() => chat.dispatchEvent(new Event('gap')))
      assert.deepEqual(await notes(page), ['Some messages may be missing or repeated here'])
      assert.deepEqual(await page.evaluate(contrasts), [])
      await page.evaluate(() => {
        outbox.append(paragraph('me: waiting'))
        chat.close()
      })
      await disconnected(page)
      assert.deepEqual(await page.evaluate(contrasts), [])
    }, scheme)
  const page = await open(a.url + query('an island far away'))
  await post(a, 'an island far away', 'W'.repeat(300) + '\nend')
  for (const [width, height, lines] of [[740, 360, 9], [740, 180, 2], [360, 740, 20],
    [360, 330, 8], [320, 568, 15], [320, 256, 4], [640, 400, 10]])
    await test(`${width} x ${height}: slim bars, ${lines} lines to read`, async () => {
      await page.setViewportSize({ width, height })
      assert.deepEqual(await page.evaluate(([width, height, lines]) => Object.entries({
        'all fits the width': [document.body, view].every(e => e.scrollWidth <= e.clientWidth),
        'the header is slim': document.querySelector('header').offsetHeight <= 44,
        lines: view.clientHeight / parseFloat(getComputedStyle(log).lineHeight) >= lines,
        'controls to hit': [...document.querySelectorAll('input, textarea, #send')]
          .map(e => e.getBoundingClientRect()).every(({ left, right, top, bottom }) =>
            left >= 0 && right <= width && top >= 0 && bottom <= height &&
            right - left >= 40 && bottom - top >= 24)
      }).filter(([, holds]) => !holds), [width, height, lines]), [])
    })
}

// ---- Browsers of 2022: Firefox ESR 115, Safari of iOS 15.

async function old_browsers(a) {
  const forget = () => {
    for (const [where, names] of [
      [String.prototype, ['isWellFormed', 'toWellFormed', 'at', 'replaceAll']],
      [Array.prototype, ['at', 'findLast', 'toSorted', 'toReversed', 'with']],
      [Object, ['hasOwn', 'groupBy']], [Promise, ['withResolvers']], [AbortSignal, ['timeout', 'any']],
      [Element.prototype, ['ariaBusy']], [HTMLFormElement.prototype, ['requestSubmit']],
      [window, ['structuredClone', 'navigation', 'scheduler']]])
      for (const name of names) delete where[name]
  }
  await visit('a browser that lacks what is newer can chat', a, '2022', async page => {
    await page.fill('#nick', 'Ann')
    for (const text of ['half a \ud83d pair', 'works']) await type(page, text)
    await shows(page, 'Ann: works')
    assert.deepEqual([(await messages(page)).length, await waiting(page)], [2, []])
  }, { before: forget })
  await test('no newer syntax, and at most 220 lines of 120', async () => {
    const page = await (await fetch(a.url)).text(), lines = page.split('\n')
    assert.doesNotMatch(page, /\(\?<[!=]|static \{|#\w+ in |@starting-style|@layer/)
    assert.doesNotMatch(page, /color-mix|oklch|light-dark|field-sizing|:has\(/)
    assert.ok(lines.length <= 221 && lines.every(line => line.length <= 120))
  })
}

const groups = { talking, channels, connection, writing, reading, looks, old_browsers }
run(async () => {
  const bus = new_bus(), a = await start(bus), b = await start(bus), asked = process.argv.slice(2)
  const chosen = Object.keys(groups).filter(name => !asked.length || asked.includes(name))
  await groups[chosen.shift()](a, b)    // what is timed, alone
  await Promise.all(chosen.map(name => groups[name](a, b)))
})
