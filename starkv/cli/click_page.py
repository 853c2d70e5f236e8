# SPDX-License-Identifier: Apache-2.0
"""The report on clicks as one HTML file that needs nothing else: no script, no font, no network."""

from collections.abc import Mapping, Sequence

from jinja2 import Environment, StrictUndefined

from starkv.cli.click_pictures import Picture
from starkv.cli.click_report import Document

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ document.title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --muted: #5b6875; --line: #d5dce2; --paper: #fff;
  --band: #f4f7f9; --good: #00785a; --bad: #c0185c; --none: #8a6d00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --muted: #9aa7b4; --line: #37424d;
  --paper: #151b21; --band: #1d252d; --good: #4cc9a0; --bad: #ff6fa5; --none: #e0c050; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 25px; margin: 0 0 12px; } h2 { font-size: 18px; margin: 36px 0 4px; }
p { color: var(--muted); margin: 0 0 10px; max-width: 80ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.note { border-left: 4px solid var(--none); background: var(--band); padding: 8px 12px; color: var(--ink); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th { text-align: left; color: var(--muted); font-weight: 600; } td, th { padding: 5px 12px 5px 0;
  border-bottom: 1px solid var(--line); vertical-align: top; }
.passed { color: var(--good); } .failed { color: var(--bad); font-weight: 700; } .skipped {
  color: var(--none); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 18px; }
figure { margin: 0; } img { width: 100%; height: auto; border: 1px solid var(--line); }
figcaption { font-size: 13px; } code { font-size: 12px; overflow-wrap: anywhere; color: var(--muted); }
</style>
</head>
<body>
{% set verdict = "passed" if document.passed else "failed" %}
<h1>{{ document.title }}: <span class="{{ verdict }}">{{ verdict }}</span></h1>
<dl>{% for name, value in document.facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% for note in document.notes %}<p class="note">{{ note }}</p>
{% endfor %}
{% for section in document.sections %}
<h2>{{ section.title }}</h2>
<p>{{ section.text }}</p>
<div class="wide"><table>
<tr>{% for cell in section.header %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in section.rows %}<tr>{% for cell in row -%}
<td{% if loop.first %} class="{{ cell }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>
{% endfor %}</table></div>
{% endfor %}
{% for task, shown in pictures.items() if shown %}
<h2>Answers: {{ task }}</h2>
<p>With the whole cache. Green: where a click is right. Pink: the model's click. First misses, then hits.</p>
<div class="grid">
{% for picture in shown %}<figure><img src="{{ picture.uri }}" alt="{{ picture.question }}">
<figcaption><span class="{{ 'passed' if picture.hit else 'failed' }}">{{ 'hit' if picture.hit else 'miss'
  }}</span>
{{ picture.question }} <small>({{ picture.note }})</small><br><code>{{ picture.reply
  }}</code></figcaption></figure>
{% endfor %}</div>
{% endfor %}
</body>
</html>
"""


def html_page(document: Document, pictures: Mapping[str, Sequence[Picture]]) -> str:
    """The whole page.

    Args:
        document: text and tables.
        pictures: of each task.
    """
    # What models and engines say is text, never markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(_TEMPLATE).render(document=document, pictures=pictures)
