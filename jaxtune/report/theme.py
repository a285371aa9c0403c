"""How a page looks (CSS) and answers the pointer (JavaScript): plain, small, part of every page."""

CSS = """
:root{color-scheme:light dark;--page:#f7f7f4;--card:#fff;--ink:#141413;--soft:#55544f;--mute:#7b7a74;--line:#e3e2db;
--c0:#b4b2a9;--c1:#2a78d6;--c2:#eb6834;--c3:#1baf7a;--c4:#c98500;--c5:#d55181;--c6:#008300;--c7:#4a3aa7;--c8:#c93b3a;
--good:#0a6b2d;--bad:#b3261e;--goodbg:#dff3e4;--badbg:#fbe3e0;--code:#f1f0eb}
@media (prefers-color-scheme:dark){:root{--page:#111110;--card:#1b1b19;--ink:#f2f1ec;--soft:#c0beb4;--mute:#918f87;
--line:#32312d;--c0:#5c5a54;--c1:#4b94ea;--c2:#e2703f;--c3:#22ad7d;--c4:#d39a1c;--c5:#e06a95;--c6:#3fa43f;--c7:#9a90ee;
--c8:#ea6f6e;--good:#5fd08a;--bad:#ff8f86;--goodbg:#12331f;--badbg:#43201d;--code:#242320}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1080px;margin:0 auto;padding:2.2rem 1.4rem 4rem}
h1{font-size:1.9rem;line-height:1.2;margin:.1rem 0 .7rem;overflow-wrap:anywhere;letter-spacing:-.015em}
h2{font-size:1.12rem;margin:2.6rem 0 .8rem}
h3{font-size:.92rem;margin:1.1rem 0 .35rem}
p{margin:.4rem 0}
.eyebrow{color:var(--mute);font-size:.82rem}
.lead{font-size:1.08rem;max-width:46rem;overflow-wrap:anywhere}
.mute,.note{color:var(--mute);font-size:.85rem}
.note{max-width:46rem}
.tiles{display:grid;gap:.8rem;margin:1.5rem 0 0;
grid-template-columns:repeat(auto-fill,minmax(max(9.5rem,100%/(var(--most) + 1) + 1px),1fr))}
.tile,.chart,.sample,.box{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tile{padding:.75rem .95rem}
.tile b{display:block;font-size:1.45rem;font-weight:600;line-height:1.3;letter-spacing:-.01em}
.tile s{text-decoration:none;color:var(--mute);font-weight:400}
.tile small,.tile span{display:block;color:var(--soft);font-size:.82rem}
.tile small{color:var(--mute);overflow-wrap:anywhere}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(19rem,100%),1fr));gap:.8rem}
.chart{margin:0;padding:.8rem 1.2rem .5rem .9rem;min-width:0}
.wide{grid-column:1/-1}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem 1.1rem;align-items:baseline;font-size:.86rem}
.legend{display:flex;flex-wrap:wrap;gap:0 1rem;margin-left:auto;color:var(--soft);max-width:100%}
.legend>span{overflow-wrap:anywhere}
.legend em{font-style:normal;color:var(--mute)}
.key{display:inline-block;width:1.1em;height:0;border-top:2.5px solid var(--c);vertical-align:.27em;margin-right:.4em}
.key.none{border-color:transparent}
.key.faint{opacity:.35}
.plot{position:relative;height:10.5rem;margin:.7rem 0 1.7rem 3.1rem;cursor:crosshair;touch-action:pan-y}
.wide .plot{height:19rem}
.plot:focus-visible{outline:2px solid var(--c1);outline-offset:3px}
.plot svg{display:block;width:100%;height:100%;overflow:visible}
.plot path{fill:none;vector-effect:non-scaling-stroke;stroke:var(--c)}
.plot .grid{stroke:var(--line);stroke-width:1}
.plot .line{stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.plot .faint{stroke-width:1.2;opacity:.35}
.plot .faint.c0,.key.faint.c0{opacity:.8}
.plot .dots{stroke-width:1.5}
.plot .band{fill:var(--c);fill-opacity:.13;stroke-width:1;stroke-opacity:.13}
.dot,.ring,.hole{stroke-linecap:round}
.plot .dot{stroke-width:6.5}.plot .ring{stroke-width:16}.plot .hole{stroke-width:12;stroke:var(--card)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}.c8{--c:var(--c8)}
.ty,.tx{position:absolute;white-space:nowrap;color:var(--mute);font-size:.75rem;line-height:1;font-variant-numeric:tabular-nums}
.ty{right:100%;margin-right:.6rem;transform:translateY(-50%)}
.tx{top:100%;margin-top:.55rem;transform:translateX(-50%)}
.lost{position:absolute;top:0;transform:translate(-50%,-50%);font-size:1.15rem;line-height:1;font-weight:700;
white-space:nowrap}
.lost i,.legend i{font-style:normal;color:var(--c)}
.cursor{position:absolute;top:0;bottom:0;border-left:1px solid var(--mute);pointer-events:none}
.tip{position:absolute;top:.3rem;z-index:2;pointer-events:none;background:var(--card);border:1px solid var(--line);
border-radius:7px;padding:.4rem .6rem;font-size:.8rem;line-height:1.5;box-shadow:0 3px 12px #0003;white-space:nowrap;
max-width:16rem}
.tip div{display:flex;align-items:center;gap:.2em}
.tip .mute{padding-left:1.6em;white-space:normal}
.tip span{overflow:hidden;text-overflow:ellipsis}
.tip b{margin-left:auto;padding-left:1em;font-variant-numeric:tabular-nums}
.box{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.88rem}
th,td{text-align:left;padding:.42rem .9rem;border-top:1px solid var(--line);vertical-align:top}
thead th{border-top:0;color:var(--soft);font-weight:600;white-space:nowrap}
tbody th{font-weight:500}
td{unicode-bidi:isolate;overflow-wrap:anywhere}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.num>div{white-space:normal}
.filterable{font-size:.84rem}
.filterable :is(th,td){padding-inline:.55rem}
.filterable tbody th{max-width:min(24rem,55vw);overflow:hidden;text-overflow:ellipsis}
.status{white-space:nowrap}
.sortable th:first-child{position:sticky;left:0;background:var(--card);white-space:nowrap}
th button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
th button:hover{color:var(--ink)}
th button::after{content:"↕";opacity:.35;padding-left:.3em;font-size:.85em}
th[aria-sort=ascending] button::after{content:"↑";opacity:1}
th[aria-sort=descending] button::after{content:"↓";opacity:1}
.filter{display:flex;flex-wrap:wrap;gap:.3rem .8rem;align-items:baseline;margin-bottom:.6rem;color:var(--mute);
font-size:.85rem}
.filter input{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:7px;
padding:.35rem .7rem;width:22rem;max-width:100%}
.filter input:focus-visible{outline:2px solid var(--c1);outline-offset:1px}
.good{color:var(--good)}.bad{color:var(--bad)}
.dim{color:var(--mute)}
code,pre{font:.84rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;unicode-bidi:plaintext}
.snippet{position:relative;background:var(--code);border-radius:8px;padding:.7rem 5.2rem .7rem .9rem;
margin:.3rem 0 .9rem}
.snippet pre{white-space:pre;overflow-x:auto}
.copy{position:absolute;top:.5rem;right:.5rem;font:.76rem system-ui,sans-serif;color:var(--soft);background:var(--card);
border:1px solid var(--line);border-radius:6px;padding:.2rem .55rem;cursor:pointer}
.sample{padding:.8rem 1rem;margin-bottom:.8rem}
.sample h3{margin:.1rem 0 .25rem;color:var(--soft);font-weight:600;font-size:.8rem}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(16rem,100%),1fr));gap:.8rem 1.2rem;
margin-top:.8rem;padding-top:.7rem;border-top:1px solid var(--line)}
.answers>div{min-width:0}
mark{background:var(--badbg);color:inherit;border-radius:3px;box-shadow:inset 0 -2px var(--bad)}
.badge{border-radius:99px;padding:.05rem .5rem;margin-left:.4rem;font-size:.74rem;white-space:nowrap}
.badge.flush{margin-left:0}.badge.even{background:var(--line);color:var(--soft)}
.figure,.badge+small{white-space:nowrap}.figure small{display:block;color:var(--mute)}
.whiskers{min-width:min(8rem,22vw);padding:.35rem .3rem}
.whiskers span{display:block;position:relative;height:.55rem;border-bottom:1px solid var(--line)}
.whiskers i,.whiskers b{position:absolute;top:50%;background:var(--c)}
.whiskers i{height:3px;margin-top:-1.5px;border-radius:2px;opacity:.45}
.whiskers b{width:7px;height:7px;margin:-3.5px 0 0 -3.5px;border-radius:50%}
.shade{background:rgb(42 120 214 / var(--a));border-radius:5px;padding:0 .4rem}
.badge.good{background:var(--goodbg)}.badge.bad{background:var(--badbg)}
.columns{columns:2 24rem;column-gap:1.6rem}
.columns>section{break-inside:avoid;padding-top:1px}
.columns h2{margin-top:2.2rem}
.bar{display:block;height:5px;border-radius:3px;background:var(--line);min-width:3.5rem;
margin:.2em 0 .3em;overflow:hidden}
.bar i{display:block;height:100%;background:var(--c1)}
details{margin-top:.8rem}
summary{cursor:pointer;color:var(--soft);font-size:.9rem;margin-bottom:.6rem}
ul{padding-left:1.1rem;margin:.3rem 0}
li{margin:.15rem 0;overflow-wrap:anywhere}
a{color:var(--c1)}
footer{margin-top:3rem;color:var(--mute);font-size:.8rem}
@media (max-width:560px){main{padding:1.3rem .9rem 3rem}h1{font-size:1.5rem}
.tile{padding:.6rem .7rem}.tile b{font-size:1.12rem}
.tiles{gap:.5rem}.wide .plot{height:14rem}
th,td{padding:.4rem .55rem}.settings tr>:nth-child(4){display:none}
.legend{margin-left:0}.chart{padding:.7rem .9rem .3rem .6rem}}
@media print{body{background:#fff}.copy,.filter{display:none}.chart,.sample,tr{break-inside:avoid}}
"""

