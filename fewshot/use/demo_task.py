"""The task that the page of scripts/model/demo.py gathers, and its answers, without the page."""

import io
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from fewshot.data.image_files import ImageLayout, read_image, run_layout
from fewshot.use.learner import Learner

UPDATES = 10  # the answers are shown after 0 to so many
GRID = 105  # height and width of a drawing, as of Omniglot's originals
# Omniglot's strokes are about 5 of 105 pixels wide. Thinner lines fall apart at 28x28, where images
# are resized by nearest neighbour.
PEN = 5
MAX_POINTS = 20_000  # of one drawing
MAX_EXAMPLES = 10  # of one class
MAX_BYTES = 20 * 2**20  # of an image file
MAX_PIXELS = 50_000_000  # of an image file, decoded
TITLES = {'omniglot': 'Omniglot', 'miniimagenet': 'miniImagenet'}


def draw(strokes: Sequence[Sequence[float]]) -> Image.Image:
    """Draws black lines on white, 105x105 of 1 bit, as Omniglot's originals.

    strokes: each is x, y, x, y, ... from 0 to 105; a single point is a dot. Raises ValueError.
    """
    if sum(map(len, strokes)) > 2 * MAX_POINTS:
        raise ValueError(f'a drawing may have at most {MAX_POINTS} points')
    image = Image.new('1', (GRID, GRID), 1)
    pen = ImageDraw.Draw(image)
    for stroke in strokes:
        points = np.array(stroke, float).reshape(-1, 2)
        if not np.isfinite(points).all():
            raise ValueError('a drawing must be of finite numbers')
        points = [tuple(point) for point in np.clip(points, -GRID, 2 * GRID)]
        pen.line(points, fill=0, width=PEN, joint='curve')
        for point in points[:1] + points[-1:]:  # round ends
            pen.circle(point, PEN / 2, fill=0)
    return image


def read_file(name: str, data: bytes, layout: ImageLayout) -> np.ndarray:
    """Reads an image file: [height, width, channels] uint8. Raises ValueError, if too large too."""
    if len(data) > MAX_BYTES:
        raise ValueError(f'{name} has more than {MAX_BYTES >> 20} MB')
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / 'image'
        path.write_bytes(data)
        try:
            check_pixels(name, data)
            return read_image(str(path), layout)
        except ValueError as error:
            raise ValueError(str(error).replace(str(path), name)) from error


def check_pixels(name: str, data: bytes):
    """Raises ValueError for an image that would fill the memory, before it is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width, height = MAX_PIXELS, MAX_PIXELS
    except Exception:  # read_image says what is wrong with it
        return
    if width * height > MAX_PIXELS:
        raise ValueError(f'{name} has more than {MAX_PIXELS // 10**6} million pixels')


def read_drawing(strokes: Sequence[Sequence[float]], layout: ImageLayout) -> np.ndarray:
    """Draws strokes, see `draw`, and reads them as a file, the way that training's images went."""
    file = io.BytesIO()
    draw(strokes).save(file, 'PNG')
    return read_file('the drawing', file.getvalue(), layout)


def picture(x: np.ndarray, layout: ImageLayout) -> Image.Image:
    """Returns a network's input, [height, width, channels] uint8, in the colours of the file."""
    image = Image.fromarray(x[..., 0] if x.shape[-1] == 1 else x)
    return ImageOps.invert(image) if layout.invert else image


class Slot:
    """The images of a class, or the one to classify: some that are kept, and one in the pad."""

    def __init__(self, layout: ImageLayout, limit: int = MAX_EXAMPLES):
        self.layout, self.limit = layout, limit
        self.kept, self.current = [], None  # of arrays [height, width, channels] uint8

    @property
    def images(self) -> list[np.ndarray]:
        return self.kept + ([] if self.current is None else [self.current])

    def draw(self, strokes: Sequence[Sequence[float]]):
        """Puts these strokes, or nothing, into the pad. Raises ValueError."""
        self.current = read_drawing(strokes, self.layout) if strokes else None

    def add(self, name: str, data: bytes):
        """Puts an image file into the pad; its former image is kept if there is room for several.

        Raises ValueError if there is no room, or for a file that is no such image.
        """
        if self.limit > 1 and len(self.images) == self.limit:
            raise ValueError(f'{name} was left out: a class has at most {self.limit} examples here')
        image = read_file(name, data, self.layout)
        self.keep()
        self.current = image

    def keep(self):
        """Makes room in the pad for another example. Raises ValueError if there can be no other."""
        if self.current is None or self.limit == 1:
            return
        if len(self.images) == self.limit:
            raise ValueError(f'a class has at most {self.limit} examples here')
        self.kept.append(self.current)
        self.current = None

    def remove(self, index: int):
        """Removes one of the images that are kept."""
        del self.kept[index]

    def clear(self):
        self.kept, self.current = [], None


