#!/usr/bin/env node
// The page, as a person meets it: in a real browser, on two instances of the program in $CHAT on a
// bus of their own. Prints a line for each case.
// Alone: CHAT=./chat node test/page.js [talking connection ...], the names of the groups below.
'use strict'
const { assert, test, visit, within, until, new_bus, start, stop, query, post, ws_open, start_proxy,
  open, close, connected, disconnected, messages, notes, waiting, shows, type, run } =
  require('./browser.js')

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
  await test('a first visit says what this is, in one line', async () => {
    assert.match(await left.textContent('main'), /is seen .* by all/)
    assert.deepEqual(await left.$$eval('input', list => list.map(box => box.placeholder)),
      ['Other channel', 'Your name'])
  })
  await test('typed on one instance, shown on both', async () => {
    await type(left, 'from the left')
    await shows(right, 'from the left')
    await right.fill('#nick', 'Réné')
    await type(right, 'from the right')
    for (const page of [left, right]) await shows(page, 'Réné: from the right')
    assert.deepEqual([await waiting(right), await right.inputValue('#text')], [[], ''])
  })
  await test('a name is kept, without the blanks around it', async () => {
    await right.fill('#nick', ' Zoë ')
    await right.press('#nick', 'Tab')
    await right.reload()
    await connected(right)
    await type(right, 'again')
    await shows(left, 'Zoë: again')
  })
  await test('odd texts, markup and binary messages are shown as they are', async () => {
    const odd = ['👩‍👩‍👧‍👦 🎉', '  a  b', ': ', 'a: b: c', 'http://x: y', '{"history":3}',
      '<b>me</b>: <img src=x onerror="alert(1)"><script>alert(2)</script>']
    const ws = await ws_open(b, '')
    for (const data of [...odd, Buffer.from([0, 255, 128, 7, 9])]) ws.send(data)
    for (const text of [...odd, '[binary message]']) await shows(left, text)
    assert.equal(await left.$$eval('main img, main script', list => list.length), 0)
    ws.terminate()
  })
  await test('the history is there on load', async () => {
    const late = await open(a.url), all = await messages(left)
    await shows(late, all[all.length - 1])
    assert.deepEqual([await messages(late), await notes(late)], [all, []])
    await close(late)
  })
  await visit('2,000 quick messages are shown in order within 5 s', b, 'quick', async page => {
    const ws = await ws_open(a, 'quick')
    const all = numbers(2000, 'message'), begun = Date.now()
    for (const text of all) ws.send(text)
    await shows(page, 'message 1999')
    const ms = Date.now() - begun
    assert.ok(ms < 5000, `${ms} ms`)
    assert.deepEqual(await messages(page), all.slice(-1000), 'the last 1000')
    await at_end(page)
    ws.terminate()
    return `${ms} ms`
  })
  await Promise.all([close(left), close(right)])
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
  await visit('typed, but not entered: the page says where one is', a, 'venus', async page => {
    await page.fill('#channel', 'mars')
    await type(page, 'to venus')
    await shows(page, 'to venus')
    assert.deepEqual([await room(page), await page.title()], ['venus', 'venus'])
  })
  // A page with an unload listener is loaded again, others are as they were.
  for (const [how, before] of [['as it was', () => {}],
    ['loaded again', () => addEventListener('unload', () => {})]])
    await visit(`Back, ${how}: what is shown, said and sent to agree`, a, '', async page => {
      await page.evaluate(() => { window.kept = true })
      await go(page, 'mars')
      await page.goBack({ waitUntil: 'commit' })
      await connected(page)
      assert.equal(await page.evaluate(() => window.kept), how === 'as it was' || undefined)
      assert.deepEqual([await page.inputValue('#channel'), await room(page)], ['', 'Lobby'])
      const ws = await ws_open(a, '')
      await type(page, 'back')
      await until(() => ws.got.includes('back'), 'message in the lobby')
      ws.terminate()
    }, { before })
  await visit('blanks around a name, and kinds of é, make no other room', a, '', async page => {
    const ws = await ws_open(a, 'café')
    await go(page, ' cafe\u0301 ')
    await type(page, 'typed')
    await shows(page, 'typed')
    await page.goto(a.url + query('cafe\u0301 '))
    await connected(page)
    await type(page, 'linked')
    await until(() => ws.got.length === 2, 'messages')
    ws.terminate()
  })
  await visit('too long a name: the page says so, in the lobby', a, 'é'.repeat(33), async page => {
    assert.equal(await room(page), 'Lobby')
    assert.match(await page.textContent('main'), /too long .*64 bytes/)
    await go(page, 'é'.repeat(32))
    assert.equal(await room(page), 'é'.repeat(32))
  })
}

