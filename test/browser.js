// What the tests in a real browser share: instances of the program in $CHAT,
// a proxy whose connections fail as told, and pages that are watched for
// complaints.
'use strict'
const fs = require('fs'), net = require('net'), http = require('http')
const dgram = require('dgram'), path = require('path')
const assert = require('assert/strict')
const { spawn } = require('child_process')

const CHROMIUM = '/usr/bin/chromium'
const CHAT = path.resolve(__dirname, '..', process.env.CHAT || './chat')
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic',
  '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync', '--disable-smooth-scrolling']
const DEADLINE = 15000              // for anything that is waited for, ms

const part = path.basename(process.argv[1], '.js')     // page, channel

function skip(reason) {
  console.log(`skipped: ${part}: ${reason}`)
  process.exit(0)
}

function need(name) {
  try { return require(name) } catch { skip(`${name} is not installed`) }
}

const { chromium } = need('playwright-core')
const WebSocket = need('ws')
if (!fs.existsSync(CHROMIUM)) skip(`${CHROMIUM} is not there`)

let failed = 0

// One case. What it returns is a measurement, and is printed.
async function test(name, run) {
  try {
    const figures = await run()
    console.log(`ok - ${part}: ${name}${figures ? `: ${figures}` : ''}`)
  } catch (error) {
    failed++
    const detail = String(error.message).replace(/\u001b\[\d+m/g, '')
    console.log(`FAILED - ${part}: ${name}: ` +
      detail.split('\n').filter(line => line.trim()).join(' | ').slice(0, 1500))
  }
}

// Rejects when `promise` takes too long; says what was waited for.
function within(promise, what, ms = DEADLINE) {
  let timer
  const late = new Promise((_, no) => {
    timer = setTimeout(() => no(new Error(`waited too long for ${what}`)), ms)
  })
  return Promise.race([promise, late]).finally(() => clearTimeout(timer))
}

// ---- The servers.

function free_udp_port() {
  return new Promise(done => {
    const socket = dgram.createSocket('udp4').bind(0, () => {
      const { port } = socket.address()
      socket.close(() => done(port))
    })
  })
}

const started = []
const EXPECTED = /^chat: (listening on |peer [0-9a-f]{16} (joined|left))/

// Starts an instance; resolves when it listens.
async function start(bus, port = 0, ...options) {
  const child = spawn(CHAT, ['-q', '-p', String(port), '-b', bus, ...options],
    { stdio: ['ignore', 'ignore', 'pipe'] })
  const server = { child, bus, errors: '' }
  server.ended = new Promise(done => {
    child.on('error', error => done(`cannot start: ${error.message}`))
    child.on('exit', (code, signal) => done(signal || code))
  })
  started.push(server)
  const listening = new Promise((yes, no) => {
    child.stderr.on('data', data => {
      server.errors += data
      const found = /listening on http:\/\/localhost:(\d+)\//.exec(server.errors)
      if (found) yes(Number(found[1]))
    })
    server.ended.then(how => no(new Error(`${CHAT} ended: ${how} ` +
      server.errors)))
  })
  server.port = await within(listening, 'the server to listen')
  server.url = `http://localhost:${server.port}/`
  return server
}

const running = child => child.exitCode === null && child.signalCode === null

async function stop(server, signal) {
  server.child.kill(signal)
  return within(server.ended, `the end of the server after ${signal}`)
}

// Sends a message without a browser.
async function post(server, channel, message) {
  const answer = await fetch(
    `${server.url}send?channel=${encodeURIComponent(channel)}`,
    { method: 'POST', body: message, signal: AbortSignal.timeout(DEADLINE) })
  assert.equal(answer.status, 200, '/send')
}

async function ws_open(server, channel) {
  const ws = new WebSocket(
    `ws://localhost:${server.port}/?channel=${encodeURIComponent(channel)}`)
  await within(new Promise((yes, no) => ws.on('open', yes).on('error', no)),
    'a WebSocket')
  return ws
}

// A proxy that serves the server beneath /chat/, and whose WebSockets fail as
// told: `down` refuses new ones, `deaf` swallows what the page sends, `mute`
// what the server answers. cut() ends those there are.
async function start_proxy(server) {
  const sockets = new Set()
  const proxy = { down: false, deaf: false, mute: false, opened: 0 }
  const keep = socket => sockets.add(socket.on('error', () => {}))
  const inner = url => url.replace(/^\/chat\//, '/')
  proxy.cut = () => {
    for (const socket of sockets) socket.destroy()
    sockets.clear()
  }
  const inside_path = request => request.url.startsWith('/chat/')
  const listener = http.createServer((request, response) => {
    if (!inside_path(request)) return response.writeHead(404).end()
    request.pipe(http.request({ port: server.port, method: request.method,
      path: inner(request.url), headers: request.headers }, answer => {
      response.writeHead(answer.statusCode, answer.headers)
      answer.pipe(response)
    }))
  })
  listener.on('upgrade', (request, client) => {
    if (proxy.down || !inside_path(request)) return client.destroy()
    proxy.opened++
    const inside = net.connect(server.port, 'localhost')
    keep(client).add(inside)
    keep(inside)
    let head = `GET ${inner(request.url)} HTTP/1.1\r\n`
    for (let i = 0; i < request.rawHeaders.length; i += 2)
      head += `${request.rawHeaders[i]}: ${request.rawHeaders[i + 1]}\r\n`
    inside.write(head + '\r\n')
    client.on('data', data => proxy.deaf || inside.write(data))
    inside.on('data', data => proxy.mute || client.write(data))
    client.on('close', () => inside.destroy())
    inside.on('close', () => client.destroy())
  })
  await new Promise(done => listener.listen(0, 'localhost', done))
  proxy.url = `http://localhost:${listener.address().port}/chat/`
  proxy.close = () => { proxy.cut(); listener.close() }
  return proxy
}

// ---- The browser.

let browser                         // opened with the first page
const complaints = []               // of any page: must stay empty

async function open(url, options = {}, ready = connected) {
  browser ??= await chromium.launch({ executablePath: CHROMIUM, args: FLAGS })
  const context = await browser.newContext(
    { viewport: { width: 900, height: 600 }, ...options })
  return visit(await context.newPage(), url, ready)
}

// Loads a page; resolves when it is connected, or else `ready`.
async function visit(page, url, ready = connected) {
  const complain = words => complaints.push(`${url}: ${words}`)
  page.setDefaultTimeout(DEADLINE)
  page.on('console', message => {
    // A server that is down is what some cases are about.
    if (!/^WebSocket connection to .* failed/.test(message.text()))
      complain(`${message.type()}: ${message.text()}`)
  })
  page.on('pageerror', error => complain(error.message))
  page.on('dialog', dialog => {
    if (!page.leaving) complain(`dialog: ${dialog.type()}`)
    dialog.accept()
  })
  page.on('request', request => {
    if (!/^data:/.test(request.url()) && request.url() !== page.expected)
      complain(`requested ${request.url()}`)
  })
  page.on('websocket', ws => {
    const { host } = new URL(ws.url())
    if (host !== new URL(url).host && host !== page.elsewhere)
      complain(`connected to ${ws.url()}`)
  })
  await page.addInitScript(() => document.addEventListener(
    'securitypolicyviolation',
    event => console.log('policy violated: ' + event.violatedDirective)))
  page.expected = url.split('#')[0]
  page.answer = await page.goto(url)
  await ready(page)
  return page
}

const close = page => page.context().close()

const connected = page =>
  page.waitForFunction(() => /Connected/.test(state.textContent))
const disconnected = page =>
  page.waitForFunction(() => /No connection/.test(state.textContent))

// What the log shows, the page's own notes left out or alone.
const messages = page => page.$$eval('#log p:not(.note)',
  list => list.map(p => p.textContent))
const notes = page => page.$$eval('#log .note',
  list => list.map(p => p.textContent))
const waiting = page => page.$$eval('#outbox p',
  list => list.map(p => p.textContent))

async function shows(page, text) {
  try {
    await page.waitForFunction(text =>
      [...document.querySelectorAll('#log p')].some(p => p.textContent === text),
    text)
  } catch {
    throw new Error(`"${text.slice(0, 200)}" did not show; there are: ` +
      JSON.stringify((await messages(page)).slice(-20)))
  }
}

async function type(page, text) {
  await page.fill('#text', text)
  await page.press('#text', 'Enter')
}

// Runs the cases of a part; then says what is true of all of them.
async function run(cases) {
  try {
    await cases()
    await test('no page complained or asked for anything else', async () => {
      assert.deepEqual(complaints, [])
    })
    await test('the servers end well and say nothing unexpected', async () => {
      for (const server of started.filter(({ child }) => running(child)))
        assert.equal(await stop(server, 'SIGTERM'), 0)
      const odd = started.flatMap(server => server.errors.split('\n'))
        .filter(line => line && !EXPECTED.test(line))
      assert.deepEqual(odd, [])
    })
  } catch (error) {
    failed++
    console.log(`FAILED - ${part}: ` +
      String(error.stack).split('\n').join(' | '))
  }
  for (const { child } of started)
    if (running(child)) child.kill('SIGKILL')
  await browser?.close()
  process.exit(failed ? 1 : 0)
}

module.exports = { WebSocketServer: WebSocket.Server, assert, test, within,
  free_udp_port, start, stop, post, ws_open, start_proxy, open, visit, close,
  connected, disconnected, messages, notes, waiting, shows, type, run }
