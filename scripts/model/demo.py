#!/usr/bin/env python
"""A page on which one draws: a few examples of each class, then new images, which a model names.

    python scripts/model/demo.py RUN_FOLDER

RUN_FOLDER is a folder that main.py trained on images in, LOGDIR/cls_... The page opens in the
browser. Draw a character for each class, or drop image files; then one of them again in the large
square. The probabilities after 0 to 10 updates follow while you draw. The page is for this machine
alone, at 127.0.0.1, and needs no internet. It needs `pip install -e '.[demo]'`.
"""

import importlib.util
import socket
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fewshot.start  # noqa: F401 (loads TensorFlow quietly)

from fewshot.runs.terminal import print_anything
from fewshot.use.loading import load_of_images, parser_of, refusals

HOST = '127.0.0.1'  # the machine itself, and nobody else


def free_port(port: int) -> int:
    """Returns the port if it is free, for 0 any that is. Raises ValueError if it is in use."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, 'strerror', None) or error
            raise ValueError(
                f'port {port} of {HOST} cannot be had ({reason}); name another with --port'
            ) from error
        return server.getsockname()[1]


def main(arguments: list[str] | None = None):
    parser = parser_of(__doc__)
    parser.add_argument('--port', type=int, default=8765, help='default 8765; 0: any free one')
    parser.add_argument('--no_browser', action='store_true', help='print the address only')
    values = parser.parse_args(arguments)
    with refusals(__file__):
        if importlib.util.find_spec('nicegui') is None:
            raise ValueError("the page needs NiceGUI; install it with `pip install -e '.[demo]'`")
        port = free_port(values.port)
        learner = load_of_images(values)
    from fewshot.use import demo_page  # imports NiceGUI, which is an extra

    demo_page.serve(learner, HOST, port, not values.no_browser)


if __name__ == '__main__':
    print_anything()
    main()
