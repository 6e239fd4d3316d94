// A loop over the sections of the book, a list that is fetched when it is first needed.
const field = document.getElementById('search'), found = document.getElementById('found')
const search = () => {
  const words = field.value.toLowerCase().split(/\s+/).filter(w => w)
  const rank = s => words.filter(w => s[1].toLowerCase().includes(w)).length
  const hits = words.length ? SECTIONS.filter(s => words.every(w => s[2].includes(w))) : []
  hits.sort((a, b) => rank(b) - rank(a))
  found.replaceChildren(...hits.slice(0, 20).map(([href, title]) => {
    const item = document.createElement('li'), link = item.appendChild(document.createElement('a'))
    link.href = href
    link.textContent = title
    return item
  }))
}
field.addEventListener('focus', () => {
  const list = document.head.appendChild(document.createElement('script'))
  list.src = 'sections.js'
  list.onload = () => {
    field.addEventListener('input', search)
    search()
  }
}, {once: true})
