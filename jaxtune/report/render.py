"""Render templates to one self-contained page, with its style and script, which loads nothing else."""

import base64
import functools
import hashlib
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from jaxtune.report import words


def render(template: str, **view: Any) -> str:
    """Return the HTML of `templates/{template}`. Values are escaped."""
    page = _environment().get_template(template).render(view, sections=[])
    return page.encode("utf-8", "replace").decode()  # a lone surrogate, which UTF-8 cannot hold, becomes "?"


@functools.cache
def _environment() -> Environment:
    env = Environment(
        loader=PackageLoader("jaxtune.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.do"],
    )
    script = _read("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    env.globals |= {"css": Markup(_read("page.css")), "js": Markup(script), "js_digest": f"sha256-{digest}"}
    names = ("number", "percent", "duration", "setting", "amount", "memory")
    env.filters |= {name: getattr(words, name) for name in names}
    return env


def _read(name: str) -> str:
    return (files("jaxtune.report") / "templates" / name).read_text(encoding="utf-8")