def title(learner: Learner) -> str:
    """Names a run by its images, N and K, and the iterations that trained it."""
    source, folder = (learner.settings.get(name, '') for name in ('datasource', 'data_dir'))
    images = TITLES.get(source) or Path(folder).name or 'Own images'
    found = f'{images}, {learner.model.network.dim_output}-way {learner.model.loss.shots}-shot'
    last = int(re.search(r'\d*$', learner.checkpoint)[0])
    return found + (f', {last + 1:,} iterations' if last else '')  # Learner.save writes 0


class Question(NamedTuple):
    """A task whose query is to be classified."""

    x: np.ndarray  # [examples, height, width, channels] uint8
    y: np.ndarray  # [examples], the classes' numbers
    query: np.ndarray  # [height, width, channels] uint8


class Task:
    """Classes with examples, an image to classify, and a model that answers.

    Attributes: classes, a Slot for each of the model's N; query, a Slot.
    """

    def __init__(self, learner: Learner):
        self.learner, self.layout = learner, run_layout(learner.settings)
        ways = learner.model.network.dim_output
        self.classes = [Slot(self.layout) for _ in range(ways)]
        self.query = Slot(self.layout, limit=1)
        self.adapted = None  # the support set and the weights of the last answer

    @property
    def lacking(self) -> str:
        """A request for the next thing that is lacking before there is an answer; '' if none is."""
        if sum(bool(slot.images) for slot in self.classes) < 2:
            return 'First give examples of at least two classes.'
        return '' if self.query.images else 'Now give it one to recognise, in the large square.'

    def question(self) -> Question | None:
        """Returns the present drawings as a Question, None as long as something is lacking."""
        if self.lacking:
            return None
        images = [image for slot in self.classes for image in slot.images]
        y = [c for c, slot in enumerate(self.classes) for _ in slot.images]
        return Question(np.stack(images), np.array(y), self.query.current)

    def answer(self, question: Question) -> np.ndarray:
        """Computes the classes' probabilities after 0 to UPDATES updates, [UPDATES + 1, N].

        The probability of a class without examples is 0; so are all after updates that diverged.
        Call it from one thread at a time.
        """
        weights, parts = self.weights(question), [slice(None)]
        if self.learner.model.norm_steps:  # each has normalisation parameters of its own
            parts = [slice(done, done + 1) for done in range(UPDATES + 1)]
        found = []
        for part in parts:
            own = {name: value[part] for name, value in weights.items()}
            tasks = (len(range(UPDATES + 1)[part]), 1, 1, 1, 1)
            support_x, query_x = np.tile(question.x, tasks), np.tile(question.query, tasks)
            found.append(self.learner.predict(query_x, own, support_x, part.start)[:, 0])
        outputs = np.concatenate(found)
        outputs *= np.isin(np.arange(len(self.classes)), question.y)
        total = outputs.sum(1, keepdims=True)
        return np.divide(outputs, total, out=np.zeros_like(outputs), where=total > 0)

    def weights(self, question: Question) -> dict[str, np.ndarray]:
        """Returns θ and the weights after each update, [UPDATES + 1, ...] each; keeps the last."""
        support = question.x.tobytes(), question.y.tobytes()
        if self.adapted is None or self.adapted[0] != support:
            steps = [self.learner.adapt(question.x, question.y, 0)]
            for _ in range(UPDATES):
                own = dict(weights=steps[-1], done=len(steps) - 1)
                steps.append(self.learner.adapt(question.x, question.y, 1, **own))
            weights = {name: np.stack([step[name] for step in steps]) for name in steps[0]}
            self.adapted = support, weights
        return self.adapted[1]
