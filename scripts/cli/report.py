"""`dbrx-quant report`: what a conversion did, as one page that needs nothing else, as pictures, as data."""

import argparse
from pathlib import Path

from dbrx_quant.scripts.terminal.arguments import add_model_argument, find_model
from dbrx_quant.scripts.terminal.output import bytes_text, print_json, say
from dbrx_quant.scripts.terminal.verb import Verb

PAGE_NAME = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    several = "a quantized folder, or its id on the Hub; several are compared"
    add_model_argument(parser, several, "folders", nargs="+")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help=f"the page (default: {PAGE_NAME}; none with --json)"
    )
    parser.add_argument(
        "--png", type=Path, metavar="FOLDER", help="write the pictures here; needs matplotlib"
    )


def run(arguments: argparse.Namespace) -> int:
    """Gather, then write what was asked for."""
    from dbrx_quant.runtime.files.atomic import check_place, write_text
    from dbrx_quant.scripts.report.data import compare, gather, read_folder
    from dbrx_quant.scripts.report.page import render
    from dbrx_quant.scripts.report.pictures import write_pictures

    page = arguments.output or (None if arguments.json else Path(PAGE_NAME))
    if page:
        check_place(page)
    reports = []
    for name in arguments.folders:
        given = None if Path(name).is_dir() else name  # a repository keeps its id for a name
        reports.append(gather(read_folder(find_model(name, arguments), given)))
    data = reports[0] if len(reports) == 1 else compare(reports)
    if arguments.png:
        for picture in write_pictures(data, arguments.png):
            say(f"{picture} ({bytes_text(picture.stat().st_size)})")
    if page:
        write_text(page, render(data))
        say(f"{page} ({bytes_text(page.stat().st_size)})")
    if arguments.json:
        print_json(data)
    return 0


VERB = Verb(
    "report",
    "show what a conversion did: bits, errors and coverage by block and expert, error against size",
    "dbrx-quant report out/dbrx/2.25bpw out/dbrx/3.0bpw -o comparison.html --png pictures",
    add_arguments,
    run,
)
