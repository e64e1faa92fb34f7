"""Guards the page of scripts/model/demo.py: what may ask its server, and how much at once."""

from collections.abc import Awaitable, Callable


class Guard:
    """ASGI middleware that refuses pages of other origins, and requests longer than a limit.

    A browser lets any page open a socket to any server, and says whose page it is: by Origin. So a
    socket needs one, that of the server itself. Other requests have none if the page may not read
    the answer. limit: in bytes.
    """

    def __init__(self, app: Callable[..., Awaitable], limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope: dict, receive: Callable, send: Callable):
        refusal = self.refusal(scope) if scope['type'] in ('http', 'websocket') else None
        if refusal is None:
            return await self.app(scope, receive, send)
        status, sentence = refusal
        kind = 'http.response' if scope['type'] == 'http' else 'websocket.http.response'
        plain = [(b'content-type', b'text/plain')]
        await send({'type': f'{kind}.start', 'status': status, 'headers': plain})
        await send({'type': f'{kind}.body', 'body': sentence.encode()})

    def refusal(self, scope: dict) -> tuple[int, str] | None:
        """Returns the status and the sentence by which a request is refused, None if it is not."""
        headers = {name: value.decode('latin-1') for name, value in scope['headers']}
        origin, own = headers.get(b'origin'), 'http://' + headers.get(b'host', '')
        if origin != own and (origin is not None or scope['type'] == 'websocket'):
            return 403, f'Only the page at {own} may ask here.'
        if scope['type'] == 'http' and scope['method'] not in ('GET', 'HEAD', 'OPTIONS'):
            length = headers.get(b'content-length', '')
            if not length.isdecimal() or int(length) > self.limit:
                return 413, f'At most {self.limit} bytes are taken.'
        return None
