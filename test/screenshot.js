#!/usr/bin/env node
// Makes the README's picture, test/screenshot.png: two people chat in two browser windows, on two
// instances of the program in $CHAT. They really do. (Wants Noto's fonts, with emoji.)
'use strict'
const { new_bus, start, open, shows, type, run } = require('./browser.js')

const TALK = [
  ['Ann', 'Good morning! Is anybody out there? 👋'],
  ['Bob', 'Hi Ann! I am on the other instance.'],
  ['Ann', 'So you got this over the bus?'],
  ['Bob', 'Yes: browser, WebSocket, your server, UDP, my server, my browser.'],
  ['Ann', 'And the source of all that?'],
  ['Bob', 'One C file: https://example.org/mini-ws-chat/main.c'],
  ['Zoë', 'Bonjour! Is there room for a third one?'],
  ['Bob', 'Always 🎉\nJust open the page.']]

const picture = windows => `<!doctype html><style>
  body { display: flex; gap: 24px; margin: 0; padding: 20px; width: max-content; background: #dfe4ec;
    font: 13px system-ui, sans-serif; color: #3a4250 }
  figure { margin: 0; border-radius: 8px; overflow: hidden; border: 1px solid #9aa5b5 }
  figcaption { padding: 7px 12px; background: #c5cdd9 }
  img { display: block }</style>${windows.map(([title, png]) => `<figure><figcaption>${title}
    </figcaption><img src="data:image/png;base64,${png.toString('base64')}"></figure>`).join('')}`

run(async () => {
  const bus = new_bus(), servers = [await start(bus), await start(bus)], pages = {}, windows = []
  for (const [i, name] of ['Ann', 'Bob', 'Zoë'].entries()) {
    pages[name] = await open(`${servers[i % 2].url}?channel=earth`,
      { viewport: { width: 440, height: 374 }, colorScheme: name === 'Bob' ? 'dark' : 'light' })
    await pages[name].fill('#nick', name)
  }
  for (const [name, words] of TALK) {
    await type(pages[name], words)
    for (const page of Object.values(pages)) await shows(page, `${name}: ${words}`)
  }
  await pages.Bob.fill('#text', 'Is it true')
  for (const [name, { port }] of [['Ann', servers[0]], ['Bob', servers[1]]])
    windows.push([`${name}’s browser – localhost:${port}`, await pages[name].screenshot()])
  const page = await pages.Zoë.context().newPage()
  await page.setContent(picture(windows))
  await page.locator('body').screenshot({ path: `${__dirname}/screenshot.png` })
})
