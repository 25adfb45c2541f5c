"""The page: the frame, style and script of every HTML file, all in the file itself."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { --ink: #1c1c1c; --faint: #5a5a5a; --page: #ffffff; --line: #dddddd; --field: #f5f5f5; --link: #1f4e79; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --faint: #ababab; --page: #17191c; --line: #3a3d42; --field: #22252a; --link: #9ec5e8; }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
p, li, figcaption { max-width: 48rem; overflow-wrap: anywhere; }
figure { margin: 2rem 0; } figcaption { color: var(--faint); margin-top: .5rem; }
.paper { background: #ffffff; border: 1px solid var(--line); border-radius: 4px; padding: .5rem; overflow-x: auto;
  width: fit-content; max-width: 100%; }
.paper img { display: block; height: auto; max-width: 100%; min-width: min(100%, 44rem); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th { text-align: left; position: sticky; top: 0; background: var(--field); border-bottom: 1px solid var(--line); }
th { vertical-align: bottom; } th.number { text-align: right; }
th button { all: unset; cursor: pointer; padding: .35rem .6rem; display: inline-block; font-weight: 600;
  max-width: 8rem; }
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; max-width: 28rem; }
td.number { text-align: right; }
pre { background: var(--field); border: 1px solid var(--line); border-radius: 4px; padding: .75rem; overflow-x: auto; }
summary { cursor: pointer; color: var(--link); }
@media print {
  :root { --ink: #000000; --faint: #333333; --page: #ffffff; --line: #bbbbbb; --field: #ffffff; }
  body { max-width: none; padding: 0; font-size: 10pt; } figure, tr, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; } th { position: static; } .paper { border: 0; padding: 0; }
  .scroll, .paper { overflow: visible; } .paper img { min-width: 0; } table { font-size: 7pt; }
  th button { padding: .15rem .3rem; }
  td { padding: .1rem .3rem; } td:first-child { min-width: 0; }
  th[aria-sort] button::after { content: ""; }
}
"""

# Sorts numbers by size, all else by letters; what is missing stays at the end either way.
_SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
    const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map((row) => [row.cells[column], row]);
    const rank = ([cell]) => cell.dataset.value ? 0 : cell.textContent === "–" ? 2 : 1;
    rows.sort((a, b) => rank(a) - rank(b) || sign * (rank(a) ? a[0].textContent.localeCompare(b[0].textContent, "en",
      { numeric: true }) : Number(a[0].dataset.value) - Number(b[0].dataset.value)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }));
}
"""


def page(title: str, body: str) -> str:
    """A whole HTML document.

    Args:
        title: Its title, plain text.
        body: What follows the title, HTML.

    Returns:
        The document.

    Example:
        >>> page("A & B", "<p>text</p>").splitlines()[0]
        '<!doctype html>'
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )
