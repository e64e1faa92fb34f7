"""scripts/model/demo.py: drawings and files on their way to a model, and the page in a browser.

The browser is the system's Chromium, driven by Playwright: `pip install -e '.[demo_test]'`.
"""

import asyncio
import contextlib
import http.client
import importlib.util
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from command_line import ROOT, assert_refused, in_process
from PIL import Image
from scipy import ndimage

from fewshot.data.image_files import OMNIGLOT, folder_layout, read_image
from fewshot.networks.build import make_model
from fewshot.runs.checkpoints import write_checkpoint
from fewshot.use.demo_guard import Guard
from fewshot.use.demo_task import (
    MAX_EXAMPLES,
    MAX_POINTS,
    UPDATES,
    Slot,
    Task,
    read_drawing,
    read_file,
    title,
)
from fewshot.use.learner import Learner
from scripts.model import demo

PAPER = ROOT / 'logs' / 'results' / 'paper'
RUN = PAPER / 'omniglot_5way_1shot/seed0/cls_5.mbs_32.ubs_1.numstep1.updatelr0.4batchnorm'
CHARACTERS = ROOT / 'tests' / 'characters'
LAYOUT = OMNIGLOT._replace(prepared=False)
EVERYWHERE = np.ones((3, 3))  # neighbours over corners too

# Strokes of five characters; x and y of each point are in units of the square.
CIRCLE = [(0.5 + 0.3 * math.cos(a / 3), 0.5 + 0.3 * math.sin(a / 3)) for a in range(20)]
GLYPHS = {
    'A': [[(0.2, 0.85), (0.5, 0.15), (0.8, 0.85)], [(0.33, 0.6), (0.67, 0.6)]],
    'O': [CIRCLE],
    'J': [[(0.3, 0.15), (0.3, 0.7), (0.45, 0.85), (0.6, 0.8), (0.7, 0.65)]],
    'H': [[(0.3, 0.15), (0.3, 0.85)], [(0.7, 0.15), (0.7, 0.85)], [(0.3, 0.5), (0.7, 0.5)]],
    'Z': [[(0.2, 0.25), (0.8, 0.25), (0.2, 0.8), (0.8, 0.8)]],
}


def moved(strokes: list, angle: float = 0.15, scale: float = 0.85, by: float = 0.04) -> list:
    """As another hand would draw it: turned, smaller, elsewhere."""
    c, s = scale * math.cos(angle), scale * math.sin(angle)

    def place(x: float, y: float) -> tuple[float, float]:
        x, y = x - 0.5, y - 0.5
        return 0.5 + c * x - s * y + by, 0.5 + s * x + c * y - by

    return [[place(*point) for point in stroke] for stroke in strokes]


def flat(strokes: list) -> list[list[float]]:
    """As the page tells them: x, y, x, y, ... from 0 to 105."""
    return [[105 * value for point in stroke for value in point] for stroke in strokes]


# From the pad to the network ----------------------------------------------------------------------


def neighbours(image: np.ndarray) -> float:
    """How many of the eight pixels around a pixel of ink have ink, on average."""
    ink = image[..., 0] > 0
    return float(ndimage.convolve(ink.astype(int), EVERYWHERE, mode='constant')[ink].mean() - 1)


def test_drawings_are_as_omniglot():
    """Ink is 255, in whole lines, about as thick as those of Omniglot's own drawings."""
    drawings = [read_drawing(flat(strokes), LAYOUT) for strokes in GLYPHS.values()]
    for image, strokes in zip(drawings, GLYPHS.values()):
        assert image.shape == (28, 28, 1) and set(np.unique(image)) == {0, 255}
        assert ndimage.label(image[..., 0], EVERYWHERE)[1] == 1, strokes
    files = [str(file) for file in CHARACTERS.glob('support/*/*.png')]
    theirs = np.mean([neighbours(read_image(file, LAYOUT)) for file in files])
    assert np.mean([neighbours(image) for image in drawings]) == pytest.approx(theirs, abs=0.5)


def test_places_of_strokes():
    """x goes to the right, y down; one point is a dot; outside is nothing."""
    dot = read_drawing([[80, 20]], LAYOUT)[..., 0]
    rows, columns = np.nonzero(dot)
    assert rows.mean() == pytest.approx(20 / 105 * 28, abs=1)
    assert columns.mean() == pytest.approx(80 / 105 * 28, abs=1)
    assert not read_drawing([[-50, -50, -20, -90]], LAYOUT).any()
    photo = read_drawing([[80, 20]], folder_layout(42, 3))  # black on white, in colour
    assert photo.shape == (42, 42, 3) and photo.max() == 255 and photo.min() < 60
    assert (photo > 250).mean() > 0.95


