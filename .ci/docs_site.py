"""Extensions for the documentation site: an mkdocs hook and a griffe extension. See mkdocs.yml.

Pages under docs/ link to files of the repository as they do on a code host. The hook adds those files to the site and
turns the links to them into links within the site. The griffe extension turns Sphinx roles into cross-references.
"""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)#\s]+)(#[^)\s]*)?')
ROLE = re.compile(r':(?:class|func|meth|mod|data|attr):`(?P<name>[^`]+)`')


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the recipes and the pages in the root of the repository."""
    files.append(File.generated(config, 'about.md', abs_src_path=str(ROOT / 'README.md')))
    for pattern in ('configs/**/*.py', 'configs/*/README.md', 'data/*/README.md', 'CHANGELOG.md', 'CONTRIBUTING.md'):
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_: Any) -> str:
    """Change links that are relative to the repository to links that are relative to the site."""
    source = Path(str(page.file.abs_src_path))
    up = '../' * page.file.src_uri.count('/')

    def site_link(link: re.Match) -> str:
        target = (source.parent / link[1]).resolve()
        if target.is_dir():
            target /= 'README.md'
        if target == ROOT / 'README.md':
            return up + 'about.md' + (link[2] or '')
        for folder in (ROOT / 'docs', ROOT):
            if target.is_relative_to(folder):
                name = target.relative_to(folder).as_posix()
                if files.get_file_from_path(name):
                    return up + name + (link[2] or '')
        return link[0]  # mkdocs warns if it leads nowhere

    return LINK.sub(site_link, markdown)


class Docstrings(griffe.Extension):
    """Adapt docstrings: ``:func:`name``` becomes a cross-reference, and section titles those that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if not obj.docstring:
            return
        text = obj.docstring.value.replace('\nExample:\n', '\nExamples:\n')
        if isinstance(obj, griffe.Class) and 'NamedTuple' in map(str, obj.bases):
            text = text.replace('\nArgs:\n', '\nAttributes:\n')
        obj.docstring.value = ROLE.sub(lambda role: self._link(obj, role['name']), text)

    def _link(self, obj: griffe.Object, name: str) -> str:
        with suppress(griffe.NameResolutionError):
            name = obj.resolve(name)
        label = f'`{name.rpartition(".")[2]}`'
        with suppress(KeyError):
            if obj.modules_collection[name].has_docstring:  # the others are not on the site
                return f'[{label}][{name}]'
        return label
