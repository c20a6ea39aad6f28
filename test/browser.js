// What the tests in a real browser share: instances of the program in $CHAT, a proxy whose
// connections fail as told, and pages that are watched for complaints. Used by page.js, channel.js
// and screenshot.js.
'use strict'
const fs = require('fs'), net = require('net'), path = require('path')
const assert = require('assert/strict')
const { spawn } = require('child_process')

const CHROMIUM = '/usr/bin/chromium'
const CHAT = path.resolve(__dirname, '..', process.env.CHAT || './chat')
const DEADLINE = 10000 * (process.env.PATIENCE || 1)    // of all waits, ms
const part = path.basename(process.argv[1], '.js')

if (![CHROMIUM, `${__dirname}/node_modules/ws`].every(name => fs.existsSync(name))) {
  console.log(`skipped: ${part}: needs ${CHROMIUM}, and "npm ci" in test/`)
  process.exit(0)
}
const { chromium } = require('playwright-core')
const WebSocket = require('ws')

let failed = 0
async function test(name, run) {
  try {
    await run()
    console.log(`ok - ${name}`)
  } catch (error) {
    failed++
    const detail = error.message.replace(/\u001b\[\d+m/g, '').replace(/\s*\n\s*/g, ' | ')
    console.log(`FAILED - ${name}: ${detail.slice(0, 1000)}`)
  }
}

// Waits for what look() finds.
async function until(look, what) {
  const end = Date.now() + DEADLINE
  for (;;) {
    const found = await look()
    if (found) return found
    if (Date.now() > end) throw new Error(`no ${what} in time`)
    await new Promise(done => setTimeout(done, 10))
  }
}

// ---- The servers.

const servers = []
let port = 20000
const new_bus = () =>               // a bus of this test alone
  `239.255.${process.pid >> 8 & 255}.${process.pid & 255}:${port++}`
const LISTENS = /listening on (http:\/\/localhost:(\d+)\/)/
const ended = ({ child }) => child.exitCode ?? child.signalCode

// Starts an instance; resolves when it listens.
async function start(bus, port = 0, ...options) {
  const child = spawn(CHAT, ['-q', '-p', `${port}`, '-b', bus, ...options],
    { stdio: ['ignore', 'ignore', 'pipe'] })
  const server = { child, errors: '' }
  servers.push(server)
  child.stderr.on('data', data => { server.errors += data })
  await until(() => LISTENS.test(server.errors) || ended(server) !== null, 'server')
  assert.match(server.errors, LISTENS);
  [, server.url, server.port] = LISTENS.exec(server.errors)
  return server
}

async function stop(server, signal) {
  server.child.kill(signal)
  await until(() => ended(server) !== null, `end of the server after ${signal}`)
  return ended(server)
}

const query = channel => `?channel=${encodeURIComponent(channel)}`

// Sends a message without a browser.
async function post(server, channel, message) {
  const answer = await fetch(`${server.url}send${query(channel)}`,
    { method: 'POST', body: message, signal: AbortSignal.timeout(DEADLINE) })
  assert.equal(answer.status, 200, '/send')
}

// A WebSocket without a browser; `got` are its messages.
async function ws_open(server, channel) {
  const ws = new WebSocket(`ws://localhost:${server.port}/${query(channel)}`)
  ws.got = []
  ws.on('message', (data, binary) => ws.got.push(binary ? data : `${data}`))
  ws.on('error', () => {})          // it is not open, then
  await until(() => ws.readyState === WebSocket.OPEN, 'WebSocket')
  return ws
}

// A proxy. Its `fault` may be: 'down', it refuses connections; 'deaf', of WebSockets it passes
// nothing on to the server; 'mute', nothing from it: a dead path, as nothing is closed. cut() ends
// what there is. It counts the `heads` that are asked for and the WebSockets that are `opened`.
async function start_proxy(server) {
  const sockets = new Set(), proxy = { fault: '', heads: 0, opened: 0,
    cut: () => sockets.forEach(socket => socket.destroy()) }
  const listener = net.createServer(outside => {
    if (proxy.fault === 'down') return outside.destroy()
    const inside = net.connect(server.port, 'localhost')
    for (const [one, other] of [[outside, inside], [inside, outside]]) {
      sockets.add(one)
      one.on('error', () => {})
      one.on('close', () => other.destroy())
    }
    outside.on('data', data => {
      const head = /^HEAD /.test(data)
      if (head) proxy.heads++
      if (/\r\nUpgrade: websocket/i.test(data)) proxy.opened++
      if (proxy.fault !== 'deaf' || head) inside.write(data)
    })
    inside.on('data', data => proxy.fault === 'mute' || outside.write(data))
  })
  await new Promise(done => listener.listen(0, 'localhost', done))
  proxy.url = `http://localhost:${listener.address().port}/`
  return proxy
}

// ---- The browser.

let browser                         // opened with the first page
const complaints = []               // of any page: must stay empty
// A server that is down is what some cases are about.
const DOWN = /^WebSocket connection to .* failed|^Failed to load .* net::/

// Opens a page and waits until it is connected. With `clock`, its time can be moved on; `before`
// runs in it before its own scripts.
async function open(url, { clock, before, ...options } = {}) {
  browser ??= await chromium.launch({ executablePath: CHROMIUM,
    args: ['--no-sandbox', '--disable-gpu', '--disable-smooth-scrolling'],
    ignoreDefaultArgs: ['--disable-back-forward-cache'] })
  const context = await browser.newContext({ viewport: { width: 900, height: 600 }, ...options })
  const page = await context.newPage()
  if (clock) await page.clock.install()
  if (before) await page.addInitScript(before)
  const complain = words => complaints.push(`${url}: ${words}`)
  page.setDefaultTimeout(DEADLINE)
  page.on('console', message => DOWN.test(message.text()) || complain(message.text()))
  page.on('pageerror', error => complain(error.message))
  page.on('dialog', dialog => {
    if (!page.leaving) complain(`dialog: ${dialog.type()}`)
    dialog.accept()
  })
  page.on('request', request => {
    const { protocol, host } = new URL(request.url())
    if (protocol !== 'data:' && host !== new URL(url).host) complain(`asked for ${request.url()}`)
  })
  await page.goto(url)
  await connected(page)
  return page
}

// One case with a page of its own, in a channel of a server.
const visit = (name, server, channel, run, options) => test(name, async () => {
  const page = await open(server.url + query(channel), options)
  await run(page)
  page.leaving = true
  await page.context().close()
})

const says = words => page => page.waitForFunction(words =>
  state.textContent.includes(words), words)
const connected = says('Connected'), disconnected = says('No connection')
const texts = selector => page => page.$$eval(selector, list => list.map(p => p.textContent))
const messages = texts('#log p:not(.note)'), notes = texts('#log .note')
const waiting = texts('#outbox p')

async function shows(page, text) {
  const there = text => [...document.querySelectorAll('#log p')].some(p => p.textContent === text)
  await page.waitForFunction(there, text).catch(async () => {
    const last = JSON.stringify((await messages(page)).slice(-20))
    throw new Error(`"${text.slice(0, 200)}" did not show, but ${last}`)
  })
}

async function type(page, text) {
  await page.fill('#text', text)
  await page.press('#text', 'Enter')
}

// Runs the cases of a part; then says what is true of all of them.
const EXPECTED = /^chat: (listening on |peer [0-9a-f]{16} (joined|left|makes no progress))/
async function run(cases) {
  await test('all cases had their turn', cases)
  await test('no page complained or asked for anything else', () =>
    assert.deepEqual(complaints, []))
  await test('the servers end well and said nothing unexpected', async () => {
    for (const server of servers)
      if (ended(server) === null) assert.equal(await stop(server, 'SIGTERM'), 0)
    const lines = servers.flatMap(server => server.errors.split('\n'))
    assert.deepEqual(lines.filter(line => line && !EXPECTED.test(line)), [])
  })
  for (const { child } of servers) child.kill('SIGKILL')
  await browser?.close()
  process.exit(failed ? 1 : 0)
}

module.exports = { assert, test, visit, until, new_bus, start, stop, query, post, ws_open,
  start_proxy, open, connected, disconnected, messages, notes, waiting, shows, type, run }
