# SPDX-License-Identifier: Apache-2.0
"""A run as one HTML file that needs nothing else: no script, no font, no network."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jinja2 import Environment, StrictUndefined
from PIL import Image

from starkv.runtime.actions.coordinates import JsonValue
from starkv.runtime.agents.steps import Outcome, Step
from starkv.runtime.drawing import draw_actions

WIDEST = 900
"""Pixels of a picture's longer side on the page; the folder has the screenshots in full size."""
_MIB = 1 << 20


@dataclass(frozen=True)
class StepView:
    """A step as the page shows it."""

    number: int
    picture: str | None
    """Screenshot with the actions drawn on it, as a data URI."""
    thought: str
    text: str
    actions: tuple[str, ...]
    notes: tuple[str, ...]
    """What went wrong."""
    seconds: float
    kv_mib: float
    """Held behind the reply."""
    figures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Bar:
    """One step in a chart of 100 units in height."""

    x: float
    y: float
    height: float
    label: str


def view_of(step: Step, screenshot: Image.Image | None) -> StepView:
    """Lay a step out."""
    timings = step.timings
    seconds = (step.screenshot_ms + step.ask_ms + step.perform_ms) / 1e3
    kv_mib = timings.get("kv_bytes_held", 0.0) / _MIB
    notes = [f"attempt {n}: {r.error}: {r.text[:400]}" for n, r in enumerate(step.rejected, 1)]
    if step.error:
        notes.append(step.error)
    figures = [
        ("time", f"{seconds:.2f} s: screenshot {step.screenshot_ms:.0f}, model {step.ask_ms:.0f}, "
                 f"actions {step.perform_ms:.0f} ms"),
    ]  # fmt: skip
    if step.unchanged:
        figures.append(("screen", f"unchanged since step {step.number - step.unchanged}"))
    if timings:
        figures += [
            ("model", f"vision {timings['vision_ms']:.0f}, prefill {timings['prefill_ms']:.0f}, compression "
                      f"{timings['compress_ms']:.0f}, decode {timings['decode_ms']:.0f} ms"),
            ("tokens", f"{timings['prompt_tokens']:g} of the prompt ({timings['image_tokens']:g} of images), "
                       f"{timings['generated_tokens']:g} generated"),
            ("KV", f"{timings['kv_tokens_kept']:g} of {timings['kv_tokens_full']:g} rows kept, "
                   f"{kv_mib:.2f} MiB held"),
        ]  # fmt: skip
    return StepView(
        number=step.number,
        picture=_picture(screenshot, step.actions) if screenshot else None,
        thought=step.thought,
        text=step.text,
        actions=tuple(_in_words(action) for action in step.actions),
        notes=tuple(notes),
        seconds=seconds,
        kv_mib=kv_mib,
        figures=tuple(figures),
    )


def bars(values: Sequence[float], unit: str) -> list[Bar]:
    """A chart of values ≥ 0, the largest as high as the chart."""
    largest = max(values, default=0.0) or 1.0
    return [
        Bar(
            12.0 * index,
            100 - 100 * value / largest,
            100 * value / largest,
            f"{index + 1}: {value:.2f} {unit}",
        )
        for index, value in enumerate(values)
    ]


def html_page(header: Mapping[str, object], steps: Sequence[StepView], outcome: Outcome | None) -> str:
    """The whole page.

    Args:
        header: what the run was started with.
        steps: so far.
        outcome: None while the run goes on.
    """
    # What models, pages and users say is text, never markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    seconds, kv_mib = [step.seconds for step in steps], [step.kv_mib for step in steps]
    charts = [
        (name, bars(values, unit), max(values, default=0.0))
        for name, unit, values in (("seconds", "s", seconds), ("MiB of KV", "MiB", kv_mib))
    ]
    facts = [(name, value) for name, value in header.items() if value is not None and name != "goal"]
    return environment.from_string(_TEMPLATE).render(
        goal=header.get("goal", ""), facts=facts, steps=steps, outcome=outcome, charts=charts
    )


