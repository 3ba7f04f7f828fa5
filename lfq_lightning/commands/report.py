"""`lfq report RUN … [--output FILE.html]`: a page about a run, or several side by side."""

from pathlib import Path

from lfq_lightning.commands.command_line import parser


def main(arguments: list[str]) -> None:
    """Run the command."""
    ours = parser("report", "Write a page about a finished run, or about several side by side.")
    ours.add_argument("runs", metavar="RUN", nargs="+", help="output folders of `lfq run`")
    ours.add_argument("--output", type=Path, help="the page; RUN/report.html, or comparison.html for several")
    options = ours.parse_args(arguments)
    from lfq_lightning.file_names import REPORT
    from lfq_lightning.report.write_report import write_report

    alone = Path(options.runs[0]) / REPORT if len(options.runs) == 1 else Path("comparison.html")
    print(write_report(options.runs, options.output or alone))