@pytest.mark.parametrize(
    'strokes, words',
    [([[0] * (2 * MAX_POINTS + 2)], 'points'), ([[float('nan'), 1]], 'finite'), ([[1]], 'reshape')],
)
def test_strokes_that_are_none(strokes, words):
    with pytest.raises(ValueError, match=words):
        read_drawing(strokes, LAYOUT)


def test_files(tmp_path):
    """As classify.py reads them; what is no image or too large is named."""
    file = CHARACTERS / 'query' / 'Malay_1.png'
    found = read_file(file.name, file.read_bytes(), LAYOUT)
    np.testing.assert_array_equal(found, read_image(str(file), LAYOUT))
    Image.new('1', (10_000, 5_001)).save(tmp_path / 'large.png')
    for name, data, words in [
        ('large.png', (tmp_path / 'large.png').read_bytes(), 'large.png has more than 50 million'),
        ('long.png', bytes(21 * 2**20), 'long.png has more than 20 MB'),
        ('none.png', b'none', r'^none.png cannot be decoded .*none.png'),
    ]:
        with pytest.raises(ValueError, match=words):
            read_file(name, data, LAYOUT)


def test_examples_of_a_class():
    slot, file = Slot(LAYOUT), CHARACTERS / 'query' / 'Malay_1.png'
    slot.draw(flat(GLYPHS['A']))
    slot.add('first', file.read_bytes())  # the drawing is kept
    slot.draw(flat(GLYPHS['O']))  # in place of the file
    assert len(slot.images) == 2 and slot.current is slot.images[1]
    np.testing.assert_array_equal(slot.kept[0], read_drawing(flat(GLYPHS['A']), LAYOUT))
    slot.remove(0)
    slot.draw([])
    assert slot.images == []
    for _ in range(MAX_EXAMPLES):
        slot.add('file', file.read_bytes())
    with pytest.raises(ValueError, match='more was left out'):
        slot.add('more', file.read_bytes())
    with pytest.raises(ValueError, match=f'at most {MAX_EXAMPLES}'):
        slot.keep()
    query = Slot(LAYOUT, limit=1)
    for name in 'AO':
        query.draw(flat(GLYPHS[name]))
        query.keep()
    query.add('file', file.read_bytes())
    assert len(query.images) == 1


def test_answers():
    """The published run tells drawings apart; answers are those of Learner, 0 without examples."""
    learner = Learner.load(RUN)
    task = Task(learner)
    assert title(learner) == 'Omniglot, 5-way 1-shot, 60,000 iterations'
    assert 'two classes' in task.lacking and task.question() is None
    names = list(GLYPHS)[:4]
    for slot, name in zip(task.classes[1:], names):  # the first class has none
        slot.draw(flat(GLYPHS[name]))
    assert 'large square' in task.lacking and task.question() is None
    for c, name in enumerate(names):
        task.query.draw(flat(moved(GLYPHS[name])))
        assert not task.lacking
        question = task.question()
        answer = task.answer(question)
        assert answer.shape == (UPDATES + 1, 5) and not answer[:, 0].any()
        np.testing.assert_allclose(answer.sum(1), 1, rtol=1e-5)
        assert (answer[1:].argmax(1) == c + 1).all() and (answer[1:].max(1) > 0.8).all(), name
    weights = learner.adapt(question.x, question.y, 3)
    expected = learner.predict(question.query[np.newaxis], weights, question.x)[0, 1:]
    np.testing.assert_allclose(answer[3, 1:], expected / expected.sum(), atol=1e-5)


# The command --------------------------------------------------------------------------------------


def test_demo_refuses(tmp_path, monkeypatch):
    settings = dict(datasource='sinusoid', norm='None')
    (tmp_path / 'sine').mkdir()
    model = make_model(**settings, compiled=False)
    write_checkpoint(model.checkpoint, tmp_path / 'sine', 0, {'flags': settings})
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    outcome = in_process(demo.main, [str(RUN)])
    assert_refused(outcome, 'demo.py: ', "pip install -e '.[demo]'")
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: object())
    with socket.create_server(('127.0.0.1', 0)) as server:
        taken = server.getsockname()[1]
        for folder, port, words in [
            (tmp_path, 0, 'main.py trained in'),
            (tmp_path / 'none', 0, 'main.py trained in'),
            (tmp_path / 'sine', 0, 'has no images'),
            (RUN, taken, f'port {taken} of 127.0.0.1 cannot be had'),
            (RUN, 70000, '--port'),
        ]:
            outcome = in_process(demo.main, [str(folder), f'--port={port}'])
            assert_refused(outcome, 'demo.py: ', words)


