"""A site's own process over a local socket: it connects to the server, says who it is, and answers.

    python -m fedllm.engines.remote.site_process --site NAME --socket PATH --folder FOLDER --place PLACE

It imports no PyTorch: the model is in a process of its own (`model_process`).
"""

from __future__ import annotations

import argparse
import socket
from collections.abc import Sequence
from pathlib import Path

from fedllm.engines.remote import frames
from fedllm.engines.remote.model_process import ModelProcess
from fedllm.engines.remote.site_service import SiteService
from fedllm.version import __version__

PROTOCOL = 1


def greeting(site: str) -> frames.Head:
    """The first thing that a site says."""
    return {"site": site, "protocol": PROTOCOL, "fedllm": __version__}


def serve_link(link: socket.socket, service: SiteService) -> None:
    """Answer frames until the other side is gone.

    Raises:
        WireError: it has sent no frame; nothing more can be read from this connection.
    """
    while True:
        try:
            head, body = frames.receive(link)
        except OSError:
            return
        frames.send(link, *service.handle(head, body))


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer until the server is gone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", required=True, help="its name, which is that of its client")
    parser.add_argument("--socket", type=Path, required=True, help="where the server listens")
    parser.add_argument("--folder", type=Path, required=True, help="of the client's memories")
    parser.add_argument("--logs", type=Path, required=True, help="folder of the log")
    parser.add_argument("--place", type=Path, required=True, help="the working directory of relative paths")
    options = parser.parse_args(arguments)
    about = ["--client", options.site, "--folder", str(options.folder), "--place", str(options.place)]
    model = ModelProcess(about, options.logs)
    service = SiteService(model)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(str(options.socket))
        frames.send(link, greeting(options.site))
        try:
            serve_link(link, service)
        finally:
            service.close()
            model.close()


if __name__ == "__main__":
    main()
