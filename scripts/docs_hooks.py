"""MkDocs: a link from a page in docs/ to a file of the repository elsewhere becomes its text and the file's path, since the site holds
docs/ alone. A link to a file that is not there ends the build."""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError

# Code, which is left alone, or a link with its text and its target.
CODE = r"(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)"
LINK = r"!?\[(?P<text>(?:`[^`]*`|[^\[\]`])+)\]\((?P<target>[^()\s]+)\)"
PIECE = re.compile(f"{CODE}|{LINK}", re.DOTALL)
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|[#/]")


def on_page_markdown(markdown, page, config, **_):
    docs = Path(config.docs_dir).resolve()
    source = Path(page.file.abs_src_path)

    def replaced(match):
        text, target = match["text"], match["target"]
        if target is None or ELSEWHERE.match(target):
            return match[0]
        path = (source.parent / target.partition("#")[0]).resolve()
        if path.is_relative_to(docs):
            return match[0]  # MkDocs itself looks at these.
        if not path.is_relative_to(docs.parent) or not path.exists():
            raise PluginError(f"{page.file.src_uri}: the link to {target} leads to no file of the repository")
        name = path.relative_to(docs.parent).as_posix()
        folder = path.parent.relative_to(docs.parent).as_posix()
        return f"`{name}`" if text.strip("`") in (name, folder) else f"{text} (`{name}`)"

    return PIECE.sub(replaced, markdown)
