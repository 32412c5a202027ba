"""Lazy images beside containerd on the same images pulled in full, in one run.

Images are Debian's minbase with python3, numpy and more in one layer, of about 85, 150 and
800 MB as gzip, in a docker-registry on loopback or behind a slow link (100 Mbit/s, 20 ms each
way). containerd uses the ordinary image, ctrfs what `ctrfs convert` made of it. Before each
measurement both sides have an empty store and a daemon that has just started, and the page
cache of the machine is dropped: images and programs come from the disk, the registry's files
too. Every figure is the median of several rounds, in which the sides take turns, with the
least and the greatest in brackets. Where one command is measured the image is converted with a
trace of it, as whoever runs it often would do; `--traced none` shows what it is without.
"""

import argparse
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tools.comparison import CASES, LINKS, Case, Comparison
from tools.figures import FIGURES, MEASURED
from tools.results import read
from tools.shelf import FORMATS, ORDINARY, SIZES, WORKLOADS, Shelf


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/bench lazy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", choices=FIGURES, action="append", help="can be repeated")
    parser.add_argument("--image", choices=SIZES, help="this size only, for all figures")
    parser.add_argument("--link", choices=LINKS, help="this link only; with --image on any")
    parser.add_argument("--rounds", type=int, default=3, help="how often (%(default)s)")
    parser.add_argument(
        "--work", type=Path, metavar="DIR", help="where to keep the images (nowhere)"
    )
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help="that ctrfs uses")
    parser.add_argument("--mode", choices=("lazy", "full"), default="lazy", help="of our pulls")
    parser.add_argument(
        "--traced",
        choices=("own", "none", *WORKLOADS),
        default="own",
        help="convert with a trace of this command; own: of the one that is measured (%(default)s)",
    )
    parser.add_argument("--side", choices=("both", "ctrfs", "other"), default="both")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    parser.add_argument(
        "--earlier",
        type=Path,
        metavar="FILE",
        help="take the other side from such a file where it is not measured",
    )
    return parser.parse_args()


def cases(image: str | None, link: str | None, only: list[str] | None) -> list[Case]:
    """The cases that a command line asks for."""
    chosen = [case for case in CASES if not only or case.figure in only]
    if image:
        figures = dict.fromkeys(case.figure for case in chosen)
        return [Case(figure, image, link or "loopback") for figure in figures]
    return [case for case in chosen if not link or case.link == link]


def traced(case: Case, form: str, wanted: str) -> str:
    """The workload whose trace an image is converted with; empty for none."""
    if form == ORDINARY or wanted == "none":
        return ""
    return MEASURED.get(case.figure, "") if wanted == "own" else wanted


def main() -> None:
    """Entry point of `tools/bench lazy`."""
    arguments = _arguments()
    # Processes, mounts and namespaces are taken away on the way out.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    if arguments.work:
        arguments.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ctrfs-bench-") as name:
        directory = Path(name)
        comparison = Comparison(
            directory=directory,
            shelf=Shelf(arguments.work or directory, directory),
            rounds=arguments.rounds,
            form=arguments.format,
            mode=arguments.mode,
            ours=arguments.side != "other",
            others=arguments.side != "ctrfs",
            earlier=read(arguments.earlier) if arguments.earlier else [],
        )
        try:
            for case in cases(arguments.image, arguments.link, arguments.only):
                workload = traced(case, arguments.format, arguments.traced)
                shelf = replace(comparison.shelf, traced=workload)
                FIGURES[case.figure](replace(comparison, shelf=shelf), case)
        finally:
            if arguments.json:
                comparison.results.write(arguments.json)


if __name__ == "__main__":
    main()
