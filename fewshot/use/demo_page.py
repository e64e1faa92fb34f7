"""The page of scripts/model/demo.py, in NiceGUI."""

import base64
import contextlib
import io
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
from nicegui import app, background_tasks, events, run, ui
from starlette.middleware.trustedhost import TrustedHostMiddleware

from fewshot.data.image_files import ImageLayout, image_files
from fewshot.use.demo_guard import Guard
from fewshot.use.demo_task import GRID, MAX_BYTES, PEN, UPDATES, Slot, Task, picture, title
from fewshot.use.learner import Learner

CHARACTERS = Path(__file__).resolve().parents[2] / 'tests' / 'characters'
COLOURS = ('#4269d0', '#e08a00', '#d6402f', '#3a9e8f', '#8a56c2')
COLOURS += ('#2f7d32', '#c2518d', '#8c6239', '#5b7083', '#2e9bd6')
# The texts by which the page asks for examples of the classes, and for one to recognise.
DRAWINGS = (
    'Draw a different character in each square, or drop image files on it.',
    'Draw one of your characters again.',
)
PHOTOS = (
    'Drop an image file on each square, or draw in it.',
    'Drop another image of one of the classes.',
)
READY = 'The most likely class is bold.'
INTERVAL = 0.05  # seconds between two messages while someone draws
PAGE_STYLE = """
body { background: #f4f5f7; color: #1d2430; }
.page { max-width: 1080px; margin: auto; }
.card { background: white; border-radius: 12px; padding: 16px 20px;
        box-shadow: 0 1px 3px rgb(0 0 0 / 12%); }
.classes { display: grid; gap: 12px 20px;
           --share: calc((100% - 20px * var(--columns)) / var(--columns));
           grid-template-columns: repeat(auto-fill, minmax(max(132px, var(--share)), 1fr)); }
.pad { border: 2px solid var(--colour); border-radius: 8px; overflow: hidden; display: block; }
.seen { border: 1px solid #d5d9e0; border-radius: 3px; image-rendering: pixelated; }
.tools { min-height: 34px; }
.hint { color: #5b6573; font-size: 14px; line-height: 1.45; }
.step { font-size: 17px; font-weight: 600; }
.groove { background: #eef0f3; border-radius: 4px; }
.bar { height: 18px; border-radius: 4px; background: var(--colour); }
.bar-name { max-width: min(170px, 30vw); overflow-wrap: anywhere; }
.answers { flex: 1; min-width: min(380px, 100%); }
@media (max-width: 760px) { .card { width: 100%; padding: 12px 14px; } }
"""
# A file that misses the squares would take the place of the page.
STAY = """<script>
for (const type of ['dragover', 'drop']) addEventListener(type, (event) => event.preventDefault());
</script>"""


class Pad(ui.element, component='demo_pad.js'):
    """A square to draw in; on_draw is called with the strokes, see demo_task.draw."""

    def __init__(self, on_draw: Callable[[list], None]):
        super().__init__()
        self._props.update(grid=GRID, pen=PEN, image='')
        self.on('draw', lambda event: on_draw(event.args), throttle=INTERVAL)
        self.classes('pad')

    def show(self, image: str):
        """Shows an image by its address instead of strokes; '': nothing."""
        self.run_method('empty')
        self.show_behind(image)

    def show_behind(self, image: str):
        if self._props['image'] != image:
            self._props['image'] = image
            self.update()


