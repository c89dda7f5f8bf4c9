"""The style sheet of pages: system fonts, light and dark, one column that fits a phone."""

from __future__ import annotations

from hfdtl_bayes.report.figures import PALETTE

LIGHT: dict[str, str] = {**PALETTE, "ground": "#ffffff", "card": "#f6f7f9", "good": "#2b7a4b", "bad": "#b3261e"}
"""Colours by role on a light ground: those of figures, then the page's own."""

DARK: dict[str, str] = {
    "ink": "#e6e8ee",
    "muted": "#9aa1b0",
    "line": "#3a3f4b",
    "blue": "#6aa9f0",
    "orange": "#f39a4b",
    "purple": "#c79be0",
    "green": "#74c79a",
    "ground": "#14161b",
    "card": "#1d2027",
    "good": "#6fd39b",
    "bad": "#ff8a80",
}
"""The same roles on a dark ground: lighter, with the same hues."""

_RULES = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:60rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:1.05rem;font-weight:600;margin:0;color:var(--muted)}
h2{font-size:1.15rem;margin:2.4rem 0 .5rem}
h3{font-size:.8rem;font-weight:600;margin:0 0 .15rem;color:var(--muted)}
p{margin:.4rem 0}
.muted,figcaption{color:var(--muted);font-size:.88rem}
.verdict{border:1px solid var(--line);border-left:.5rem solid var(--tone);border-radius:.5rem;
  background:var(--card);padding:.9rem 1.1rem;margin:.7rem 0}
.verdict .answer{font-size:1.5rem;line-height:1.25;font-weight:700;margin:0 0 .35rem}
.verdict .answer span{color:var(--tone)}
.yes{--tone:var(--good)}.wait{--tone:var(--orange)}.no{--tone:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12.5rem,1fr));gap:.6rem;margin:.6rem 0}
.tile{border:1px solid var(--line);border-radius:.5rem;background:var(--card);padding:.6rem .8rem;font-size:.88rem;
  line-height:1.4}
.tile b{display:block;font-size:1.35rem;line-height:1.25;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
.verdict pre{margin:.5rem 0 0;background:var(--ground)}
table{border-collapse:collapse;font-size:.9rem;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.32rem .5rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child{text-align:left}
thead th{font-weight:600;color:var(--muted);vertical-align:bottom}
tbody th{font-weight:500}
.own{color:var(--blue);font-weight:600}
.words td,.words th{text-align:left;vertical-align:top}
.words td{white-space:normal}
figure{margin:.5rem 0}
figure svg{width:100%;height:auto;display:block}
.narrow{display:none}
pre{background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.7rem .8rem;overflow-x:auto;
  font-size:.82rem;white-space:pre-wrap;overflow-wrap:anywhere}
code{font-size:.9em;overflow-wrap:anywhere}
details{margin-top:.8rem}
summary{cursor:pointer;font-weight:600}
ul{margin:.4rem 0;padding-left:1.2rem}
@media(max-width:40rem){.wide{display:none}.narrow{display:block}.verdict .answer{font-size:1.25rem}
.tiles{grid-template-columns:1fr 1fr;gap:.4rem}.tile{padding:.5rem .6rem;font-size:.8rem}.tile b{font-size:1.15rem}
  th,td{padding:.3rem .4rem}}
@media(max-width:40rem){.words table,.words tbody,.words tr,.words th,.words td{display:block;border:0}
.words thead{display:none}.words tr{border-bottom:1px solid var(--line);padding:.35rem 0}
.words th,.words td{padding:.05rem 0;white-space:normal;overflow-wrap:anywhere}.words tbody th{font-weight:700}}
@media print{.scroll{overflow:visible}}
"""


def stylesheet() -> str:
    """Return the CSS, with the colours of figures as variables."""

    def variables(colours: dict[str, str]) -> str:
        return ":root{" + ";".join(f"--{name}:{colour}" for name, colour in colours.items()) + "}"

    return f":root{{color-scheme:light dark}}{variables(LIGHT)}@media(prefers-color-scheme:dark){{{variables(DARK)}}}{_RULES}"
