// What HTML lacks: a picture can be dropped or pasted anywhere on the page, and the band of the entry under the pointer
// is framed on the query as well. Everything else works without this file.
const form = document.getElementById('ask')
const root = document.documentElement

function say(text) { document.getElementById('problem').textContent = text }

function megabytes(n) { return (n / 2 ** 20).toFixed(1) + ' MB' }

function send(file) {
  if (!file) return say('There is no picture in what was dropped or pasted.')
  const most = Number(form.dataset.most)
  if (file.size > most) return say(`This file has ${megabytes(file.size)}, and at most ${megabytes(most)} can be sent.`)
  const files = new DataTransfer()
  files.items.add(file)
  form.elements.picture.files = files.files
  say('')
  root.classList.add('busy')
  form.requestSubmit()
}

function picture(transfer) {
  return Array.from(transfer.files).find(file => file.type.startsWith('image/')) || transfer.files[0]
}

function isFile(event) { return Array.from(event.dataTransfer.types).includes('Files') }

if (form) {
  root.classList.add('script')
  form.elements.picture.addEventListener('change', event => send(event.target.files[0]))
  document.addEventListener('dragover', event => {
    if (!isFile(event)) return
    event.preventDefault()
    root.classList.add('over')
  })
  document.addEventListener('dragleave', event => { if (!event.relatedTarget) root.classList.remove('over') })
  document.addEventListener('drop', event => {
    if (!isFile(event)) return
    event.preventDefault()
    root.classList.remove('over')
    send(picture(event.dataTransfer))
  })
  document.addEventListener('paste', event => {
    if (event.clipboardData.files.length) send(picture(event.clipboardData))
  })
  window.addEventListener('pageshow', () => root.classList.remove('busy'))
}

const mark = document.querySelector('.drop .mark rect')

function frame(card) {
  if (!mark || !card || !card.dataset.top) return
  mark.setAttribute('y', (100 * card.dataset.top).toFixed(2))
  mark.setAttribute('height', (100 * (card.dataset.bottom - card.dataset.top)).toFixed(2))
}

for (const card of document.querySelectorAll('.card')) {
  card.addEventListener('pointerenter', () => frame(card))
  card.addEventListener('focusin', () => frame(card))
}
frame(document.querySelector('.card'))
