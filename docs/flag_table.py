"""The directive `flags`: a table of main.py's flags for each purpose, made from the flags."""

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

from fewshot.runs.flags import GROUPS, Flag

COLUMNS = ('flag', 'default', 'meaning')


def cells(flag: Flag) -> tuple[nodes.Node, ...]:
    default = '' if flag.default in (None, '') else str(flag.default)
    return (
        nodes.literal(text=f'--{flag.name}'),
        nodes.literal(text=default) if default else nodes.Text(''),
        nodes.Text(flag.meaning),
    )


def row(contents: tuple[nodes.Node, ...]) -> nodes.row:
    return nodes.row('', *(nodes.entry('', nodes.paragraph('', '', cell)) for cell in contents))


def table(flags: tuple[Flag, ...]) -> nodes.table:
    widths = [nodes.colspec(colwidth=width) for width in (24, 12, 64)]
    head = nodes.thead('', row(tuple(map(nodes.Text, COLUMNS))))
    body = nodes.tbody('', *(row(cells(flag)) for flag in flags))
    return nodes.table('', nodes.tgroup('', *widths, head, body, cols=len(COLUMNS)))


class FlagTables(SphinxDirective):
    """A section for each purpose, and a table in it."""

    def run(self) -> list[nodes.Node]:
        found = []
        for title, flags in GROUPS.items():
            section = nodes.section('', nodes.title(text=title), table(flags))
            section['ids'] = [nodes.make_id(title)]
            self.state.document.note_explicit_target(section, section)
            found.append(section)
        return found


def setup(app) -> dict:
    app.add_directive('flags', FlagTables)
    return {'parallel_read_safe': True}