def statuses(kind: str, method: str = 'GET', **headers: str) -> list[int]:
    """The statuses by which a request to 127.0.0.1:8765 is refused; 200 if it is not."""
    sent = []

    async def app(scope, receive, send):
        await send({'type': 'served', 'status': 200})

    async def send(message):
        sent.append(message)

    headers = {'host': '127.0.0.1:8765', **headers}
    told = [(name.replace('_', '-').encode(), value.encode()) for name, value in headers.items()]
    scope = {'type': kind, 'method': method, 'headers': told}
    asyncio.run(Guard(app, limit=100)(scope, None, send))
    return [message['status'] for message in sent if 'status' in message]


def test_other_origins_are_refused():
    """A page may ask its own server alone, and a socket must say whose page it is."""
    own = 'http://127.0.0.1:8765'
    for kind in ('http', 'websocket'):
        assert statuses(kind, origin=own) == [200]
        others = ('http://evil.org', 'http://127.0.0.1:80', 'http://localhost:8765', 'null')
        for other in (*others, 'https://127.0.0.1:8765', ''):
            assert statuses(kind, origin=other) == [403], (kind, other)
    assert statuses('websocket') == [403] and statuses('http') == [200]
    assert statuses('http', host='localhost:9000', origin='http://localhost:9000') == [200]
    for length, expected in [('100', 200), ('101', 413), ('-1', 413), ('', 413)]:
        assert statuses('http', 'POST', origin=own, content_length=length) == [expected]


# The page -----------------------------------------------------------------------------------------

CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')
WITHOUT_NETWORK = (  # Chromium's own calls home
    '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
    '--disable-component-update --disable-sync'
).split()
DROP = """(place, [name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name, {type: 'image/png'}));
    const told = {dataTransfer: data, bubbles: true, cancelable: true};
    return place.dispatchEvent(new DragEvent('drop', told));
}"""


@contextlib.contextmanager
def serving(run_folder: Path) -> Iterator[str]:
    """The address of the page of a process of its own, which ends well after Ctrl-C."""
    line = [sys.executable, '-B', 'scripts/model/demo.py', run_folder, '--port=0', '--no_browser']
    others = {name: value for name, value in os.environ.items() if not name.startswith('PYTEST')}
    process = subprocess.Popen(line, cwd=ROOT, env=others, stdout=subprocess.PIPE, text=True)
    try:
        yield re.search(r'http://127.0.0.1:\d+', process.stdout.readline())[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(30) in (0, 130, -signal.SIGINT)
    finally:
        process.kill()


@contextlib.contextmanager
def browsing(address: str) -> Iterator:
    """The page in Chromium; nothing else is asked for, and nothing fails."""
    playwright = pytest.importorskip('playwright.sync_api', reason='pip install .[demo_test]')
    faults, local = [], re.compile(f'{address}/|data:|blob:')
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=WITHOUT_NETWORK)
        page = browser.new_page(viewport={'width': 1120, 'height': 960})
        page.on('request', lambda asked: local.match(asked.url) or faults.append(asked.url))
        page.on('requestfailed', lambda failed: faults.append(failed.url))
        page.on('response', lambda answer: answer.ok or faults.append(answer.url))
        page.on('console', lambda told: told.type == 'error' and faults.append(told.text))
        page.on('pageerror', lambda error: faults.append(str(error)))
        page.goto(address)
        page.wait_for_selector('canvas.pad')
        yield page
        assert faults == []
        browser.close()


def draw_on(page, canvas, strokes: list):
    """By the mouse, in small moves; the button is down still in the end."""
    box = canvas.bounding_box()
    for stroke in strokes:
        places = [(box['x'] + box['width'] * x, box['y'] + box['height'] * y) for x, y in stroke]
        page.mouse.up()
        page.mouse.move(*places[0])
        page.mouse.down()
        for place in places[1:]:
            page.mouse.move(*place, steps=6)


