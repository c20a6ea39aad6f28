// Node's ws and the page in Chromium talk to the https server on the port
// that tls.py names. Prints a line for each case.
'use strict';

const assert = require('node:assert/strict');
const fs = require('node:fs');
const https = require('node:https');
const { once } = require('node:events');
const WebSocket = require('ws');
const { chromium } = require('playwright-core');

const CHROMIUM = '/usr/bin/chromium';
const FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic',
  '--no-first-run', '--disable-background-networking',
  '--disable-component-update', '--disable-sync'];
const SECONDS = 20; // what one wait may take
const host = `localhost:${process.argv[2]}`;
let failed = 0;

async function test(name, run) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Error('took too long')),
      2 * SECONDS * 1000);
  });
  try {
    await Promise.race([run(), late]);
    console.log(`ok - tls: ${name}`);
  } catch (error) {
    failed = 1;
    const words = String(error.message).replace(/\s+/g, ' ').slice(0, 500);
    console.log(`FAILED - tls: ${name}: ${words}`);
  }
  clearTimeout(timer);
}

async function open(channel) {
  const ws = new WebSocket(`wss://${host}/?channel=${channel}`,
    { rejectUnauthorized: false });
  ws.got = [];
  ws.on('message', (data, binary) => {
    ws.got.push(binary ? data : data.toString());
    ws.emit('got');
  });
  await once(ws, 'open');
  return ws;
}

async function next(ws) {
  while (ws.got.length === 0) await once(ws, 'got');
  return ws.got.shift();
}

async function node() {
  const [a, b] = [await open('node'), await open('node')];
  const big = Buffer.alloc(65536, 'binary');
  for (const message of ['hello', 'grüße ☃ 😀', 'x'.repeat(65536), big]) {
    a.send(message);
    assert.deepEqual(await next(a), message);
    assert.deepEqual(await next(b), message);
  }
  a.send('in ', { fin: false });
  a.ping('between');
  await once(a, 'pong');
  a.send('pieces', { fin: true });
  assert.equal(await next(b), 'in pieces');
  a.close(1000);
  assert.equal((await once(a, 'close'))[0], 1000);
  b.terminate();
}

// Keeps its connection: the second request needs no handshake.
async function agent() {
  const keeper = new https.Agent({ keepAlive: true, maxSockets: 1 });
  const ports = new Set();
  for (let i = 0; i < 3; i++) {
    const request = https.get(`https://${host}/`,
      { agent: keeper, rejectUnauthorized: false });
    const [response] = await once(request, 'response');
    assert.equal(response.statusCode, 200);
    ports.add(response.socket.localPort);
    const body = (await response.toArray()).join('');
    assert.equal(body, fs.readFileSync(`${__dirname}/../index.html`, 'utf8'));
  }
  assert.equal(ports.size, 1, 'connections');
  keeper.destroy();
}

async function browser() {
  const chrome = await chromium.launch({ executablePath: CHROMIUM,
    args: FLAGS });
  try {
    const complaints = [], pages = [];
    for (let i = 0; i < 2; i++) {
      const context = await chrome.newContext({ ignoreHTTPSErrors: true });
      const page = await context.newPage();
      page.setDefaultTimeout(SECONDS * 1000);
      page.on('console', (line) => complaints.push(line.text()));
      page.on('pageerror', (error) => complaints.push(error.message));
      page.on('websocket', (ws) => { page.socket = ws.url(); });
      const answer = await page.goto(`https://${host}/?channel=page`);
      assert.match((await answer.securityDetails()).protocol, /^TLS 1\.[23]$/);
      await page.waitForFunction(
        () => /Connected/.test(document.getElementById('state').textContent));
      assert.ok(page.socket.startsWith(`wss://${host}/`), page.socket);
      pages.push(page);
    }
    for (const [from, text] of [[0, 'from the left ☃'], [1, '<b>right</b>']]) {
      await pages[from].fill('#text', text);
      await pages[from].press('#text', 'Enter');
      for (const page of pages)
        await page.getByText(text, { exact: false }).first().waitFor();
    }
    const send = await pages[0].evaluate(async () => (await fetch(
      '/send?channel=page', { method: 'POST', body: 'by fetch' })).text());
    assert.equal(send, 'message sent');
    for (const page of pages) await page.getByText('by fetch').waitFor();
    assert.deepEqual(complaints, []);
  } finally {
    await chrome.close();
  }
}

(async () => {
  await test("Node's ws", node);
  await test("Node's https keeps its connection", agent);
  if (fs.existsSync(CHROMIUM)) await test('the page in Chromium', browser);
  else console.log(`skipped: tls: the page: ${CHROMIUM} is not there`);
  process.exit(failed);
})();
