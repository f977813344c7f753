"""The page that shows all experiments: plain HTML beside its figures, nothing loaded from elsewhere."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import torch

import pyperc
from pyperc.experiments.frame import Experiment, Result, Setup


class Shown(NamedTuple):
    """An experiment that has run."""

    experiment: Experiment
    result: Result
    seconds: float


STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui, sans-serif; color: #111;
       background: #fff; }
h1, h2 { line-height: 1.25; }
h2 { margin-top: 3rem; border-top: 1px solid #bbb; padding-top: 1rem; }
nav li { margin: .15rem 0; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; border: 1px solid #ddd; }
figcaption, .small { color: #444; font-size: .9rem; }
pre { overflow-x: auto; padding: .75rem; background: #f5f5f5; font-size: .8rem; line-height: 1.35; }
.claims { list-style: none; padding: 0; }
.claims li { padding-left: 3rem; text-indent: -3rem; }
.claims b { display: inline-block; width: 3rem; text-indent: 0; }
"""


def page(shown: Sequence[Shown], setup: Setup) -> str:
    """The page's text; it expects NAME.png of each experiment in its own folder."""
    contents = "\n".join(
        f'<li>{escape(one.lecture)} <a href="#{one.name}">{escape(one.name)}</a>: {escape(one.title)}</li>'
        for one, _, _ in shown
    )
    about = f"pyperc {pyperc.__version__}, torch {torch.__version__}, images: {setup.label}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>pyperc: the lectures' experiments</title>
<style>{STYLE}</style>
</head>
<body>
<h1>The lectures' experiments</h1>
<p>The demonstrations of EE-559, Deep Learning, lectures 3.1 to 3.6, run again with pyperc.</p>
<p class="small">{escape(about)}{", the quick form" if setup.quick else ""}</p>
<nav><ul>
{contents}
</ul></nav>
{"".join(map(_section, shown))}</body>
</html>
"""


def _section(shown: Shown) -> str:
    experiment, result, seconds = shown
    claims = "\n".join(f"<li><b>{'yes' if holds else 'NO'}</b>{escape(text)}</li>" for text, holds in result.claims)
    tables = "\n".join(f"<pre>{escape(str(table))}</pre>" for table in result.tables)
    return f"""
<section id="{experiment.name}">
<h2>{escape(experiment.title)}</h2>
<p class="small">lecture {escape(experiment.lecture)};
<code>python -m pyperc experiment {experiment.name}</code>, {seconds:.1f} s</p>
<figure>
<img src="{experiment.name}.png" alt="{escape(result.caption, quote=True)}">
<figcaption>{escape(result.caption)}</figcaption>
</figure>
<ul class="claims">
{claims}
</ul>
{tables}
</section>
"""