def expect_winner(page, c: int):
    """Waits until the bar of class c is the longest, and its name bold."""
    page.wait_for_function(
        """c => {
            const bars = [...document.querySelectorAll('.bar')];
            const widths = bars.map(bar => parseFloat(bar.style.width));
            return widths[c] > 50 && Math.max(...widths) === widths[c];
        }""",
        arg=c,
        timeout=60_000,
    )
    names = page.locator('.bar-name').evaluate_all('all => all.map(one => one.style.fontWeight)')
    assert [name == '700' for name in names] == [k == c for k in range(len(names))]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='there is no Chromium')
def test_drawing_on_the_page():
    """Five characters by the mouse, then each again; a file dropped; only this machine may ask."""
    pytest.importorskip('nicegui', reason="needs `pip install -e '.[demo_test]'`")
    pytest.importorskip('playwright', reason="needs `pip install -e '.[demo_test]'`")
    with serving(RUN) as address:
        with browsing(address) as page:
            *pads, query = page.locator('canvas.pad').all()
            clear = page.get_by_label('Clear', exact=True)
            for pad, strokes in zip(pads, GLYPHS.values(), strict=True):
                draw_on(page, pad, strokes)
                page.mouse.up()
            for c, strokes in enumerate(GLYPHS.values()):
                clear.last.click()
                draw_on(page, query, moved(strokes))
                expect_winner(page, c)  # while the mouse is down still
                page.mouse.up()
            check_phone(page, query)
            drop_characters(page, pads, query)
        check_limits(address)


def check_phone(page, query):
    """It fits 400 pixels; one draws there too; names can be edited; what was not shown is grey."""
    assert page.title() == 'Omniglot, 5-way 1-shot, 60,000 iterations'
    page.set_viewport_size({'width': 400, 'height': 800})
    page.get_by_label('Clear', exact=True).nth(4).click()
    page.get_by_label('Clear', exact=True).last.click()
    page.get_by_label('Name of the class').nth(1).fill('Ring')
    query.scroll_into_view_if_needed()
    draw_on(page, query, moved(GLYPHS['O']))
    page.mouse.up()
    expect_winner(page, 1)
    assert page.locator('.bar-name').all_text_contents()[1] == 'Ring'
    assert page.get_by_text('not shown', exact=True).count() == 1
    colours = page.locator('.bar-name').evaluate_all(
        'all => all.map(x => getComputedStyle(x).color)'
    )
    assert len(set(colours[:4])) == 1 and colours[4] != colours[0]
    assert page.evaluate('document.documentElement.scrollWidth') == 400
    page.set_viewport_size({'width': 1200, 'height': 960})


def drop_characters(page, pads: list, query):
    """Dropped files take the place of drawings; one that misses the pads changes nothing."""
    page.get_by_text('Clear all').click()
    for c, name in enumerate(['Armenian', 'Malay', 'Japanese']):
        drop(pads[c], CHARACTERS / 'support' / name / 'a.png')
    drop(query, CHARACTERS / 'query' / 'Japanese_1.png')
    assert drop(page.locator('body'), CHARACTERS / 'support' / 'Malay' / 'a.png') is False
    expect_winner(page, 2)


def drop(place, file: Path) -> bool:
    """Whether the browser would do with the file what it does itself, which is to show it."""
    return place.evaluate(DROP, [file.name, list(file.read_bytes())])


def check_limits(address: str):
    """Long uploads and other names of the machine are refused; other addresses are not served."""
    port = int(address.rpartition(':')[2])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(('127.0.0.2', port))
    upgrade = {'Connection': 'Upgrade', 'Upgrade': 'websocket', 'Sec-WebSocket-Version': '13'}
    upgrade |= {'Sec-WebSocket-Key': 'AAAAAAAAAAAAAAAAAAAAAA=='}
    for method, headers, status in [
        ('POST', {'Content-Length': str(21 * 2**20)}, 413),
        ('POST', {'Host': 'a.org'}, 400),
        ('GET', {'Origin': 'http://a.org'}, 403),
        ('GET', {**upgrade, 'Origin': 'http://a.org'}, 403),
        ('GET', upgrade, 403),
        ('GET', {**upgrade, 'Origin': address}, 101),
    ]:
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        socket_path = '/_nicegui_ws/socket.io/?EIO=4&transport=websocket'
        connection.request(method, '/' if method == 'POST' else socket_path, headers=headers)
        assert connection.getresponse().status == status, (method, headers)
        connection.close()