// ---- The connection fails.

async function connection(a, b) {
  const proxy = await start_proxy(b)
  const check = (name, ...rest) => {
    proxy.down = proxy.deaf = proxy.mute = false
    return visit(name, proxy, ...rest)
  }
  const lose = async page => {
    proxy.down = true
    proxy.cut()
    await disconnected(page)
  }
  const find = async page => {
    proxy.down = proxy.deaf = proxy.mute = false
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
  await check('a dead path: the page says so within 60 s, and makes up', 'dead', async page => {
    await type(page, 'before')
    await shows(page, 'before')
    proxy.deaf = proxy.mute = true
    await pass(page, 60)
    await disconnected(page)
    await post(b, 'dead', 'missed')
    await find(page)
    await shows(page, 'missed')
    assert.deepEqual(await messages(page), ['before', 'missed'])
  }, { clock: true })
  await check('silence on a path that lives: it asks, and stays', 'silence', async page => {
    proxy.opened = proxy.heads = 0
    for (let i = 0; i < 5; i++) {
      const answer = page.waitForResponse(response => response.request().method() === 'HEAD')
      await pass(page, 25)
      await answer
      await page.evaluate(() => new Promise(done => queueMicrotask(done)))      // the page has it, too
    }
    assert.equal(proxy.opened, 0, 'connected again')
  }, { clock: true })
  await check('a hidden tab asks nothing, but at once when it is seen', 'hidden', async page => {
    await hide(page, true)
    proxy.heads = proxy.opened = 0
    await pass(page, 300, 25)
    assert.deepEqual([proxy.heads, proxy.opened], [0, 0])
    await hide(page, false)
    await until(() => proxy.heads === 1, 'HEAD')
  }, { clock: true })
  await check('no echo: given up within 60 s, and sent once more', 'echo', async page => {
    proxy.deaf = true
    await type(page, 'swallowed')
    assert.deepEqual(await waiting(page), ['swallowed'])
    await pass(page, 60)
    await disconnected(page)
    await find(page)
    await shows(page, 'swallowed')
    assert.deepEqual(await messages(page), ['swallowed'])
  }, { clock: true })
  for (const [what, hurry] of Object.entries({
    'a click on the state': page => page.click('#state'),
    'typing': page => page.type('#text', 'h'),
    'Send': page => page.click('#send'),
    'the network': page => page.evaluate(() => dispatchEvent(new Event('online')))
  }))
    await check(`it says when it tries again, and ${what} tries at once`, 'tries', async page => {
      const next = () => page.evaluate(() => /\d+/.exec(state.dataset.next) ?? 0)
      await page.fill('#text', 'words')
      await lose(page)
      await pass(page, 120, 20)       // fails again and again
      for (let i = 0; i < 20 && await next() < 5; i++) await pass(page, 2, 2)
      assert.ok(await next() >= 5, 'it does not say when')
      proxy.down = false
      const begun = Date.now()
      await hurry(page)
      await connected(page)
      assert.ok(Date.now() - begun < 3000, 'it waited')
    }, { clock: true })
  await check('lost and found: what was missed once, what was typed later', 'net', async page => {
    const all = ['one', 'hi', 'hi'], typed = ['x', 'this, too']
    const missed = ['hi', 'three', 'hi', 'hi', 'one']
    for (const text of all) await type(page, text)
    await page.waitForFunction(() => log.childElementCount === 3)
    await lose(page)
    for (const text of missed) await post(a, 'net', text)
    for (const text of typed) await type(page, text)
    assert.deepEqual(await waiting(page), typed)
    await find(page)
    await shows(page, 'this, too')
    assert.deepEqual(await messages(page), [...all, ...missed, ...typed])
    assert.deepEqual([await waiting(page), await notes(page)], [[], []])
  })
  await check('too long for the server: it says so and goes on', 'long', async page => {
    const long = 'x'.repeat(70000)
    await type(page, long)
    await type(page, 'short')
    await shows(page, 'short')
    await shows(page, `Not sent, too long for this server: ${long}`)
    assert.deepEqual(await waiting(page), [])
  })
  proxy.close()
}

// An instance is restarted while messages flow through the other one.
async function restarts() {
  const bus = new_bus(), b = await start(bus)
  let a = await start(bus)
  for (const signal of ['SIGTERM', 'SIGKILL'])
    await visit(`${signal} and restart: nothing lost or repeated`, a, signal, async page => {
      const ws = await ws_open(b, signal), sent = [], typed = []
      const flow = setInterval(() => {
        sent.push(sent.length % 4 ? `bob: ${sent.length}` : 'bob: hi')
        ws.send(sent[sent.length - 1])
      }, 30)
      const say = async text => {
        const enough = sent.length + 10
        await until(() => sent.length >= enough, 'messages')
        typed.push(text)
        await type(page, text)
      }
      await say('ann: before')
      await shows(page, 'ann: before')
      await stop(a, signal)
      await disconnected(page)
      await say('ann: meanwhile')
      a = await start(bus, a.port)
      await shows(page, 'ann: meanwhile')
      await say('ann: after')
      clearInterval(flow)
      await until(() => ws.got.includes('ann: after'), 'last message')
      sent.push('bob: end')
      ws.send('bob: end')
      for (const last of ['ann: after', 'bob: end']) await shows(page, last)
      for (const got of [await messages(page), ws.got]) {
        assert.deepEqual(got.filter(text => /^bob/.test(text)), sent)
        assert.deepEqual(got.filter(text => /^ann/.test(text)), typed)
      }
      ws.terminate()
    })
  const alone = await start('none')
  await visit('a lone server that has forgotten everything: it says so', alone, '', async page => {
    for (const text of ['ann: a', 'ann: b']) await type(page, text)
    await shows(page, 'ann: b')
    await stop(alone, 'SIGKILL')
    const again = await start('none', alone.port)
    await post(again, '', 'bob: c')
    await shows(page, 'bob: c')
    assert.deepEqual(await messages(page), ['ann: a', 'ann: b', 'bob: c'])
    assert.deepEqual(await notes(page), ['Some messages may be missing or repeated here'])
  })
}

// ---- Writing.

async function writing(a) {
  await visit('several lines: Shift+Enter makes one, Enter sends', a, 'lines', async page => {
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
  await visit('with the keyboard alone', a, 'keys', async page => {
    const order = []
    for (let i = 0; i < 5; i++) {
      order.push(await page.evaluate(() => document.activeElement.id))
      assert.notEqual(await page.evaluate(() =>
        getComputedStyle(document.activeElement).outlineStyle), 'none')
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
  await visit('names and roles for a screen reader', a, '', async page => {
    for (const [role, name] of [['log', 'Messages'], ['textbox', 'Message'], ['button', 'Send'],
      ['textbox', 'Other channel'], ['textbox', 'Your name'], ['button', '● Connected']])
      assert.equal(await page.getByRole(role, { name, exact: true }).count(), 1, `${role} ${name}`)
    assert.equal(await page.getByRole('status').textContent(), '● Connected')
    assert.equal(await page.getAttribute('#log', 'aria-busy'), 'false')
  })
  await visit('the page asks before a draft is thrown away', a, '', async page => {
    page.leaving = true
    await page.type('#text', 'a draft')
    const asked = within(page.waitForEvent('dialog'), 'question')
    await page.close({ runBeforeUnload: true })
    assert.equal((await asked).type(), 'beforeunload')
  })
}

// ---- Reading.

const LINKS = [
  ['see http://a.b/c?d=e&f#g, and HTTPS://X.Y!', ['http://a.b/c?d=e&f#g', 'HTTPS://X.Y']],
  ['(https://a.b/c)', ['https://a.b/c']],
  ['https://a.b/C_(language).', ['https://a.b/C_(language)']],
  ['<https://a.b/>"https://c.d"', ['https://a.b/', 'https://c.d']],
  ['javascript:alert(1) data:text/html,x http:// https://. http:/a', []]]

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
  const scroll_up = async () => {
    await page.focus('#view')
    await page.keyboard.press('Home')
    await page.waitForFunction(() => log.getBoundingClientRect().top > 0)
    await page.mouse.move(250, 150)
    await page.mouse.wheel(0, 300)
    await page.waitForFunction(() => log.getBoundingClientRect().top < 0)
    return first()
  }
  await test('scrolled up, the view stays; new ones are counted', async () => {
    const before = await scroll_up()
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
  })
  await test('"10 new" leads to the end, and to the message box', async () => {
    await page.click('#jump')
    await at_end(page)
    await titled('reading')
    await page.waitForFunction(() => !jump.offsetHeight)
    await page.keyboard.type('typed')
    assert.equal(await page.inputValue('#text'), 'typed')
  })
  await test('what comes while the tab is hidden is counted', async () => {
    await hide(page, true)
    await send(2, 'unseen')
    await titled('(2) reading')
    await hide(page, false)
    await titled('reading')
  })
  await test('addresses are links, without what is around them', async () => {
    for (const [text, links] of LINKS)
      assert.deepEqual(await page.evaluate(text => [...paragraph(text).querySelectorAll('a')]
        .map(a => [a.getAttribute('href'), a.textContent, a.target, a.rel]), text),
      links.map(href => [href, href, '_blank', 'noreferrer']))
  })
  await test('each message has the direction of its words', async () => {
    assert.deepEqual(await page.evaluate(list => list.map(text =>
      getComputedStyle(log.appendChild(paragraph(text))).direction),
    ['שלום', 'Ann: שלום', 'דנה: hello', 'https://a.b']), ['rtl', 'rtl', 'ltr', 'ltr'])
  })
  await close(page)
}

// ---- Looks.

// What has too little contrast to be read, as WCAG 2 computes it. Runs in the page.
function contrasts() {
  const pixel = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true })
  const paint = (css, alpha = 1) => {
    pixel.globalAlpha = alpha
    pixel.fillStyle = css
    pixel.fillRect(0, 0, 1, 1)
    const [r, g, b] = [...pixel.getImageData(0, 0, 1, 1).data].map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05          // its luminance, for ratios
  }
  document.documentElement.style.background = 'Canvas'
  const background = e => {
    if (e.parentElement) background(e.parentElement)
    return paint(getComputedStyle(e).backgroundColor)
  }
  const found = []
  const add = (e, least, color, opacity, what) => {
    const one = background(e), other = paint(color, opacity)
    const ratio = Math.max(one, other) / Math.min(one, other)
    if (ratio < least) found.push(`${what} of ${e.id || e.localName}: ${ratio.toFixed(2)}`)
  }
  const all = 'main p, main p *, #where, input, textarea, button:not(.up)'
  for (const e of document.querySelectorAll(all)) {
    const { color, opacity, borderTopColor } = getComputedStyle(e)
    const placeholder = getComputedStyle(e, '::placeholder')
    add(e, 4.5, color, opacity, 'text')
    if (e.placeholder) add(e, 4.5, placeholder.color, placeholder.opacity, 'placeholder')
    if (e.placeholder) add(e, 3, borderTopColor, 1, 'border')
  }
  return found
}

async function looks(a) {
  const proxy = await start_proxy(a), ws = await ws_open(a, 'looks')
  for (const name of numbers(40, 'Ann')) ws.send(`${name}: https://a.b`)        // of many colours
  for (const scheme of [{ colorScheme: 'light' }, { colorScheme: 'dark' },
    { forcedColors: 'active' }, { forcedColors: 'active', colorScheme: 'dark' }]) {
    proxy.down = false
    await visit(`contrast: ${Object.entries(scheme).join(', ')}`, proxy, 'looks', async page => {
      await page.focus('#view')
      await page.keyboard.press('Home')
      await page.waitForFunction(() => !atEnd)
      ws.send('new')
      await page.waitForFunction(() => /1 new/.test(jump.textContent))
      await page.evaluate(() => show(paragraph('a note', 'note')))
      assert.deepEqual(await page.evaluate(contrasts), [])
      proxy.down = true
      proxy.cut()
      await disconnected(page)
      await type(page, 'me: waiting')
      assert.deepEqual(await page.evaluate(contrasts), [])
    }, scheme)
  }
  ws.terminate()
  proxy.close()
  const page = await open(a.url + query('an island far away'))
  await post(a, 'an island far away', 'W'.repeat(300) + '\nend')
  for (const [width, height, lines] of [[740, 360, 9], [740, 180, 2], [360, 740, 20],
    [360, 330, 8], [320, 568, 15], [320, 256, 4], [640, 400, 10]])
    await test(`${width} x ${height}: slim bars, ${lines} lines to read`, async () => {
      await page.setViewportSize({ width, height })
      const { sideways, header, rows, boxes } = await page.evaluate(() => ({
        sideways: [document.body, view].filter(e => e.scrollWidth > e.clientWidth).length,
        header: document.querySelector('header').offsetHeight,
        rows: view.clientHeight / parseFloat(getComputedStyle(log).lineHeight),
        boxes: [...document.querySelectorAll('input, textarea, #send')]
          .map(e => e.getBoundingClientRect().toJSON())
      }))
      assert.equal(sideways, 0, 'scrolls sideways')
      assert.ok(header <= 44, `the header takes ${header} px`)
      assert.ok(rows >= lines, `${rows} lines`)
      for (const { left, right, top, bottom } of boxes)
        assert.ok(left >= 0 && right <= width && top >= 0 && bottom <= height &&
          right - left >= 40 && bottom - top >= 24, 'a control is too small')
    })
  await close(page)
}

// ---- Browsers of 2022: Firefox ESR 115, Safari of iOS 15.

function forget() {
  for (const [where, names] of [
    [String.prototype, ['isWellFormed', 'toWellFormed', 'at', 'replaceAll']],
    [Array.prototype, ['at', 'findLast', 'toSorted', 'toReversed', 'with']],
    [Object, ['hasOwn', 'groupBy']], [Promise, ['withResolvers']], [AbortSignal, ['timeout', 'any']],
    [Element.prototype, ['ariaBusy']], [HTMLFormElement.prototype, ['requestSubmit']],
    [window, ['structuredClone', 'navigation', 'scheduler']]])
    for (const name of names) delete where[name]
}

async function old_browsers(a) {
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

const groups = { talking, channels, connection, restarts, writing, reading, looks, old_browsers }
run(async () => {
  const bus = new_bus(), a = await start(bus), b = await start(bus), asked = process.argv.slice(2)
  const chosen = Object.keys(groups).filter(name => !asked.length || asked.includes(name))
  await groups[chosen.shift()](a, b)    // what is timed, alone
  await Promise.all(chosen.map(name => groups[name](a, b)))
})
