"""A finished recording as one HTML page: timeline, text to search, click to seek."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from mmtransfer.monitoring.events import Alert, Sound, Transcript
from mmtransfer.monitoring.sources.cameras import printable
from mmtransfer.speech.recordings import AUDIO_SUFFIXES

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8886; --speech: #3b82c4; --alert: #d6322c;
  --sound: #d08a1d; --positive: #2e9e5b; --negative: #c8453b; --neutral: #8a8f98; }}
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 64rem; padding: 1rem; }}
h1 {{ font-size: 1.2rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }}
.top {{ position: sticky; top: 0; background: Canvas; padding-bottom: .5rem; z-index: 1; }}
video {{ max-height: 40vh; max-width: 100%; background: #000; }} audio {{ width: 100%; }}
svg {{ width: 100%; height: 4.5rem; display: block; border: 1px solid var(--line);
  border-radius: 4px; cursor: pointer; margin: .5rem 0; }}
input {{ font: inherit; width: 100%; box-sizing: border-box; padding: .3rem .6rem; }}
ol {{ list-style: none; margin: 0; padding: 0; }}
li {{ display: flex; gap: .8rem; padding: .25rem .4rem; border-bottom: 1px solid var(--line);
  cursor: pointer; }}
li:hover, li.now {{ background: #3b82c422; }}
time {{ font-variant-numeric: tabular-nums; opacity: .7; white-space: nowrap; }}
.tag {{ color: #fff; border-radius: 3px; padding: 0 .4rem; font-size: .8rem; }}
.hidden {{ display: none; }} .note {{ opacity: .7; }} mark {{ background: #ffe08a; color: #000; }}
</style>
</head>
<body>
<div class="top">
<h1>{title}</h1>
{player}
<svg id="timeline" viewBox="0 0 1000 60" preserveAspectRatio="none" role="img"
  aria-label="speech, sentiment, alerts and sounds over time"></svg>
<input id="search" type="search" placeholder="Search the text" aria-label="Search the text">
<p class="note" id="count"></p>
</div>
<ol id="lines"></ol>
<script type="application/json" id="data">{data}</script>
<script>
const items = JSON.parse(document.getElementById("data").textContent);
const player = document.querySelector("video, audio");
const svg = document.getElementById("timeline"), list = document.getElementById("lines");
const css = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
let length = Math.max(1, ...items.map(i => i.end));
const clock = t => [t / 3600, t / 60 % 60, t % 60]
  .map(v => String(Math.floor(v)).padStart(2, "0")).join(":");
const colour = label => css("--" + label.toLowerCase()) ||
  `hsl(${{[...label].reduce((h, c) => (h * 31 + c.codePointAt(0)) % 360, 7)}} 50% 45%)`;
const kind = item => item.event === "alert" ? "alert" : item.event === "sound" ? "sound" : "speech";
function seek(t) {{ if (player) {{ player.currentTime = Math.max(0, t - 0.3); player.play(); }} }}
function draw() {{
  svg.replaceChildren();
  const bar = (item, y, height, fill) => {{
    const r = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    r.setAttribute("x", 1000 * item.start / length);
    r.setAttribute("width", Math.max(1.5, 1000 * (item.end - item.start) / length));
    r.setAttribute("y", y); r.setAttribute("height", height); r.setAttribute("fill", fill);
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = clock(item.start) + " " + (item.phrase || item.text || "sound");
    r.append(title); svg.append(r);
  }};
  for (const item of items) {{
    if (kind(item) === "alert") bar(item, 2, 14, css("--alert"));
    else if (kind(item) === "sound") bar(item, 2, 14, css("--sound"));
    else bar(item, 20, 22, css("--speech"));
    if (item.sentiment) bar(item, 45, 12, colour(item.sentiment));
  }}
}}
const rows = items.map(item => {{
  const row = document.createElement("li"), when = document.createElement("time");
  when.textContent = clock(item.start);
  const text = document.createElement("span");
  row.append(when);
  const tag = (name, fill) => {{
    const t = document.createElement("span");
    t.className = "tag"; t.textContent = name; t.style.background = fill; row.append(t);
  }};
  if (kind(item) === "alert") tag("alert: " + item.phrase, css("--alert"));
  if (kind(item) === "sound") tag(`sound ${{Math.round(item.level_db)}} dB`, css("--sound"));
  if (item.sentiment) tag(item.sentiment, colour(item.sentiment));
  row.append(text);
  row.onclick = () => {{ if (!getSelection().toString()) seek(item.start); }};
  list.append(row);
  return {{item, row, text}};
}});
function show() {{
  const wanted = document.getElementById("search").value.trim().toLowerCase();
  let count = 0;
  for (const {{item, row, text}} of rows) {{
    const said = item.text || "", at = wanted ? said.toLowerCase().indexOf(wanted) : -1;
    row.classList.toggle("hidden", wanted !== "" && at < 0);
    text.replaceChildren(said);
    if (at >= 0) {{
      const found = document.createElement("mark");
      found.textContent = said.slice(at, at + wanted.length);
      text.replaceChildren(said.slice(0, at), found, said.slice(at + wanted.length));
    }}
    count += wanted === "" || at >= 0;
  }}
  document.getElementById("count").textContent = `${{count}} of ${{rows.length}} lines`;
}}
svg.onclick = event => {{
  const box = svg.getBoundingClientRect();
  seek(length * (event.clientX - box.left) / box.width);
}};
document.getElementById("search").oninput = show;
if (player) {{
  player.onloadedmetadata = () => {{
    if (isFinite(player.duration)) {{ length = Math.max(length, player.duration); draw(); }}
  }};
  player.ontimeupdate = () => rows.forEach(({{item, row}}) => row.classList.toggle("now",
    item.start <= player.currentTime && player.currentTime < item.end));
}}
draw(); show();
</script>
</body>
</html>
"""


def report(source: str, items: Sequence[Transcript | Alert | Sound], *, folder: Path) -> str:
    """The page; `folder` is where it will lie, from which the recording is found again.

    The recording itself is not part of the page: it plays while it lies where it was.
    """
    path = Path(source)
    address = source if "://" in source else ""
    if not address and path.is_file():
        try:
            address = quote(os.fsencode(Path(os.path.relpath(path, folder)).as_posix()))
        except ValueError:  # another drive
            address = path.resolve().as_uri()
    element = "audio" if path.suffix.lower() in AUDIO_SUFFIXES else "video"
    player = (
        f'<{element} controls preload="metadata" src="{html.escape(address)}"></{element}>'
        if address
        else ""
    )
    rows = sorted((asdict(item) for item in items), key=lambda row: float(row["start"]))
    # "</" or "<!--" in a text would end the script element, or open another.
    data = json.dumps(rows, ensure_ascii=False).replace("<", "\\u003c")
    title = html.escape(printable(path.name if "://" not in source else source))
    return _PAGE.format(title=title, player=player, data=data)