class SlotView:
    """A pad with its buttons, and the images of its slot as the network sees them."""

    def __init__(self, slot: Slot, size: int, colour: str, on_change: Callable[[], None]):
        self.slot, self.on_change = slot, on_change
        width = f'max-width: {size}px'
        with ui.column().classes('gap-1 w-full').style(f'--colour: {colour}; {width}'):
            self.pad = Pad(self.draw)
            self.upload = self.make_upload()
            with ui.row().classes('tools w-full items-center no-wrap gap-0'):
                self.make_buttons()
                ui.space()
                if slot.limit == 1:
                    ui.label('What the network sees').classes('hint mr-2')
                self.current = self.thumbnail()
            self.kept = ui.row().classes('gap-1 justify-end w-full')
        self.show()

    def make_upload(self) -> ui.upload:
        """Makes the unseen upload of files that are dropped on the pad, or chosen by a button."""
        several = self.slot.limit > 1
        upload = ui.upload(
            multiple=several,
            max_file_size=MAX_BYTES,
            max_files=self.slot.limit,
            on_upload=self.upload_one,
            on_rejected=lambda: complain(
                f'Only image files of up to {MAX_BYTES >> 20} MB, {self.slot.limit} at a time.'
            ),
            auto_upload=True,
        ).classes('hidden')
        upload.on('finish', lambda: upload.reset())
        files = '[...event.dataTransfer.files]' + ('' if several else '.slice(0, 1)')
        add = f'getElement({upload.id}).$refs.qRef.addFiles({files})'
        self.pad.on('drop', js_handler=f'(event) => {add}')
        return upload

    def make_buttons(self):
        def button(icon: str, tip: str, action: Callable | None = None) -> ui.button:
            made = ui.button(icon=icon, on_click=action).props('flat dense size=sm color=grey-8')
            made.props(f'aria-label="{tip}"')
            with made:
                ui.tooltip(tip)
            return made

        button('undo', 'Undo the last stroke', lambda: self.pad.run_method('undo'))
        button('delete_outline', 'Clear', self.clear)
        pick = button('upload_file', 'Use image files; you can also drop them on the square')
        pick.on('click', js_handler=f'() => getElement({self.upload.id}).$refs.qRef.pickFiles()')
        if self.slot.limit > 1:
            button('add', 'Add another example of this class', lambda: self.change(self.slot.keep))

    def draw(self, strokes: list):
        if self.attempt(lambda: self.slot.draw(strokes)):
            self.pad.show_behind('')
        self.changed()

    async def upload_one(self, event: events.UploadEventArguments):
        self.add(event.file.name, await event.file.read())

    def add(self, name: str, data: bytes):
        self.change(lambda: self.slot.add(name, data))

    def clear(self):
        self.change(self.slot.clear)

    def change(self, action: Callable[[], None]):
        """Does something with the slot, and shows in the pad what is there then."""
        if self.attempt(action):
            current = self.slot.current
            self.pad.show('' if current is None else self.address(current))
            self.show_kept()
        self.changed()

    def remove(self, index: int):
        self.slot.remove(index)
        self.show_kept()
        self.changed()

    def attempt(self, action: Callable[[], None]) -> bool:
        """Tries an action, and tells whether it went well; else the page says why not."""
        try:
            action()
        except ValueError as error:
            complain(str(error))
            return False
        return True

    def changed(self):
        self.show()
        self.on_change()

    def show(self):
        """Shows the images as the network sees them."""
        current = self.slot.current
        self.current.set_visibility(current is not None)
        if current is not None:
            self.current.props['src'] = self.address(current)
            height, width = current.shape[:2]
            self.current.props['title'] = f'This is what the network sees: {height}×{width} pixels'

    def show_kept(self):
        self.kept.clear()
        with self.kept:
            for index, image in enumerate(self.slot.kept):
                shown = self.thumbnail().style('cursor: pointer')
                shown.props['src'] = self.address(image)
                shown.props['title'] = 'An example of this class; click to remove it'
                shown.on('click', lambda index=index: self.remove(index))

    def thumbnail(self) -> ui.element:
        size = 30 if self.slot.limit > 1 else 56
        return ui.element('img').props(f'width={size} height={size}').classes('seen')

    def address(self, image: np.ndarray) -> str:
        file = io.BytesIO()
        picture(image, self.slot.layout).save(file, 'PNG')
        return 'data:image/png;base64,' + base64.b64encode(file.getvalue()).decode()


def complain(sentence: str):
    ui.notify(sentence, type='warning', position='top', multi_line=True, timeout=8000)


