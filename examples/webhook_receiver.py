"""Receives Backstop's webhooks and believes none that is not signed: `python webhook_receiver.py PORT`, secret in WEBHOOK_SECRET.

The signature is that of https://www.standardwebhooks.com. A message may come twice: its `webhook-id` tells.
`data` says what has ended. Of a batch made of a file its `id` is `batch_...`, its `status` completed, failed, expired or cancelled.
"""

import os
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from standardwebhooks.webhooks import Webhook, WebhookVerificationError

MOST_BYTES = 1024 * 1024


class Receiver(BaseHTTPRequestHandler):
    secret = Webhook(os.environ["WEBHOOK_SECRET"])

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        if length > MOST_BYTES:
            self.send_error(413)
            return
        body = self.rfile.read(length)
        try:
            event = self.secret.verify(body, {name.lower(): value for name, value in self.headers.items()})
        except WebhookVerificationError:
            self.send_error(401)
            return
        print(self.headers["webhook-id"], event["type"], flush=True)
        self.send_response(204)  # soon: what takes long belongs in a queue
        self.end_headers()


server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Receiver)
print(server.server_port, flush=True)
server.serve_forever()
