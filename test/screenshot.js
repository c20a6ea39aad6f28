#!/usr/bin/env node
// Makes the README's picture, test/screenshot.png: two people chat in two
// browser windows, on two instances of the program in $CHAT. They really do.
'use strict'
const fs = require('fs'), path = require('path')
const { free_udp_port, start, open, close, shows, type, run } =
  require('./browser.js')

const FILE = path.join(__dirname, 'screenshot.png')
const TALK = [
  ['Ann', 'Good morning! Is anybody out there? 👋'],
  ['Bob', 'Hi Ann! I am on the other instance.'],
  ['Ann', 'So you got this over the bus?'],
  ['Bob', 'Yes: browser, WebSocket, your server, UDP, my server, my browser.'],
  ['Ann', 'And the source of all that?'],
  ['Bob', 'One C file: https://example.org/mini-ws-chat/main.c'],
  ['Ann', 'Lovely, I will read it over a cup of tea ☕'],
  ['Zoë', 'Bonjour! Is there room for a third one?'],
  ['Bob', 'Always 🎉']]

// Both windows side by side, each with its owner and address.
const PICTURE = windows => `<!doctype html><meta charset="utf-8"><style>
  body { display: flex; gap: 24px; margin: 0; padding: 20px; width: max-content;
    font: 13px system-ui, sans-serif; color: #3a4250; background: #dfe4ec }
  figure { margin: 0; border-radius: 8px; overflow: hidden;
    box-shadow: 0 2px 10px #0005 }
  figcaption { padding: 7px 12px; background: #c5cdd9 }
  img { display: block }
  </style>${windows.map(({ title, png }) =>
    `<figure><figcaption>${title}</figcaption>` +
    `<img src="data:image/png;base64,${png.toString('base64')}"></figure>`)
    .join('')}`

run(async () => {
  const bus = `239.255.80.80:${await free_udp_port()}`
  const servers = [await start(bus), await start(bus)], pages = {}
  for (const [i, name] of ['Ann', 'Bob', 'Zoë'].entries()) {
    pages[name] = await open(`${servers[i % 2].url}?channel=earth`, {
      viewport: { width: 440, height: 460 },
      colorScheme: name === 'Bob' ? 'dark' : 'light' })
    await pages[name].fill('#nick', name)
  }
  for (const [name, words] of TALK) {
    await type(pages[name], words)
    for (const page of Object.values(pages))
      await shows(page, `${name}: ${words}`)
  }
  await pages.Ann.focus('#text')
  await pages.Bob.evaluate(() => document.activeElement.blur())
  const windows = []
  for (const [name, i] of [['Ann', 0], ['Bob', 1]])
    windows.push({ title: `${name}’s browser – localhost:${servers[i].port}`,
      png: await pages[name].screenshot() })
  const picture = await pages.Zoë.context().newPage()
  await picture.setContent(PICTURE(windows))
  await picture.waitForFunction(() =>
    [...document.images].every(image => image.complete))
  await (await picture.$('body')).screenshot({ path: FILE })
  for (const page of Object.values(pages)) await close(page)
  console.log(`${path.relative('.', FILE)}: ` +
    `${Math.ceil(fs.statSync(FILE).size / 1024)} KB`)
})