class AnswerView:
    """Probabilities as bars after a number of updates that one chooses, and as lines over all."""

    def __init__(self, labels: list[str], updates: int):
        self.labels, self.answer = labels, None  # [UPDATES + 1, N]
        self.shown = [False] * len(labels)  # the classes that have examples
        with ui.row().classes('items-center no-wrap w-full gap-4'):
            self.title = ui.label().classes('hint').style('min-width: 118px')
            self.updates = ui.slider(
                min=0, max=UPDATES, value=min(updates, UPDATES), on_change=self.show
            ).props('markers snap color=blue-grey-7 aria-label="Updates"')
        with ui.grid(columns='auto 1fr 4.6em').classes('w-full items-center gap-x-3 gap-y-1'):
            self.rows = [self.make_row(c) for c in range(len(labels))]
        ui.label(f'Probabilities after 0 to {UPDATES} updates').classes('hint mt-2')
        self.lines = ui.echart(line_options(labels)).classes('w-full').style('height: 190px')
        self.show()

    def make_row(self, c: int) -> tuple[ui.label, ui.element, ui.label]:
        name = ui.label().classes('bar-name text-sm')
        with ui.element('div').classes('groove'):
            bar = ui.element('div').classes('bar').style(f'--colour: {colour(c)}; width: 0')
        return name, bar, ui.label().classes('text-sm text-right text-no-wrap')

    def rename(self, c: int, label: str):
        self.labels[c] = label.strip() or f'Class {c + 1}'
        self.lines.options['series'][c]['name'] = self.labels[c]
        self.show()

    def set(self, answer: np.ndarray | None, shown: list[bool]):
        """Shows an answer, see Task.answer; None if there is none. shown: [N]."""
        self.answer, self.shown = answer, shown
        for c, series in enumerate(self.lines.options['series']):
            known = answer is not None and shown[c]
            series['data'] = [round(float(p), 4) for p in answer[:, c]] if known else []
        self.lines.update()
        self.show()

    def show(self):
        updates = int(self.updates.value)
        self.title.text = f'After {updates} update' + ('' if updates == 1 else 's')
        row = np.zeros(len(self.labels)) if self.answer is None else self.answer[updates]
        for (name, bar, percent), label, p, shown in zip(self.rows, self.labels, row, self.shown):
            wins = p > 0 and p == row.max()
            name.text = label
            name.style('font-weight: ' + ('700' if wins else '400'))
            bar.style(f'width: {100 * p:.1f}%')
            percent.text = (f'{100 * p:.0f} %' if row.any() else '') if shown else 'not shown'
            for part in (name, percent):
                part.classes(**{'remove' if shown else 'add': 'text-grey-7'})


def line_options(labels: list[str]) -> dict:
    """Returns the options of the lines, for ECharts."""
    return {
        'animation': False,
        'grid': {'left': 42, 'right': 12, 'top': 10, 'bottom': 36},
        'xAxis': {
            'type': 'category',
            'data': list(range(UPDATES + 1)),
            'boundaryGap': False,
            'name': 'updates',
            'nameLocation': 'middle',
            'nameGap': 22,
        },
        'yAxis': {'type': 'value', 'min': 0, 'max': 1, 'interval': 0.5},
        'tooltip': {'trigger': 'axis'},
        'series': [
            {'type': 'line', 'name': label, 'color': colour(c), 'symbolSize': 5, 'data': []}
            for c, label in enumerate(labels)
        ],
    }


def colour(c: int) -> str:
    return COLOURS[c % len(COLOURS)]