JS = """
'use strict';
const node = (tag, text, cls) => {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
};
const show = v => {
  const size = Math.abs(v);
  if (v && size < 1e-3) return v.toExponential(2).replace(/\\.?0+e/, 'e');
  return size >= 1000 ? Math.round(v).toLocaleString('en') : String(+v.toPrecision(4));
};
const nearest = (points, x) => {
  let lo = 0, hi = points.length - 1;
  while (hi - lo > 1) { const mid = (lo + hi) >> 1; if (points[mid][0] < x) lo = mid; else hi = mid; }
  return Math.abs(points[lo][0] - x) <= Math.abs(points[hi][0] - x) ? points[lo] : points[hi];
};

// The read-out: the logged step (or the rate) next to the pointer or the arrow keys, and each curve's value there.
for (const figure of document.querySelectorAll('.chart')) {
  const [plot, cursor, tip] = ['.plot', '.cursor', '.tip'].map(name => figure.querySelector(name));
  const {x: [first, last], log, by, series} = JSON.parse(figure.querySelector('script').textContent);
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
    pairs.push(...cells[0].split(/[\\s,]+/).map(part => part.split('=')));
    return {row, pairs, text: cells.join('\\n')};
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
    const tests = input.value.toLowerCase().split(/\\s+/).filter(Boolean).map(asked);
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
"""
