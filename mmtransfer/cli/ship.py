"""`mmtransfer ship`: journals of many sites in one place."""

from __future__ import annotations

import argparse

from mmtransfer.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is sent, and where."""
    parser.description = (
        "Send what stands in a journal, and what is written into it, to a broker (NATS JetStream) "
        "or to an index in PostgreSQL; or take in from a broker what sites send to it. Each line "
        "arrives once, whenever it is killed or offline. Audio stays where it is."
    )
    parser.add_argument(
        "source", metavar="JOURNAL|nats://…", help="folder of a journal, or a broker to take from"
    )
    parser.add_argument(
        "--to",
        metavar="PLACE",
        required=True,
        help="of a journal: nats://USER@HOST or postgresql://USER@HOST/DATABASE; from a broker: "
        "postgresql://…, an index FILE.sqlite, or a folder for Parquet files",
    )
    parser.add_argument(
        "--site", metavar="NAME", default="", help="what stands before the names of cameras there"
    )
    parser.add_argument(
        "--once", action="store_true", help="end when everything there is has been sent or taken in"
    )


def run(arguments: argparse.Namespace) -> int:
    """Ship until it is interrupted, or all is there; returns the exit code."""
    from mmtransfer.scale.ship import collect, is_broker, ship
    from mmtransfer.server.indexing import is_address
    from mmtransfer.speech.addresses import public_address

    source, place = arguments.source, arguments.to
    if is_broker(source):
        if arguments.site:
            raise UserError("--site: expected with a journal; what a broker has names its site.")
        from mmtransfer.scale.sinks import open_sink

        sink = open_sink(place)
        try:
            done = collect(source, sink, once=arguments.once)
        finally:
            sink.close()
        print(f"{public_address(place)}: {done.lines} lines taken in")
        return 0
    if not is_broker(place) and not is_address(place):
        raise UserError(
            f"--to: expected nats://… or postgresql://…, found {public_address(place)}."
        )
    done = ship(source, place, site=arguments.site, once=arguments.once)
    left_out = f", {done.left_out} of them too long and left out" if done.left_out else ""
    print(f"{public_address(place)}: {done.lines} lines sent{left_out}")
    return 0