class Page:
    """One browser tab: the classes, the query, and the answers, which follow every change."""

    def __init__(self, learner: Learner):
        self.task, self.stale, self.busy = Task(learner), False, False
        self.draws = self.task.layout.mode == 'L'
        show, ask = DRAWINGS if self.draws else PHOTOS
        self.labels = [f'Class {c + 1}' for c in range(len(self.task.classes))]
        ui.colors(primary='#4269d0')
        ui.add_css(PAGE_STYLE)
        ui.add_body_html(STAY)
        with ui.column().classes('page w-full items-stretch gap-4'):
            self.make_head(title(learner))
            with ui.element('div').classes('card'):
                self.make_classes(show)
            with ui.row().classes('gap-4 items-stretch w-full'):
                with ui.element('div').classes('card'):
                    ui.label('2  Test it').classes('step')
                    ui.label(ask).classes('hint mb-2')
                    self.query = SlotView(self.task.query, 280, '#1d2430', self.changed)
                with ui.element('div').classes('card answers'):
                    ui.label('3  See its answer').classes('step')
                    self.hint = ui.label(self.task.lacking).classes('hint mb-2')
                    self.answers = AnswerView(self.labels, learner.model.num_updates)

    def make_head(self, name: str):
        ways = len(self.task.classes)
        with ui.row().classes('items-center w-full'):
            with ui.column().classes('gap-0').style('flex: 1 1 300px'):
                ui.label(name).classes('text-2xl font-semibold')
                ui.label(
                    f'MAML has trained this model to learn {ways} new classes from a few examples. '
                    'Show it yours.'
                ).classes('hint')
            if self.draws and CHARACTERS.is_dir():
                self.examples = cycle(example_files(self.task.layout, ways))
                example = ui.button('Load an example', on_click=self.load_example)
                example.props('no-caps no-wrap unelevated')
            ui.button('Clear all', on_click=self.clear).props('no-caps no-wrap outline')

    def make_classes(self, show: str):
        ui.label('1  Teach the model').classes('step')
        ui.label(
            f'{show} The small picture is what the network sees. Press + to add another '
            'example of a class: more examples make better answers.'
        ).classes('hint mb-3')
        few = len(self.labels) <= 5
        with ui.element('div').classes('classes').style(f'--columns: {5 if few else 7}'):
            self.views = [self.make_class(c, 188 if few else 132) for c in range(len(self.labels))]

    def make_class(self, c: int, size: int) -> SlotView:
        with ui.column().classes('gap-1 w-full'):
            name = ui.input(value=self.labels[c])
            name.on_value_change(lambda event: self.answers.rename(c, event.value))
            name.props('dense outlined maxlength=30 aria-label="Name of the class"')
            name.style(f'width: 100%; max-width: {size}px')
            with name.add_slot('append'):
                ui.icon('edit', size='16px')
            view = SlotView(self.task.classes[c], size, colour(c), self.changed)
            view.name = name
        return view

    def clear(self):
        for view in [*self.views, self.query]:
            view.clear()
        for c, view in enumerate(self.views):
            view.name.value = f'Class {c + 1}'

    def load_example(self):
        """Loads the characters of tests/characters; each time it is another one to classify."""
        support, query = next(self.examples)
        self.clear()
        for view, file in zip(self.views, support):
            view.add(file.name, file.read_bytes())
            view.name.value = file.parent.name.replace('_', ' ')
        self.query.add(query.name, query.read_bytes())

    def changed(self):
        self.stale = True
        if not self.busy:
            self.busy = True
            background_tasks.create(self.refresh(), name='answer')

    async def refresh(self):
        """Asks the model until the answer belongs to the present drawings."""
        try:
            while self.stale:
                self.stale = False
                question = self.task.question()
                shown = [bool(slot.images) for slot in self.task.classes]
                answer = await run.io_bound(self.task.answer, question) if question else None
                self.answers.set(answer, shown)
                self.hint.text = self.task.lacking or READY
        finally:
            self.busy = False


def example_files(layout: ImageLayout, ways: int) -> list[tuple[list[Path], Path]]:
    """Lists the tests' characters: an image of each class, and one to classify."""
    folders = sorted(CHARACTERS.glob('support/*'))[:ways]
    support = [Path(image_files(folder, layout)[0]) for folder in folders]
    names = tuple(folder.name for folder in folders)
    queries = [Path(file) for file in image_files(CHARACTERS / 'query', layout)]
    return [(support, query) for query in queries if query.name.startswith(names)]


def serve(learner: Learner, host: str, port: int, show: bool):
    """Shows the page until the program is ended; show: open it in the browser."""
    app.add_middleware(Guard, limit=MAX_BYTES + 2**16)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[host, 'localhost'])
    app.on_startup(lambda: print(f'Open http://{host}:{port} (Ctrl-C ends this).', flush=True))
    warm_up(learner)
    with contextlib.suppress(KeyboardInterrupt):
        ui.run(
            lambda: Page(learner),
            host=host,
            port=port,
            title=title(learner),
            show=show,
            reload=False,
            show_welcome_message=False,
        )


def warm_up(learner: Learner):
    """Asks once, because TensorFlow takes seconds the first time."""
    task = Task(learner)
    for slot in (*task.classes, task.query):
        slot.current = np.zeros(task.layout.shape(1)[1:], np.uint8)
    task.answer(task.question())
