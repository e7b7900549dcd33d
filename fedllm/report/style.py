"""The style sheet and the one script of the page. Both are constants: nothing from a run gets into them."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --paper: #fdfdfb; --ink: #1d2126; --soft: #5c646e; --rule: #dcdfe3; --panel: #f4f5f3; --grid: #e4e6e9;
  --mark: #2f5f93; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171a; --ink: #e3e6e8; --soft: #9aa3ad; --rule: #30363c; --panel: #1b1f23; --grid: #2a3036;
  --mark: #8ab4de; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 Charter, "Bitstream Charter", "Iowan Old Style", Cambria, Georgia, serif; }
main, header, footer, noscript > p { max-width: 1080px; margin: 0 auto; padding: 0 24px; }
header { padding-top: 56px; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 6px; font-weight: 600; letter-spacing: -0.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; font-weight: 600; margin: 0 0 14px; }
h3 { font-size: 1.02rem; font-weight: 600; margin: 28px 0 6px; }
p { margin: 0 0 12px; max-width: 68ch; }
.kind, .lede, nav, dt, dd small, th, td, caption, figcaption, summary, .notes, footer, .plot {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
.kind { margin: 0 0 10px; color: var(--mark); font-size: 0.82rem; letter-spacing: 0.04em; }
.lede { color: var(--soft); font-size: 0.95rem; margin: 0 0 24px; max-width: none; overflow-wrap: anywhere; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 0.86rem; padding: 10px 0;
  border-top: 1px solid var(--rule);
  border-bottom: 1px solid var(--rule); }
a { color: var(--mark); text-decoration: none; } a:hover, a:focus { text-decoration: underline; }
section { padding: 40px 0 4px; }
dl { display: flex; flex-wrap: wrap; gap: 1px; margin: 0 0 26px;
  background: var(--rule); border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
dl > div { flex: 1 1 140px; background: var(--paper); padding: 12px 16px; }
dt { color: var(--soft); font-size: 0.78rem; } dd { margin: 2px 0 0; font-size: 1.3rem;
  font-variant-numeric: tabular-nums; }
dd small { color: var(--soft); font-size: 0.78rem; display: block; }
.scroll { overflow-x: auto; margin: 0 0 18px; }
table { border-collapse: collapse; font-size: 0.88rem; min-width: min(100%, 420px);
  font-variant-numeric: tabular-nums lining-nums; }
caption { text-align: left; font-weight: 600; padding: 0 0 6px; }
th, td { text-align: left; padding: 6px 22px 6px 0; vertical-align: top; overflow-wrap: break-word; }
th:last-child, td:last-child { padding-right: 2px; }
thead th { color: var(--soft); font-weight: 500; border-bottom: 1px solid var(--ink); white-space: nowrap; }
tbody th { font-weight: 500; } tbody tr + tr > * { border-top: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.notes { padding-left: 18px; font-size: 0.88rem; color: var(--soft); max-width: 80ch; margin: 0 0 18px;
  overflow-wrap: anywhere; }
.notes b { color: var(--ink); font-weight: 500; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 12px 36px; }
.figures > figure:first-child:nth-last-child(odd) { grid-column: 1 / -1; }
figure { margin: 0 0 14px; min-width: 0; }
figcaption { font-size: 0.84rem; color: var(--soft); margin: 0 0 4px; }
figcaption b { display: block; color: var(--ink); font-size: 0.95rem; font-weight: 600; }
.plot { min-height: 120px; }
.plot text { fill: var(--ink) !important; }
.plot .gridlayer path, .plot .zerolinelayer path { stroke: var(--grid) !important; }
.plot .hoverlayer .hovertext path { stroke: none !important; } .plot .hoverlayer text { fill: #fff !important; }
details { margin: 0 0 14px; } details[open] > summary { margin-bottom: 10px; }
summary { cursor: pointer; color: var(--mark); font-size: 0.92rem; }
pre { background: var(--panel); border: 1px solid var(--rule); border-radius: 6px; padding: 14px 16px; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 8px 0 18px; }
footer { color: var(--soft); font-size: 0.82rem; padding-top: 36px; padding-bottom: 56px; }
@media (max-width: 600px) { body { font-size: 16px; } main, header, footer, noscript > p {
    padding-left: 16px; padding-right: 16px; }
  header { padding-top: 28px; } h1 { font-size: 1.6rem; }
  th, td { padding-right: 14px; min-width: 4.5em; overflow-wrap: anywhere; } thead th { white-space: normal; }
  tbody th { min-width: 7em; } pre { white-space: pre-wrap; overflow-wrap: anywhere; }
  .wide, .wide caption, .wide tbody, .wide tr, .wide th, .wide td { display: block; }
  .wide thead { display: none; }
  .wide tr { padding: 6px 0; border-top: 1px solid var(--rule); }
  .wide tr > * { border: 0 !important; padding: 2px 0; }
  .wide td { display: flex; justify-content: space-between; gap: 16px; text-align: right; }
  .wide td::before, .wide th::before { content: attr(data-column) " "; color: var(--soft); text-align: left; } }
@media print { nav { display: none; } section { break-inside: avoid-page; } }
"""

SCRIPT = """
for (const data of document.querySelectorAll("script[type='application/json']")) {
  const figure = JSON.parse(data.textContent);
  Plotly.newPlot(data.previousElementSibling, figure.data, figure.layout, {displayModeBar: false, responsive: true});
}
"""