def _in_words(action: Mapping[str, JsonValue]) -> str:
    fields = ", ".join(f"{name} {value}" for name, value in action.items() if name != "type")
    return f"{action['type']}: {fields}" if fields else str(action["type"])


def _picture(screenshot: Image.Image, actions: Sequence[Mapping[str, JsonValue]]) -> str:
    canvas = draw_actions(screenshot, actions)
    canvas.thumbnail((WIDEST, WIDEST))
    stream = io.BytesIO()
    canvas.save(stream, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ goal }}</title>
<style>
:root { color-scheme: light dark; --ink: #1c2733; --muted: #5b6875; --line: #d5dce2; --paper: #fff;
  --band: #f4f7f9; --good: #00785a; --bad: #c0185c; --bar: #3d7dca; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --muted: #9aa7b4; --line: #37424d;
  --paper: #151b21; --band: #1d252d; --good: #4cc9a0; --bad: #ff6fa5; --bar: #6ea8ea; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px 60px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 25px; margin: 0 0 8px; } h2 { font-size: 17px; margin: 0 0 6px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; margin: 0; font-size: 13px; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
.good { color: var(--good); } .bad { color: var(--bad); }
.charts { display: flex; flex-wrap: wrap; gap: 28px; margin: 22px 0 8px; }
figure { margin: 0; } figcaption { font-size: 13px; color: var(--muted); } svg { display: block;
  height: 90px; background: var(--band); } rect { fill: var(--bar); }
article { display: grid; grid-template-columns: minmax(0, 3fr) minmax(0, 2fr); gap: 20px; padding: 22px 0;
  border-top: 1px solid var(--line); }
@media (max-width: 800px) { article { grid-template-columns: 1fr; } }
img { max-width: 100%; height: auto; border: 1px solid var(--line); }
p { margin: 0 0 8px; overflow-wrap: anywhere; } p.action { font-weight: 600; }
pre { font-size: 12px; white-space: pre-wrap; overflow-wrap: anywhere; background: var(--band);
  padding: 8px 10px; margin: 8px 0; }
</style>
</head>
<body>
<h1>{{ goal }}</h1>
{% if outcome -%}
<p><strong class="{{ 'good' if outcome.success else 'bad' if outcome.success is false else '' }}">{{
  'reached' if outcome.success else 'not reached' if outcome.success is false else 'ended' }}</strong>:
{{ outcome.reason }} after {{ outcome.steps }} steps and {{ '%.1f' % outcome.seconds }} s
{%- if outcome.message %}; the model says: {{ outcome.message }}{% endif %}
{%- if outcome.error %}; <span class="bad">{{ outcome.error }}</span>{% endif %}</p>
{%- else -%}
<p>No end is written down: the run goes on, or something ended it after the last step below.</p>
{%- endif %}
<dl>{% for name, value in facts %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% if steps %}<div class="charts">{% for name, chart, largest in charts %}
<figure><svg viewBox="0 0 {{ 12 * chart | length }} 100" preserveAspectRatio="none" width="{{
  [14 * chart | length, 520] | min }}" role="img" aria-label="{{ name }} of each step">
{% for bar in chart %}<rect x="{{ bar.x + 1 }}" y="{{ bar.y }}" width="10" height="{{ bar.height }}"><title>{{
  bar.label }}</title></rect>{% endfor %}</svg>
<figcaption>{{ name }} per step, at most {{ '%.2f' % largest }}</figcaption></figure>
{%- endfor %}</div>{% endif %}
{% for step in steps %}
<article id="step-{{ step.number }}">
<div>{% if step.picture %}<img src="{{ step.picture }}" alt="screenshot of step {{ step.number }}">{%
  endif %}</div>
<div><h2>Step {{ step.number }}</h2>
{% if step.thought %}<p>{{ step.thought }}</p>{% endif %}
{% for action in step.actions %}<p class="action">{{ action }}</p>{% endfor %}
{% for note in step.notes %}<p class="bad">{{ note }}</p>{% endfor %}
{% if step.text %}<pre>{{ step.text }}</pre>{% endif %}
<dl>{% for name, value in step.figures %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
</div>
</article>
{% endfor %}
</body>
</html>
"""
