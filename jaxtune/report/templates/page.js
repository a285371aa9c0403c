'use strict';
const node = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const show = v => {
  const size = Math.abs(v);
  if (v && size < 1e-3) return v.toExponential(2).replace(/\.?0+e/, 'e');
  return size >= 1000 ? Math.round(v).toLocaleString('en') : String(+v.toPrecision(4));
};
const nearest = (points, x) => {
  let lo = 0, hi = points.length - 1;
  while (hi - lo > 1) { const mid = (lo + hi) >> 1; if (points[mid][0] < x) lo = mid; else hi = mid; }
  return Math.abs(points[lo][0] - x) <= Math.abs(points[hi][0] - x) ? points[lo] : points[hi];
};

// The read-out: the logged step (or the rate) next to the pointer or the arrow keys, and each curve's value there.
for (const plot of document.querySelectorAll('.plot')) {
  const [cursor, tip] = ['.cursor', '.tip'].map(name => plot.querySelector(name));
  const {x: [first, last], log, by, series} = JSON.parse(plot.parentElement.querySelector('script').textContent);
  const scale = log ? Math.log : v => v;
  const share = v => (scale(v) - scale(first)) / (scale(last) - scale(first));
  const steps = [...new Set(series.flatMap(s => s.points.map(p => p[0])))].sort((a, b) => a - b);
  const places = steps.map(step => [share(step)]);
  let at = -1;
  const hide = () => { cursor.hidden = tip.hidden = true; };
  const put = i => {
    at = Math.max(0, Math.min(steps.length - 1, i));
    const step = steps[at], left = 100 * places[at][0];
    const rows = series.map(s => [s, nearest(s.points, step)])
      .filter(([, p]) => Math.abs(share(p[0]) - places[at][0]) <= 1 / 60);
    if (series.length > 4) rows.sort((a, b) => a[1][1] - b[1][1]);
    tip.replaceChildren(node('strong', by + ' ' + show(step)));
    for (const [s, p] of rows.slice(0, 10)) {
      const row = node('div');
      row.append(node('i', '', 'key c' + s.colour), node('span', s.name), node('b', p[2] ?? show(p[1])));
      tip.append(row, ...p[3] ? [node('div', p[3], 'mute')] : []);
    }
    if (rows.length > 10) tip.append(node('div', (rows.length - 10) + ' more above these', 'mute'));
    cursor.hidden = tip.hidden = false;
    cursor.style.left = left + '%';
    const room = plot.clientWidth * left / 100;
    const x = room > plot.clientWidth / 2 ? room - tip.offsetWidth - 12 : room + 12;
    tip.style.left = Math.max(-40, Math.min(x, plot.clientWidth - tip.offsetWidth + 12)) + 'px';
  };
  plot.addEventListener('pointermove', e => {
    const box = plot.getBoundingClientRect();
    put(places.indexOf(nearest(places, (e.clientX - box.left) / box.width)));
  });
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  addEventListener('resize', hide);
  plot.addEventListener('keydown', e => {
    const move = {ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity}[e.key];
    if (move === undefined) return;
    e.preventDefault();
    put(at < 0 && move === -1 ? steps.length - 1 : at + move);
  });
}

// Tables: a click on a heading sorts by it, a second one turns the order. Empty cells stay at the end.
for (const table of document.querySelectorAll('table.sortable')) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    const button = node('button', head.textContent);
    button.type = 'button';
    head.replaceChildren(button);
    button.addEventListener('click', () => {
      const down = head.getAttribute('aria-sort') === 'ascending';
      const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const compare = (a, b) => {
        const [s, t] = [key(a), key(b)];
        if (!s || !t) return !s - !t;
        const order = isNaN(s) || isNaN(t) ? s.localeCompare(t) : s - t;
        return down ? -order : order;
      };
      body.append(...[...body.rows].sort(compare));
      heads.forEach(h => h.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    });
  });
}

// A filter: a row is shown if it holds every word. `lr=1e-4` asks for that cell under that heading or in the name, and
// for cells that begin so only where no cell is just that.
const equal = (a, b) => a === b || (a && b && +a === +b);
for (const table of document.querySelectorAll('table.filterable')) {
  const heads = [...table.tHead.rows[0].cells].map(cell => cell.textContent.toLowerCase());
  const rows = [...table.tBodies[0].rows].map(row => {
    const cells = [...row.cells].map(cell => cell.textContent.toLowerCase());
    const pairs = cells.flatMap((text, i) => [[heads[i], text], [heads[i], row.cells[i].dataset.v ?? text]]);
    pairs.push(...cells[0].split(/[\s,]+/).map(part => part.split('=')));
    return {row, pairs, text: cells.join('\n')};
  });
  const asked = word => {
    const [key, value] = word.split('=');
    for (const test of value === undefined ? [] : [v => equal(v, value), v => v.startsWith(value)]) {
      const holds = row => row.pairs.some(([k, v]) => k === key && test(v ?? ''));
      if (rows.some(holds)) return holds;
    }
    return row => row.text.includes(word);
  };
  const bar = node('label', 'Filter', 'filter'), input = node('input'), count = node('output');
  input.type = 'search';
  input.placeholder = 'words that a row must hold: ' + heads[2] + '=… or failed';
  const apply = () => {
    const tests = input.value.toLowerCase().split(/\s+/).filter(Boolean).map(asked);
    for (const r of rows) r.row.hidden = !tests.every(test => test(r));
    count.textContent = rows.filter(r => !r.row.hidden).length + ' of ' + rows.length;
  };
  input.addEventListener('input', apply);
  apply();
  bar.append(input, count);
  table.parentElement.before(bar);
}

for (const snippet of document.querySelectorAll('.snippet')) {
  const button = node('button', 'copy', 'copy'), code = snippet.querySelector('pre');
  button.type = 'button';
  button.addEventListener('click', async () => {
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = 'copied'; }
    catch { getSelection().selectAllChildren(code); button.textContent = 'selected'; }
    setTimeout(() => { button.textContent = 'copy'; }, 1500);
  });
  snippet.append(button);
}
